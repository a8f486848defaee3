// SPDX-License-Identifier: Apache-2.0

package local

import (
	"context"
	"os"
	"path/filepath"
	"slices"

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
// is frozen, and returns which ones it froze. push lays a fresh overlay on top of the
// disk, under the machine if it runs, and returns those below it; it is called with the
// generation's lock held.
func (d *Directory) Freeze(ctx context.Context, birth bool, push func(context.Context) ([]int, error)) ([]int, error) {
	held, err := d.Lock(ctx)
	if err != nil {
		return nil, err
	}
	defer held.Close()
	c, err := ReadChain(d.Path)
	if err != nil || birth && c.Birth > 0 {
		return nil, err
	}
	below, err := push(ctx)
	if err != nil {
		return nil, err
	}
	from := c.Frozen
	c.Frozen = below[len(below)-1] + 1
	if birth {
		from, c.Birth = 0, c.Frozen
	}
	if err := WriteJSON(filepath.Join(d.Path, FileChain), c); err != nil {
		return nil, err
	}
	return slices.DeleteFunc(below, func(n int) bool { return n < from }), nil
}

// Frozen makes sure that overlays in the directory that were frozen stay so, whoever
// opens them next.
func (d *Directory) Frozen(overlays []int) (providers.Frozen, error) {
	f := providers.Frozen{Size: d.Def.Disk}
	for _, n := range overlays {
		path := OverlayPath(d.Path, n)
		if err := os.Chmod(path, 0o400); err != nil {
			return f, err
		}
		f.Layers = append(f.Layers, path)
	}
	return f, nil
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
