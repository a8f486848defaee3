// SPDX-License-Identifier: Apache-2.0

package libvirt

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/labfile/lab/internal/fsutil"
	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/providers"
	"github.com/labfile/lab/providers/local"
	"github.com/labfile/lab/providers/qcow2"
)

// Freeze makes the overlays that there are the birth.
func (r *Remote) Freeze(ctx context.Context, g lab.Generation) error {
	if _, err := r.freeze(ctx, g, true); err != nil {
		return fmt.Errorf("freezing machine %q: %w", g, err)
	}
	return nil
}

// Snapshot freezes the overlays above those that are frozen, and fetches them.
func (r *Remote) Snapshot(ctx context.Context, g lab.Generation) (providers.Frozen, error) {
	f, err := r.freeze(ctx, g, false)
	if err != nil {
		return f, fmt.Errorf("snapshotting machine %q: %w", g, err)
	}
	return f, nil
}

func (r *Remote) freeze(ctx context.Context, g lab.Generation, birth bool) (providers.Frozen, error) {
	d, err := r.openDirectory(ctx, g)
	if err != nil {
		return providers.Frozen{}, err
	}
	defer d.Close()
	frozen, err := d.Freeze(ctx, birth, func(ctx context.Context) ([]int, error) { return r.p.push(ctx, d) })
	if err != nil || birth {
		return providers.Frozen{}, err
	}
	for _, n := range frozen {
		if err := r.fetch(ctx, d, n, local.OverlayPath(d.Path, n)); err != nil {
			return providers.Frozen{}, err
		}
	}
	return d.Frozen(frozen)
}

func (r *Remote) openDirectory(ctx context.Context, g lab.Generation) (*directory, error) {
	files, err := r.pool(ctx)
	if err != nil {
		return nil, err
	}
	d, dom, err := r.p.open(ctx, g)
	if err != nil {
		return nil, err
	}
	// What a command that was killed had fetched.
	if err := sweep(d.Path); err != nil {
		d.Close()
		return nil, err
	}
	redefine := func(ctx context.Context) error {
		dom, ok, err := r.p.find(ctx, g)
		if err != nil || !ok {
			return err
		}
		def, err := dom.definition() // its volumes may have changed
		if err != nil {
			return err
		}
		return r.saved(ctx, dom, def)
	}
	return &directory{d, dom, r.overlays(g, files), redefine}, nil
}

// sweep removes what a command that was killed had fetched into a generation's directory.
func sweep(dir string) error {
	entries, err := os.ReadDir(dir)
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), ".open-") || strings.HasPrefix(e.Name(), ".fetched-") {
			err = errors.Join(err, os.RemoveAll(filepath.Join(dir, e.Name())))
		}
	}
	return err
}

// fetch makes a file of an overlay that nobody writes to, unless the file is there.
func (r *Remote) fetch(ctx context.Context, d *directory, n int, path string) error {
	if exists(path) {
		return nil
	}
	o, ok := d.overlays.(inPool)
	if !ok {
		return errors.New("the overlays are in no pool")
	}
	draft, err := fsutil.NewDraftIn(d.Path, ".fetched-", path, 0o600)
	if err != nil {
		return err
	}
	defer draft.Drop()
	if err := o.files.get(ctx, o.name(n), draft.File); err != nil {
		return err
	}
	if err := qcow2.ForgetBacking(draft.Name()); err != nil {
		return err
	}
	return draft.Commit()
}

// OpenDisk lays an overlay over what is to be read and fetches that. What is frozen is
// kept for the next time. Its Release merges overlays as the Provider's does.
func (r *Remote) OpenDisk(ctx context.Context, g lab.Generation) (providers.Disk, error) {
	disk, err := r.openDisk(ctx, g)
	if err != nil {
		return disk, fmt.Errorf("opening the disk of machine %q: %w", g, err)
	}
	return disk, nil
}

func (r *Remote) openDisk(ctx context.Context, g lab.Generation) (providers.Disk, error) {
	d, err := r.openDirectory(ctx, g)
	if err != nil {
		return providers.Disk{}, err
	}
	below, c, err := r.cover(ctx, d)
	if err != nil {
		d.Close()
		return providers.Disk{}, err
	}
	i := d.Def.Image
	disk := providers.Disk{Layers: []providers.Layer{{Path: i.Disk, Format: i.Format}}}
	for _, path := range i.Layers {
		disk.Layers = append(disk.Layers, providers.Layer{Path: path, Format: "qcow2"})
	}
	temp, err := os.MkdirTemp(d.Path, ".open-")
	for _, n := range below {
		path := local.OverlayPath(d.Path, n)
		if n >= c.Frozen {
			path = local.OverlayPath(temp, n)
		}
		if err == nil {
			err = r.fetch(ctx, d, n, path)
		}
		disk.Layers = append(disk.Layers, providers.Layer{Path: path, Format: "qcow2"})
		if n < c.Birth {
			disk.Birth = len(disk.Layers)
		}
	}
	disk.Release = func(ctx context.Context) error {
		defer d.Close()
		err := os.RemoveAll(temp)
		if e := r.p.merge(ctx, d); e != nil {
			err = errors.Join(err, fmt.Errorf("closing the disk of machine %q: %w", g, e))
		}
		return err
	}
	if err != nil {
		cleanup, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupTime)
		defer cancel()
		return providers.Disk{}, errors.Join(err, disk.Release(cleanup))
	}
	return disk, nil
}

// cover sees to it that nobody writes to what is below the overlays' top, and returns that.
func (r *Remote) cover(ctx context.Context, d *directory) (below []int, c local.Chain, err error) {
	held, err := d.Lock(ctx)
	if err != nil {
		return nil, c, err
	}
	defer held.Close()
	if c, err = local.ReadChain(d.Path); err != nil {
		return nil, c, err
	}
	own, err := d.overlays.list(ctx)
	if err != nil {
		return nil, c, err
	}
	if last := len(own) - 1; last > 0 {
		runs, err := r.p.runs(ctx, d)
		if err != nil {
			return nil, c, err
		}
		if !runs {
			if is, err := r.empty(ctx, d, own[last]); is || err != nil {
				return own[:last], c, err
			}
		}
	}
	below, err = r.p.push(ctx, d)
	return below, c, err
}

// empty reports whether nothing was ever written to an overlay of a machine that does not
// run.
func (r *Remote) empty(ctx context.Context, d *directory, n int) (bool, error) {
	o, ok := d.overlays.(inPool)
	if !ok {
		return false, errors.New("the overlays are in no pool")
	}
	length, _, err := o.files.size(ctx, o.name(n))
	return err == nil && length <= qcow2.EmptySize, err
}

// usage returns what the overlays take on the daemon's host, and what those above the birth
// take without the structures of empty ones.
func (r *Remote) usage(ctx context.Context, g lab.Generation) (all, written lab.Bytes, err error) {
	files, err := r.pool(ctx)
	if err != nil {
		return 0, 0, err
	}
	o := r.overlays(g, files)
	own, err := o.list(ctx)
	if err != nil {
		return 0, 0, err
	}
	c, err := local.ReadChain(r.p.dir(g))
	if err != nil {
		return 0, 0, err
	}
	for _, n := range own {
		length, takes, err := files.size(ctx, o.name(n))
		if isNotFound(err) {
			continue // merged just now
		}
		if err != nil {
			return 0, 0, err
		}
		all += lab.Bytes(takes)
		if c.Birth > 0 && n >= c.Birth && length > qcow2.EmptySize {
			written += max(0, lab.Bytes(takes)-local.EmptyTakes)
		}
	}
	return all, written, nil
}
