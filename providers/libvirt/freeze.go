// SPDX-License-Identifier: Apache-2.0

package libvirt

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	golibvirt "github.com/digitalocean/go-libvirt"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/providers"
	"github.com/labfile/lab/providers/local"
	"github.com/labfile/lab/providers/qcow2"
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

// directory is a generation's directory whose overlays the caller may change, its
// domain and the overlays.
type directory struct {
	*local.Directory
	dom      domain
	overlays overlays
	// redefine tells libvirt the pile of overlays that there is now, so that a start by
	// virsh finds the disk whole.
	redefine func(context.Context) error
}

// overlays are the files of a generation's disk, on the daemon's host.
type overlays interface {
	list(ctx context.Context) ([]int, error) // ascending; there is always one
	path(n int) string
	number(path string) (n int, ok bool)
	add(ctx context.Context, n int, size lab.Bytes) error // it comes into being whole
	remove(ctx context.Context, n int) error              // removing what is absent succeeds
	// forget removes from the header what libvirt wrote there when it merged others
	// into the file: what lies below.
	forget(n int) error
}

// here are the overlays in a directory of this host.
type here string

func (dir here) list(context.Context) ([]int, error) { return local.Overlays(string(dir)) }
func (dir here) path(n int) string                   { return local.OverlayPath(string(dir), n) }
func (dir here) number(path string) (int, bool)      { return local.OverlayOf(string(dir), path) }
func (dir here) forget(n int) error                  { return qcow2.ForgetBacking(dir.path(n)) }

func (dir here) add(_ context.Context, n int, size lab.Bytes) error {
	return local.AddOverlay(string(dir), n, size)
}

func (dir here) remove(_ context.Context, n int) error {
	return local.IgnoreGone(os.Remove(dir.path(n)))
}

// open opens the generation's directory and finds its domain.
func (p *Provider) open(ctx context.Context, g lab.Generation) (d *local.Directory, dom domain, err error) {
	if err := p.enter(ctx, g); err != nil {
		return nil, dom, err
	}
	d, err = local.Open(ctx, p.dir(g), func() (def local.Definition, ok bool, err error) {
		if dom, ok, err = p.find(ctx, g); err == nil && ok {
			def, err = dom.definition()
		}
		return def, ok, err
	})
	return d, dom, err
}

func (p *Provider) openDirectory(ctx context.Context, g lab.Generation) (*directory, error) {
	d, dom, err := p.open(ctx, g)
	if err != nil {
		return nil, err
	}
	redefine := func(ctx context.Context) error { return p.redefine(ctx, d) }
	return &directory{d, dom, here(d.Path), redefine}, nil
}

// monitorTimeout bounds what a running QEMU is asked for by way of libvirt.
const monitorTimeout = 10 * time.Second

// push lays a fresh overlay on top of the disk, under the machine if it runs, and
// returns those below it. The caller has the generation's lock.
func (p *Provider) push(ctx context.Context, d *directory) ([]int, error) {
	running, err := p.runs(ctx, d)
	if err != nil {
		return nil, err
	}
	var own []int
	if running {
		for {
			own, err = p.pushUnder(ctx, d)
			if !errors.Is(err, errMerging) {
				break
			}
			if err := pause(ctx, mergeTick); err != nil {
				return nil, err
			}
		}
	} else if own, err = d.overlays.list(ctx); err == nil {
		err = d.overlays.add(ctx, own[len(own)-1]+1, d.Def.Disk)
	}
	if err != nil {
		return nil, err
	}
	for _, n := range own {
		if err := d.overlays.forget(n); err != nil {
			return nil, err
		}
	}
	return own, d.redefine(ctx)
}

// runs reports whether the machine runs.
func (p *Provider) runs(ctx context.Context, d *directory) (bool, error) {
	s, _, err := p.state(ctx, d.dom)
	return err == nil && p.lives(s), err
}

// redefine defines the domain anew, if it is there.
func (p *Provider) redefine(ctx context.Context, d *local.Directory) error {
	dom, ok, err := p.find(ctx, d.Def.Generation())
	if err != nil || !ok {
		return err
	}
	def, err := dom.definition() // its volumes may have changed
	if err != nil {
		return err
	}
	_, err = p.define(ctx, dom.Name, d.Path, def)
	return err
}

// pushUnder is push for a machine that runs.
func (p *Provider) pushUnder(ctx context.Context, d *directory) ([]int, error) {
	ctx, cancel := context.WithTimeout(ctx, monitorTimeout)
	defer cancel()
	own, document, err := p.settle(ctx, d)
	if err != nil {
		return nil, err
	}
	next := own[len(own)-1] + 1
	if err := d.overlays.add(ctx, next, d.Def.Disk); err != nil {
		return nil, err
	}
	if err := p.cover(ctx, d.dom, document, mainDisk, d.overlays.path(next)); err != nil {
		// Refused, the overlay is not in use. Else only the next one to ask will
		// know, and settles it.
		if _, refused := code(err); refused {
			err = errors.Join(err, d.overlays.remove(ctx, next))
		}
		return nil, err
	}
	return own, nil
}

