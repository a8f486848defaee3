// SPDX-License-Identifier: Apache-2.0

package drift

import (
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"

	"github.com/labfile/lab/internal/drift/qcow2"
)

// Layer is one file of a disk.
type Layer struct {
	Path   string // absolute
	Format string // "qcow2" or "raw"
}

// Chain is a disk as a pile of layers, each of which hides what the ones below it
// have at the same place. Nothing in the files says what lies below: the chain
// does. It must not be used by two goroutines at once.
type Chain struct {
	layers []*layer
}

type layer struct {
	file *os.File
	id   fileID
	size int64        // of the disk, in bytes
	img  *qcow2.Image // nil for a raw layer
}

// fileID tells files apart, so that chains which share a layer are seen to.
type fileID struct{ dev, ino uint64 }

// OpenChain opens the layers, from the lowest up. Layers may grow upwards.
func OpenChain(layers []Layer) (*Chain, error) {
	if len(layers) == 0 {
		return nil, errors.New("a disk without layers")
	}
	c := &Chain{}
	for _, l := range layers {
		opened, err := openLayer(l)
		if err != nil {
			c.Close()
			return nil, fmt.Errorf("disk layer %s: %w", l.Path, err)
		}
		c.layers = append(c.layers, opened)
	}
	return c, nil
}

func openLayer(l Layer) (*layer, error) {
	f, err := os.Open(l.Path)
	if err != nil {
		return nil, err
	}
	o := &layer{file: f}
	if err := o.init(l.Format); err != nil {
		f.Close()
		return nil, err
	}
	return o, nil
}

func (l *layer) init(format string) error {
	info, err := l.file.Stat()
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() {
		return errors.New("not a regular file")
	}
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		l.id = fileID{uint64(st.Dev), st.Ino}
	}
	switch format {
	case "raw":
		l.size = info.Size()
	case "qcow2":
		if l.img, err = qcow2.Open(l.file, info.Size()); err != nil {
			return err
		}
		l.size = l.img.Size()
	default:
		return fmt.Errorf("format %q is not supported", format)
	}
	return nil
}

// Close closes the files.
func (c *Chain) Close() error {
	var errs []error
	for _, l := range c.layers {
		errs = append(errs, l.file.Close())
	}
	return errors.Join(errs...)
}

// Len is the number of layers.
func (c *Chain) Len() int { return len(c.layers) }

// View is the disk that the lowest n layers make.
func (c *Chain) View(n int) (*View, error) {
	if n < 1 || n > len(c.layers) {
		return nil, fmt.Errorf("%d of %d layers", n, len(c.layers))
	}
	return &View{layers: c.layers[:n]}, nil
}

// Written is how many bytes of the disk the layers above the lowest n have
// anything of their own for: an upper bound of what was written since.
func (c *Chain) Written(n int) (int64, error) {
	var sum int64
	for _, l := range c.layers[min(n, len(c.layers)):] {
		if l.img == nil {
			sum += l.size
			continue
		}
		a, err := l.img.Allocated()
		if err != nil {
			return 0, err
		}
		sum += a
	}
	return sum, nil
}

// View is a disk as it was when its topmost layer ended.
type View struct {
	layers []*layer
}

// Size is the size of the disk in bytes.
func (v *View) Size() int64 { return v.layers[len(v.layers)-1].size }

// place says where bytes of a disk are kept. Equal places hold equal bytes.
type place struct {
	file fileID
	kind qcow2.Kind // Zero, Data or Compressed
	at   int64      // in the file; for Compressed its descriptor
}

// find returns where the byte at off is kept, the layer that has it, and for how
// many bytes the answer holds.
func (v *View) find(off int64) (place, *layer, qcow2.Extent, error) {
	n := v.Size() - off
	for i := len(v.layers) - 1; i >= 0; i-- {
		l := v.layers[i]
		if off >= l.size {
			break // beyond the end of a smaller layer there is nothing
		}
		if l.img == nil {
			e := qcow2.Extent{Kind: qcow2.Data, At: off, Len: min(n, l.size-off)}
			return place{file: l.id, kind: e.Kind, at: off}, l, e, nil
		}
		e, err := l.img.Map(off)
		if err != nil {
			return place{}, nil, e, err
		}
		n = min(n, e.Len)
		e.Len = n
		switch e.Kind {
		case qcow2.Zero:
			return place{kind: qcow2.Zero}, l, e, nil
		case qcow2.Data:
			return place{file: l.id, kind: e.Kind, at: e.At}, l, e, nil
		case qcow2.Compressed:
			return place{file: l.id, kind: e.Kind, at: e.At}, l, e, nil
		}
	}
	return place{kind: qcow2.Zero}, nil, qcow2.Extent{Kind: qcow2.Zero, Len: n}, nil
}

// ReadAt implements io.ReaderAt.
func (v *View) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, errors.New("negative offset")
	}
	done := 0
	for done < len(p) {
		if off >= v.Size() {
			return done, io.EOF
		}
		_, l, e, err := v.find(off)
		if err != nil {
			return done, err
		}
		part := p[done:]
		if int64(len(part)) > e.Len {
			part = part[:e.Len]
		}
		switch {
		case e.Kind == qcow2.Zero:
			clear(part)
		case l.img != nil:
			err = l.img.ReadAt(part, off, e)
		default:
			_, err = l.file.ReadAt(part, off)
		}
		if err != nil {
			return done, err
		}
		done += len(part)
		off += int64(len(part))
	}
	return done, nil
}

// same reports whether n bytes at one place of a and at one of b are kept in the
// same place, and therefore equal. False says nothing.
func same(a *View, aOff int64, b *View, bOff, n int64) (bool, error) {
	for n > 0 {
		if aOff >= a.Size() || bOff >= b.Size() {
			return false, nil
		}
		pa, _, ea, err := a.find(aOff)
		if err != nil {
			return false, err
		}
		pb, _, eb, err := b.find(bOff)
		if err != nil {
			return false, err
		}
		if pa != pb {
			return false, nil
		}
		step := min(ea.Len, eb.Len)
		if pa.kind == qcow2.Compressed && aOff != bOff {
			return false, nil
		}
		aOff, bOff, n = aOff+step, bOff+step, n-step
	}
	return true, nil
}
