// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/providers"
	"github.com/labfile/lab/providers/qemu/qmp"
)

// Freeze makes the overlays that there are the birth.
func (p *Provider) Freeze(ctx context.Context, g lab.Generation) (providers.Frozen, error) {
	f, err := p.freeze(ctx, g, true)
	if err != nil {
		return f, fmt.Errorf("freezing machine %q: %w", g, err)
	}
	return f, nil
}

// Snapshot freezes the overlays above those that are frozen.
func (p *Provider) Snapshot(ctx context.Context, g lab.Generation) (providers.Frozen, error) {
	f, err := p.freeze(ctx, g, false)
	if err != nil {
		return f, fmt.Errorf("snapshotting machine %q: %w", g, err)
	}
	return f, nil
}

func (p *Provider) freeze(ctx context.Context, g lab.Generation, birth bool) (providers.Frozen, error) {
	d, err := p.openDirectory(ctx, g)
	if err != nil {
		return providers.Frozen{}, err
	}
	defer d.reading.Close()
	held, err := d.lock(ctx)
	if err != nil {
		return providers.Frozen{}, err
	}
	defer held.Close()
	c, err := readChain(d.path)
	if err != nil {
		return providers.Frozen{}, err
	}
	if birth && c.Birth > 0 {
		own, err := overlays(d.path)
		if err != nil {
			return providers.Frozen{}, err
		}
		f := d.frozen(own, 0, c.Birth)
		return f, protect(f)
	}
	below, err := p.push(ctx, d)
	if err != nil {
		return providers.Frozen{}, err
	}
	from := c.Frozen
	c.Frozen = below[len(below)-1] + 1
	if birth {
		from, c.Birth = 0, c.Frozen
	}
	if err := writeJSON(filepath.Join(d.path, fileChain), c); err != nil {
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

// directory is a generation's directory whose overlays the caller may change.
type directory struct {
	path    string
	def     definition
	monitor string
	reading *os.File // the lock; closing it gives it back
}

// openDirectory takes the lock that whoever reads the disk, or changes which
// overlays there are, holds all the time. It is taken before the generation's.
func (p *Provider) openDirectory(ctx context.Context, g lab.Generation) (*directory, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if err := checkGeneration(g); err != nil {
		return nil, err
	}
	d := &directory{path: p.cfg.Dirs.Generation(g), monitor: p.cfg.Dirs.Socket(g, socketMonitor)}
	var err error
	if d.reading, err = lock(ctx, filepath.Join(d.path, fileReading)); err != nil {
		if gone(err) {
			err = providers.ErrNotFound
		}
		return nil, err
	}
	ok := false
	if d.def, ok, err = readDefinition(d.path, g); err == nil && !ok {
		err = providers.ErrNotFound
	}
	if err != nil {
		d.reading.Close()
		return nil, err
	}
	return d, nil
}

// lock takes the generation's lock: the machine is not started or removed.
func (d *directory) lock(ctx context.Context) (*os.File, error) {
	held, err := lock(ctx, filepath.Join(d.path, fileLock))
	if gone(err) {
		return nil, providers.ErrNotFound
	}
	return held, err
}

// frozen returns those of the overlays own that are numbered from from to below to.
func (d *directory) frozen(own []int, from, to int) providers.Frozen {
	f := providers.Frozen{Size: d.def.Disk}
	for _, n := range own {
		if n >= from && n < to {
			f.Layers = append(f.Layers, overlay(d.path, n).Path)
		}
	}
	return f
}

// monitorTimeout bounds what is asked of a monitor at once. It is short, for
// others, such as a Stop, wait at the monitor's door.
const monitorTimeout = 5 * time.Second

// push lays a fresh overlay on top of the disk, under the machine if it runs, and
// returns those below it. The caller has the generation's lock.
func (p *Provider) push(ctx context.Context, d *directory) ([]int, error) {
	proc, err := p.find(ctx, d.path)
	if err != nil {
		return nil, err
	}
	if proc == nil {
		own, err := overlays(d.path)
		if err != nil {
			return nil, err
		}
		return own, addOverlay(d.path, own[len(own)-1]+1, d.def.Disk)
	}
	proc.close()
	for {
		own, err := p.pushUnder(ctx, d)
		if !errors.Is(err, errMerging) {
			return own, err
		}
		if err := pause(ctx, mergeTick); err != nil {
			return nil, err
		}
	}
}

// pushUnder is push for a machine that runs.
func (p *Provider) pushUnder(ctx context.Context, d *directory) ([]int, error) {
	ctx, cancel := context.WithTimeout(ctx, monitorTimeout)
	defer cancel()
	c, err := qmp.Dial(ctx, d.monitor)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	own, err := d.settle(ctx, c)
	if err != nil {
		return nil, err
	}
	top := own[len(own)-1]
	next := overlay(d.path, top+1)
	if err := addOverlay(d.path, top+1, d.def.Disk); err != nil {
		return nil, err
	}
	err = c.Execute(ctx, "blockdev-add", next.blockdev(), nil)
	if err == nil {
		err = c.Execute(ctx, "blockdev-snapshot", map[string]string{"node": overlay(d.path, top).Node, "overlay": next.Node}, nil)
	}
	if err != nil {
		// Refused, the overlay is not in use. Else only the next one to ask will
		// know, and settles it.
		var refused *qmp.Error
		if errors.As(err, &refused) {
			d.drop(ctx, c, top+1)
		}
		return nil, err
	}
	return own, nil
}

// settle removes what an interrupted change left under a machine that runs, and
// returns the overlays that the machine has.
func (d *directory) settle(ctx context.Context, c *qmp.Client) ([]int, error) {
	if err := d.settleMerges(ctx, c); err != nil {
		return nil, err
	}
	top, err := topOf(ctx, c)
	if err != nil {
		return nil, err
	}
	own, err := overlays(d.path)
	if err != nil {
		return nil, err
	}
	at := slices.Index(own, top)
	if at < 0 {
		return nil, fmt.Errorf("%s is missing", overlay(d.path, top).Path)
	}
	for _, n := range own[at+1:] {
		if err := d.drop(ctx, c, n); err != nil {
			return nil, err
		}
	}
	return own[:at+1], nil
}

// drop removes an overlay that the machine does not use.
func (d *directory) drop(ctx context.Context, c *qmp.Client, n int) error {
	o := overlay(d.path, n)
	err := c.Execute(ctx, "blockdev-del", map[string]string{"node-name": o.Node}, nil)
	// It may never have come as far as a node, or be the child of another one.
	var refused *qmp.Error
	if err != nil && !errors.As(err, &refused) {
		return err
	}
	return ignoreGone(os.Remove(o.Path))
}

// topOf asks QEMU which overlay the machine writes to.
func topOf(ctx context.Context, c *qmp.Client) (int, error) {
	top, err := nodeOf(ctx, c, deviceDisk)
	if err != nil {
		return 0, err
	}
	return overlayOf(top)
}

// nodeOf asks QEMU which node a virtio disk reads and writes.
func nodeOf(ctx context.Context, c *qmp.Client, device string) (string, error) {
	var devices []struct {
		Qdev     string `json:"qdev"`
		Inserted struct {
			Node string `json:"node-name"`
		} `json:"inserted"`
	}
	if err := c.Execute(ctx, "query-block", nil, &devices); err != nil {
		return "", err
	}
	for _, d := range devices {
		// A virtio device's block backend belongs to a child of the device.
		if d.Qdev == "/machine/peripheral/"+device+"/virtio-backend" {
			return d.Inserted.Node, nil
		}
	}
	return "", fmt.Errorf("the machine has no disk %q", device)
}