// cover puts a file on top of a disk of a domain that runs, whose live document is given.
func (p *Provider) cover(ctx context.Context, dom domain, document, disk, file string) error {
	text, err := snapshot(document, disk, file)
	if err != nil {
		return err
	}
	return p.link.do(ctx, func(l *golibvirt.Libvirt) error {
		_, err := l.DomainSnapshotCreateXML(dom.Domain, text, uint32(golibvirt.DomainSnapshotCreateDiskOnly|
			golibvirt.DomainSnapshotCreateNoMetadata|golibvirt.DomainSnapshotCreateReuseExt|golibvirt.DomainSnapshotCreateAtomic))
		return err
	})
}

// disk tells whether layers of the machine's disk are being merged, and returns the live
// document.
func (p *Provider) disk(ctx context.Context, d *directory) (merging bool, document string, err error) {
	type state struct {
		job      int32
		document string
	}
	is, err := answer(ctx, p.link, func(l *golibvirt.Libvirt) (s state, err error) {
		if s.job, _, _, _, _, err = l.DomainGetBlockJobInfo(d.dom.Domain, mainDisk, 0); err == nil {
			s.document, err = l.DomainGetXMLDesc(d.dom.Domain, 0)
		}
		return s, err
	})
	return is.job != 0, is.document, err
}

// settle removes what an interrupted change left under a machine that runs, and
// returns the overlays that the machine has and its document.
func (p *Provider) settle(ctx context.Context, d *directory) (own []int, document string, err error) {
	merging, document, err := p.disk(ctx, d)
	if err != nil {
		return nil, "", err
	}
	if merging {
		return nil, "", errMerging
	}
	files, err := chainOf(document)
	if err != nil {
		return nil, "", err
	}
	if own, err = d.overlays.list(ctx); err != nil {
		return nil, "", err
	}
	if _, ok := d.overlays.number(files[0]); !ok {
		return nil, "", fmt.Errorf("the machine writes to %q, which is no overlay of its own", files[0])
	}
	var kept []int
	for _, n := range own { // from below: what is left hides nothing newer
		if slices.Contains(files, d.overlays.path(n)) {
			kept = append(kept, n)
		} else if err := d.overlays.remove(ctx, n); err != nil {
			return nil, "", err
		}
	}
	return kept, document, nil
}

// errMerging says that overlays are being merged.
var errMerging = errors.New("its overlays are being merged")

// mergeTick is how often libvirt is asked whether a merge is done.
const mergeTick = 10 * time.Millisecond

// OpenDisk lays an overlay over what is to be read. Its Release does not remove
// that one again but merges those below it, as in the QEMU provider.
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
		func(ctx context.Context) (bool, error) { return p.runs(ctx, d) },
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

// merge makes one of the overlays between what is frozen and what the machine writes
// to. It does nothing for a machine that does not run. It may be interrupted at any
// point: the pile reads the same all the time.
func (p *Provider) merge(ctx context.Context, d *directory) error {
	busy := true
	for started := false; busy; {
		var err error
		busy, err = p.mergeStep(ctx, d, &started)
		if err != nil {
			return local.IgnoreGone(err)
		}
		if busy {
			if err := pause(ctx, mergeTick); err != nil {
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
	running, err := p.runs(ctx, d)
	if err != nil || !running {
		return false, err
	}
	fail := func(err error) (bool, error) {
		// A machine that ends meanwhile keeps its overlays as they are.
		if running, e := p.runs(context.WithoutCancel(ctx), d); e == nil && !running {
			return false, nil
		}
		return false, err
	}
	limited, cancel := context.WithTimeout(ctx, monitorTimeout)
	defer cancel()
	own, _, err := p.settle(limited, d)
	if errors.Is(err, errMerging) {
		return true, nil
	}
	if err != nil {
		return fail(err)
	}
	if *started {
		return false, d.redefine(ctx)
	}
	*started = true
	base, top, ok, err := d.Mergeable(own)
	if err != nil || !ok {
		return false, err
	}
	err = p.link.do(limited, func(l *golibvirt.Libvirt) error {
		return l.DomainBlockCommit(d.dom.Domain, mainDisk,
			golibvirt.OptString{d.overlays.path(base)}, golibvirt.OptString{d.overlays.path(top)}, 0, 0)
	})
	if err != nil {
		return fail(err)
	}
	return true, nil
}
