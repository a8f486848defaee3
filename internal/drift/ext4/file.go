// SPDX-License-Identifier: Apache-2.0

package ext4

import (
	"errors"
	"fmt"
	"io"
)

// Extent is a run of a file's blocks.
type Extent struct {
	Logical uint64 // first block in the file
	Block   uint64 // first block in the file system
	Len     uint64 // blocks
	Zero    bool   // allocated, never written: it reads as zeros
}

const maxExtents = 1 << 22 // of a file; about 100 MiB

// File is a file's content.
type File struct {
	fs      *FS
	size    int64
	inline  []byte // all of it, if it has no blocks
	isIn    bool
	extents []Extent
}

// File returns the content of a file, a directory or a long symbolic link.
func (fs *FS) File(i *Inode) (*File, error) {
	f := &File{fs: fs, size: i.Size}
	var err error
	switch {
	case i.flags&flagInline != 0:
		f.isIn = true
		f.inline, err = i.inline()
	case i.flags&flagExtents != 0:
		err = f.extentNode(i.block[:], -1)
	default:
		err = f.blockMap(i)
	}
	if err != nil {
		return nil, fmt.Errorf("inode %d: %w", i.Number, err)
	}
	return f, nil
}

// Size is the length of the file in bytes.
func (f *File) Size() int64 { return f.size }

// Inline reports whether the content is kept in the inode and has no extents.
func (f *File) Inline() bool { return f.isIn }

// Extents returns the file's runs in ascending order. What lies between them is zeros.
func (f *File) Extents() []Extent { return f.extents }

func (f *File) add(e Extent) error {
	last := len(f.extents) - 1
	if last >= 0 {
		l := f.extents[last]
		if e.Logical < l.Logical+l.Len {
			return errors.New("its extents overlap")
		}
		if e.Logical == l.Logical+l.Len && e.Block == l.Block+l.Len && e.Zero == l.Zero {
			f.extents[last].Len += e.Len
			return nil
		}
	}
	if e.Block >= f.fs.blocks || e.Len > f.fs.blocks-e.Block {
		return errors.New("an extent lies outside of the file system")
	}
	if last+1 >= maxExtents {
		return fmt.Errorf("it has more than %d extents", maxExtents)
	}
	f.extents = append(f.extents, e)
	return nil
}

// extentNode adds the extents of a node; depth is what it must have, or -1.
func (f *File) extentNode(b []byte, depth int) error {
	if len(b) < 12 || le.Uint16(b) != 0xf30a {
		return errors.New("a node of its extents has no magic number")
	}
	entries, d := int(le.Uint16(b[2:])), int(le.Uint16(b[6:]))
	if d > 5 || depth >= 0 && d != depth {
		return errors.New("its extent tree has an impossible depth")
	}
	if entries > (len(b)-12)/12 {
		return errors.New("a node of its extents has too many entries")
	}
	for n := range entries {
		e := b[12+n*12:]
		if d == 0 {
			length := uint64(le.Uint16(e[4:]))
			zero := length > 1<<15
			if zero {
				length -= 1 << 15
			}
			if length == 0 {
				continue
			}
			err := f.add(Extent{
				Logical: uint64(le.Uint32(e)),
				Block:   uint64(le.Uint16(e[6:]))<<32 | uint64(le.Uint32(e[8:])),
				Len:     length, Zero: zero,
			})
			if err != nil {
				return err
			}
			continue
		}
		if err := f.fs.spend(1); err != nil {
			return err
		}
		child := make([]byte, f.fs.block)
		if err := f.fs.readBlocks(child, uint64(le.Uint16(e[8:]))<<32|uint64(le.Uint32(e[4:]))); err != nil {
			return err
		}
		if err := f.extentNode(child, d-1); err != nil {
			return err
		}
	}
	return nil
}

