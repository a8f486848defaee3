// SPDX-License-Identifier: Apache-2.0

package local

import (
	"context"
	"os"
	"path/filepath"

	"github.com/labfile/lab/providers"
)

// Directory is a generation's directory whose overlays the caller may change.
type Directory struct {
	Path    string
	Def     Definition
	reading *os.File // the lock; Close gives it back
}

// Open takes the lock that whoever reads the disk, or changes which overlays
// there are, holds all the time. It is taken before the generation's. define
// returns the generation's definition; ok is false if there is none.
// ErrNotFound.
func Open(ctx context.Context, dir string, define func() (d Definition, ok bool, err error)) (*Directory, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	d := &Directory{Path: dir}
	var err error
	if d.reading, err = Lock(ctx, filepath.Join(dir, FileReading)); err != nil {
		if Gone(err) {
			err = providers.ErrNotFound
		}
		return nil, err
	}
	ok := false
	if d.Def, ok, err = define(); err == nil && !ok {
		err = providers.ErrNotFound
	}
	if err != nil {
		d.Close()
		return nil, err
	}
	return d, nil
}

// Close gives the lock back.
func (d *Directory) Close() { d.reading.Close() }

// Lock takes the generation's lock: the machine is not started or removed.
func (d *Directory) Lock(ctx context.Context) (*os.File, error) {
	held, err := Lock(ctx, filepath.Join(d.Path, FileLock))
	if Gone(err) {
		return nil, providers.ErrNotFound
	}
	return held, err
}

// Freeze makes the overlays that there are the birth, or freezes those above what
// is frozen. push lays a fresh overlay on top of the disk, under the machine if it
// runs, and returns those below it; it is called with the generation's lock held.
func (d *Directory) Freeze(ctx context.Context, birth bool, push func(context.Context) ([]int, error)) (providers.Frozen, error) {
	held, err := d.Lock(ctx)
	if err != nil {
		return providers.Frozen{}, err
	}
	defer held.Close()
	c, err := ReadChain(d.Path)
	if err != nil {
		return providers.Frozen{}, err
	}
	if birth && c.Birth > 0 {
		own, err := Overlays(d.Path)
		if err != nil {
			return providers.Frozen{}, err
		}
		f := d.frozen(own, 0, c.Birth)
		return f, protect(f)
	}
	below, err := push(ctx)
	if err != nil {
		return providers.Frozen{}, err
	}
	from := c.Frozen
	c.Frozen = below[len(below)-1] + 1
	if birth {
		from, c.Birth = 0, c.Frozen
	}
	if err := WriteJSON(filepath.Join(d.Path, FileChain), c); err != nil {
		return providers.Frozen{}, err
	}
	f := d.frozen(below, from, c.Frozen)
	return f, protect(f)
}

// protect makes sure that what is frozen stays so, whoever opens it next.
func protect(f providers.Frozen) error {
	for _, path := range f.Layers {
		if err := os.Chmod(path, 0o400); err != nil {
			return err
		}
	}
	return nil
}

// frozen returns those of the overlays own that are numbered from from to below to.
func (d *Directory) frozen(own []int, from, to int) providers.Frozen {
	f := providers.Frozen{Size: d.Def.Disk}
	for _, n := range own {
		if n >= from && n < to {
			f.Layers = append(f.Layers, OverlayPath(d.Path, n))
		}
	}
	return f
}

// Layers returns the disk without its Release, from the box up to what lies below
// an overlay that is empty at this moment: a fresh one, by push as in Freeze, or
// the top of a machine that does not run, which may start any time.
func (d *Directory) Layers(ctx context.Context, running func(context.Context) (bool, error), push func(context.Context) ([]int, error)) (providers.Disk, error) {
	held, err := d.Lock(ctx)
	if err != nil {
		return providers.Disk{}, err
	}
	defer held.Close()
	c, err := ReadChain(d.Path)
	if err != nil {
		return providers.Disk{}, err
	}
	below, err := d.covered(ctx, running, push)
	if err != nil {
		return providers.Disk{}, err
	}
	i := d.Def.Image
	disk := providers.Disk{Layers: []providers.Layer{{Path: i.Disk, Format: i.Format}}}
	for _, path := range i.Layers {
		disk.Layers = append(disk.Layers, providers.Layer{Path: path, Format: "qcow2"})
	}
	for _, n := range below {
		disk.Layers = append(disk.Layers, providers.Layer{Path: OverlayPath(d.Path, n), Format: "qcow2"})
		if n < c.Birth {
			disk.Birth = len(disk.Layers)
		}
	}
	return disk, nil
}

func (d *Directory) covered(ctx context.Context, running func(context.Context) (bool, error), push func(context.Context) ([]int, error)) ([]int, error) {
	own, err := Overlays(d.Path)
	if err != nil {
		return nil, err
	}
	if last := len(own) - 1; last > 0 {
		runs, err := running(ctx)
		if err != nil {
			return nil, err
		}
		if !runs {
			if is, err := Empty(d.Path, own[last]); is || err != nil {
				return own[:last], err
			}
		}
	}
	return push(ctx)
}

// Push lays a fresh overlay on top of the disk of a machine that does not run,
// and returns those below it. The caller has the generation's lock.
func (d *Directory) Push() ([]int, error) {
	own, err := Overlays(d.Path)
	if err != nil {
		return nil, err
	}
	return own, AddOverlay(d.Path, own[len(own)-1]+1, d.Def.Disk)
}

// Mergeable picks, of the overlays own that a machine has, those that may become
// one: all between what is frozen and the one that the machine writes to, from base
// up to top. ok is false if there are not two of them.
func (d *Directory) Mergeable(own []int) (base, top int, ok bool, err error) {
	frozen, err := ReadChain(d.Path)
	if err != nil {
		return 0, 0, false, err
	}
	for len(own) > 0 && own[0] < frozen.Frozen {
		own = own[1:]
	}
	if len(own) < 3 {
		return 0, 0, false, nil
	}
	return own[0], own[len(own)-2], true, nil
}
