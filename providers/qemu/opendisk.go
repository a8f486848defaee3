// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/providers"
	"github.com/labfile/lab/providers/local"
	"github.com/labfile/lab/providers/qmp"
)

// OpenDisk lays an overlay over what is to be read. Its Release does not remove
// that one again, for merging the overlay that a machine writes to has an instant
// at which a crash of QEMU leaves it unknown which file is the newer. It merges
// those below: what the machine wrote until the last OpenDisk and what it wrote
// until this one become one.
func (p *Provider) OpenDisk(ctx context.Context, g lab.Generation) (providers.Disk, error) {
	disk, err := p.openDisk(ctx, g)
	if err != nil {
		return disk, fmt.Errorf("opening the disk of machine %q: %w", g, err)
	}
	return disk, nil
}

func (p *Provider) openDisk(ctx context.Context, g lab.Generation) (providers.Disk, error) {
	d, err := p.openDirectory(ctx, g)
	if err != nil {
		return providers.Disk{}, err
	}
	disk, err := d.Layers(ctx,
		func(ctx context.Context) (bool, error) { return p.runs(ctx, d.Path) },
		func(ctx context.Context) ([]int, error) { return p.push(ctx, d) })
	if err != nil {
		d.Close()
		return disk, err
	}
	disk.Release = func(ctx context.Context) error {
		defer d.Close()
		if err := p.merge(ctx, d); err != nil {
			return fmt.Errorf("closing the disk of machine %q: %w", g, err)
		}
		return nil
	}
	return disk, nil
}

// runs reports whether the generation in dir has a QEMU.
func (p *Provider) runs(ctx context.Context, dir string) (bool, error) {
	proc, err := p.find(ctx, dir)
	if err != nil || proc == nil {
		return false, err
	}
	proc.Close()
	return true, nil
}

// mergePrefix begins the names of merging jobs: merge-BASE-TOP. QEMU keeps a job
// that has ended until it is dismissed, so that as long as QEMU lives it is known
// which overlays have been merged.
const mergePrefix = "merge-"

// mergeTick is how often QEMU is asked whether a merge is done. Each time is a
// connection of its own, for a monitor has one client at a time.
const mergeTick = 10 * time.Millisecond

// merge makes one of the overlays between what is frozen and what the machine
// writes to. It does nothing for a machine that does not run. It may be
// interrupted at any point: the pile reads the same all the time.
func (p *Provider) merge(ctx context.Context, d *directory) error {
	busy := true
	for started := false; busy; {
		var err error
		busy, err = p.mergeStep(ctx, d, &started)
		if err != nil {
			return local.IgnoreGone(err)
		}
		if busy {
			if err := local.Pause(ctx, mergeTick); err != nil {
				return err
			}
		}
	}
	return nil
}

// mergeStep starts the merge, unless started, or sees to its end; busy is true as
// long as it is under way.
func (p *Provider) mergeStep(ctx context.Context, d *directory, started *bool) (busy bool, err error) {
	held, err := d.Lock(ctx)
	if errors.Is(err, providers.ErrNotFound) {
		return false, nil // destroyed
	}
	if err != nil {
		return false, err
	}
	defer held.Close()
	proc, err := p.find(ctx, d.Path)
	if err != nil || proc == nil {
		return false, err
	}
	defer proc.Close()
	fail := func(err error) (bool, error) {
		// A machine that ends meanwhile keeps its overlays as they are.
		if ended, _ := proc.WaitFor(ctx, mergeTick); ended {
			return false, nil
		}
		return false, err
	}
	ctx, cancel := context.WithTimeout(ctx, monitorTimeout)
	defer cancel()
	c, err := qmp.Dial(ctx, d.monitor)
	if err != nil {
		return fail(err)
	}
	defer c.Close()
	own, err := d.settle(ctx, c)
	if errors.Is(err, errMerging) {
		return true, nil
	}
	if err != nil {
		return fail(err)
	}
	if *started {
		return false, nil
	}
	*started = true
	base, top, ok, err := d.Mergeable(own)
	if err != nil || !ok {
		return false, err
	}
	active := own[len(own)-1]
	err = c.Execute(ctx, "block-commit", map[string]any{
		"job-id": fmt.Sprintf("%s%d-%d", mergePrefix, base, top), "device": overlay(d.Path, active).Node,
		"top-node": overlay(d.Path, top).Node, "base-node": overlay(d.Path, base).Node,
		"backing-file": "", // what the header of the active one is to say
		"auto-dismiss": false,
	}, nil)
	if err != nil {
		return fail(err)
	}
	return true, nil
}

// errMerging says that overlays are being merged.
var errMerging = errors.New("its overlays are being merged")

// settleMerges brings merges to their end that have ended in QEMU: the overlays
// that are in another one now are removed. A merge that is under way, of a
// process that was killed, is errMerging.
func (d *directory) settleMerges(ctx context.Context, c *qmp.Client) error {
	var jobs []struct {
		ID     string `json:"id"`
		Status string `json:"status"`
		Error  string `json:"error"`
	}
	if err := c.Execute(ctx, "query-jobs", nil, &jobs); err != nil {
		return err
	}
	for _, j := range jobs {
		base, top, ok := merged(j.ID)
		if !ok {
			continue
		}
		if j.Status != "concluded" {
			return errMerging
		}
		if j.Error == "" {
			own, err := local.Overlays(d.Path)
			if err != nil {
				return err
			}
			// From below: what is left hides nothing newer.
			for _, n := range own {
				if n > base && n <= top {
					if err := d.drop(ctx, c, n); err != nil {
						return err
					}
				}
			}
		}
		if err := c.Execute(ctx, "job-dismiss", map[string]string{"id": j.ID}, nil); err != nil {
			return err
		}
		if j.Error != "" {
			return fmt.Errorf("merging its overlays: %s", j.Error)
		}
	}
	return nil
}

// merged reads the name of a merging job.
func merged(id string) (base, top int, ok bool) {
	rest, ok := strings.CutPrefix(id, mergePrefix)
	if !ok {
		return 0, 0, false
	}
	b, t, ok := strings.Cut(rest, "-")
	base, errB := strconv.Atoi(b)
	top, errT := strconv.Atoi(t)
	return base, top, ok && errB == nil && errT == nil
}
