// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/providers"
	"github.com/labfile/lab/providers/local"
	"github.com/labfile/lab/providers/qmp"
)

// Freeze makes the overlays that there are the birth.
func (p *Provider) Freeze(ctx context.Context, g lab.Generation) error {
	if _, err := p.freeze(ctx, g, true); err != nil {
		return fmt.Errorf("freezing machine %q: %w", g, err)
	}
	return nil
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
	defer d.Close()
	frozen, err := d.Freeze(ctx, birth, func(ctx context.Context) ([]int, error) { return p.push(ctx, d) })
	if err != nil {
		return providers.Frozen{}, err
	}
	return d.Frozen(frozen)
}

// directory is a generation's directory whose overlays the caller may change.
type directory struct {
	*local.Directory
	monitor string
}

func (p *Provider) openDirectory(ctx context.Context, g lab.Generation) (*directory, error) {
	if err := local.CheckGeneration(g); err != nil {
		return nil, err
	}
	path := p.cfg.Dirs.Generation(g)
	d, err := local.Open(ctx, path, func() (local.Definition, bool, error) { return local.ReadDefinition(path, g) })
	if err != nil {
		return nil, err
	}
	return &directory{Directory: d, monitor: p.cfg.Dirs.Socket(g, socketMonitor)}, nil
}

// monitorTimeout bounds what is asked of a monitor at once. It is short, for
// others, such as a Stop, wait at the monitor's door.
const monitorTimeout = 5 * time.Second

// push lays a fresh overlay on top of the disk, under the machine if it runs, and
// returns those below it. The caller has the generation's lock.
func (p *Provider) push(ctx context.Context, d *directory) ([]int, error) {
	proc, err := p.find(ctx, d.Path)
	if err != nil {
		return nil, err
	}
	if proc == nil {
		return d.Push()
	}
	proc.Close()
	for {
		own, err := p.pushUnder(ctx, d)
		if !errors.Is(err, errMerging) {
			return own, err
		}
		if err := local.Pause(ctx, mergeTick); err != nil {
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
	next := overlay(d.Path, top+1)
	if err := local.AddOverlay(d.Path, top+1, d.Def.Disk); err != nil {
		return nil, err
	}
	err = c.Execute(ctx, "blockdev-add", next.blockdev(), nil)
	if err == nil {
		err = c.Execute(ctx, "blockdev-snapshot", map[string]string{"node": overlay(d.Path, top).Node, "overlay": next.Node}, nil)
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
	own, err := local.Overlays(d.Path)
	if err != nil {
		return nil, err
	}
	at := slices.Index(own, top)
	if at < 0 {
		return nil, fmt.Errorf("%s is missing", overlay(d.Path, top).Path)
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
	o := overlay(d.Path, n)
	err := c.Execute(ctx, "blockdev-del", map[string]string{"node-name": o.Node}, nil)
	// It may never have come as far as a node, or be the child of another one.
	var refused *qmp.Error
	if err != nil && !errors.As(err, &refused) {
		return err
	}
	return local.IgnoreGone(os.Remove(o.Path))
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