// blockMap adds the blocks of a file in the manner of ext2.
func (f *File) blockMap(i *Inode) error {
	for n := range 12 {
		if err := f.mapped(uint64(n), le.Uint32(i.block[n*4:])); err != nil {
			return err
		}
	}
	per := uint64(f.fs.block / 4)
	at, span := uint64(12), uint64(1)
	for level := range 3 {
		if err := f.indirect(at, uint64(le.Uint32(i.block[48+level*4:])), level, span); err != nil {
			return err
		}
		span *= per
		at += span
	}
	return nil
}

// indirect adds what a block of pointers names, each of which stands for span blocks.
func (f *File) indirect(at, block uint64, level int, span uint64) error {
	if block == 0 || at > uint64(f.size/f.fs.block) {
		return nil
	}
	if err := f.fs.spend(1); err != nil {
		return err
	}
	b := make([]byte, f.fs.block)
	if err := f.fs.readBlocks(b, block); err != nil {
		return err
	}
	for n := range len(b) / 4 {
		p := le.Uint32(b[n*4:])
		var err error
		if level == 0 {
			err = f.mapped(at, p)
		} else {
			err = f.indirect(at, uint64(p), level-1, span/uint64(f.fs.block/4))
		}
		if err != nil {
			return err
		}
		at += span
	}
	return nil
}

func (f *File) mapped(logical uint64, block uint32) error {
	if block == 0 {
		return nil
	}
	return f.add(Extent{Logical: logical, Block: uint64(block), Len: 1})
}

// ReadAt implements io.ReaderAt.
func (f *File) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, errors.New("negative offset")
	}
	if off >= f.size {
		return 0, io.EOF
	}
	var end error
	if int64(len(p)) > f.size-off {
		p, end = p[:f.size-off], io.EOF
	}
	if f.isIn {
		return copy(p, f.inline[off:]), end
	}
	clear(p)
	bs := f.fs.block
	for _, e := range f.extents[f.search(uint64(off/bs)):] {
		if int64(e.Logical)*bs >= off+int64(len(p)) {
			break
		}
		if e.Zero {
			continue
		}
		from := max(off, int64(e.Logical)*bs)
		to := min(off+int64(len(p)), int64(e.Logical+e.Len)*bs)
		if err := f.read(p[from-off:to-off], e, from); err != nil {
			return 0, err
		}
	}
	return len(p), end
}

// search returns the index of the first extent that ends behind a block of the file.
func (f *File) search(logical uint64) int {
	lo, hi := 0, len(f.extents)
	for lo < hi {
		mid := (lo + hi) / 2
		if f.extents[mid].Logical+f.extents[mid].Len > logical {
			hi = mid
		} else {
			lo = mid + 1
		}
	}
	return lo
}

// read fills p from offset off of the file, all of which lies in e.
func (f *File) read(p []byte, e Extent, off int64) error {
	bs := f.fs.block
	first := uint64(off / bs)
	in := off % bs
	whole := (in + int64(len(p)) + bs - 1) / bs
	n := e.Block + first - e.Logical
	if in == 0 && int64(len(p))%bs == 0 {
		return f.fs.readBlocks(p, n)
	}
	b := make([]byte, whole*bs)
	if err := f.fs.readBlocks(b, n); err != nil {
		return err
	}
	copy(p, b[in:])
	return nil
}

// Target returns where a symbolic link leads.
func (fs *FS) Target(i *Inode) (string, error) {
	if i.Type() != TypeSymlink {
		return "", fmt.Errorf("inode %d is not a symbolic link", i.Number)
	}
	if i.Size > fs.block {
		return "", fmt.Errorf("inode %d: a symbolic link of %d bytes", i.Number, i.Size)
	}
	if i.Size < 60 && i.flags&(flagExtents|flagInline) == 0 {
		return string(i.block[:i.Size]), nil
	}
	f, err := fs.File(i)
	if err != nil {
		return "", err
	}
	b := make([]byte, i.Size)
	if _, err := f.ReadAt(b, 0); err != nil && !errors.Is(err, io.EOF) {
		return "", fmt.Errorf("inode %d: %w", i.Number, err)
	}
	return string(b), nil
}
