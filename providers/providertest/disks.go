// SPDX-License-Identifier: Apache-2.0

package providertest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/providers"
)

// write has the guest write n sectors of its disk.
func (b *bench) write(g lab.Generation, n int) {
	b.Helper()
	for range n {
		before := b.echoes(g)
		b.press(g, KeyWrite)
		b.follow(g, func(log []byte) bool {
			if bytes.ContainsRune(log, '!') {
				b.Fatalf("the guest could not write to its disk: %q", log)
			}
			return bytes.Count(log, []byte(KeyWrite)) > before
		})
	}
}

// echoes counts the echoes of KeyWrite on the console so far.
func (b *bench) echoes(g lab.Generation) int {
	n := 0
	b.follow(g, func(log []byte) bool { n = bytes.Count(log, []byte(KeyWrite)); return true })
	return n
}

// sectors returns how many sectors beside the first the guest has written,
// going by what they say.
func (b *bench) sectors(disk []byte) int {
	b.Helper()
	n := 0
	for at := 512; at+512 <= len(disk); at += 512 {
		sector := disk[at : at+512]
		switch {
		case bytes.Count(sector, []byte{0}) == 512:
		case !bytes.Contains(sector, []byte(Banner)) || int(sector[sectorMark]) != n+3:
			b.Fatalf("sector %d: % x", at/512, sector)
		default:
			n++
		}
	}
	return n
}

func contents(paths []string) (all [][]byte, err error) {
	for _, path := range paths {
		c, err := os.ReadFile(path)
		if err != nil {
			return nil, err
		}
		all = append(all, c)
	}
	return all, nil
}

func testStandby(b *bench) {
	one, two := b.spec(gen("web", 1)), b.spec(gen("web", 2))
	b.up(one)
	b.up(two) // the same hardware address
	if m, n := b.state(one.Generation, providers.StateRunning), b.state(two.Generation, providers.StateRunning); m.Generation == n.Generation {
		b.Fatalf("one generation for two: %+v, %+v", m, n)
	}
	if p, ok := b.Provider.(providers.Cabled); ok {
		for _, g := range []lab.Generation{one.Generation, two.Generation} {
			c, err := p.DialNIC(b.ctx(), g)
			b.ok("DialNIC", err)
			defer c.Close() // both are plugged in at a time
		}
	}
	b.press(one.Generation, "1")
	b.press(two.Generation, "2")
	b.follow(one.Generation, func(log []byte) bool { return bytes.HasSuffix(log, []byte("1")) })
	b.follow(two.Generation, func(log []byte) bool { return bytes.HasSuffix(log, []byte("2")) })
	b.ok("Stop", b.Provider.Stop(b.ctx(), one.Generation, b.Patience))
	b.ok("Destroy", b.Provider.Destroy(b.ctx(), one.Generation))
	b.state(two.Generation, providers.StateRunning)
	b.press(two.Generation, "3")
	b.follow(two.Generation, func(log []byte) bool { return bytes.HasSuffix(log, []byte("3")) })
}

func testBirth(b *bench) {
	p, ok := b.Provider.(providers.Freezer)
	other, _ := b.Other.(providers.Freezer)
	if !ok {
		b.Skip("the provider does not freeze disks")
	}
	g := gen("web", 1)
	b.is("Freeze", p.Freeze(b.ctx(), g), providers.ErrNotFound)
	_, err := p.Snapshot(b.ctx(), g)
	b.is("Snapshot", err, providers.ErrNotFound)
	ended, cancel := context.WithCancel(context.Background())
	cancel()

	b.up(b.spec(g))
	b.is("Freeze", p.Freeze(ended, g), context.Canceled)
	b.write(g, 2)
	if m := b.inspect(g); m.Written != 0 || m.Disk == 0 {
		b.Errorf("before its birth: %+v", m)
	}
	b.ok("Freeze", p.Freeze(b.ctx(), g))
	if m := b.state(g, providers.StateRunning); m.Written != 0 {
		b.Errorf("right after its birth: %+v", m)
	}
	b.write(g, 1)
	written := b.inspect(g).Written
	if written <= 0 {
		b.Error("what was written since the birth is not seen")
	}
	var paths []string
	var frozen [][]byte
	same := func(when string) {
		b.Helper()
		b.ok("Freeze again", other.Freeze(b.ctx(), g))
		r, ok := b.Other.(providers.DiskReader)
		if !ok {
			return
		}
		d, err := r.OpenDisk(b.ctx(), g)
		b.ok("OpenDisk", err)
		if d.Birth != 2 { // on the image
			b.Fatalf("%s %d layers are the birth: %+v", when, d.Birth, d.Layers)
		}
		paths = []string{d.Layers[1].Path}
		now, err := contents(paths)
		b.ok("reading the birth", err)
		b.ok("Release", d.Release(b.ctx()))
		if frozen == nil {
			frozen = now
		} else if !slices.EqualFunc(now, frozen, bytes.Equal) {
			b.Errorf("%s the birth has changed", when)
		}
	}
	same("after a write")
	b.ok("Stop", b.Provider.Stop(b.ctx(), g, b.Patience))
	if m := b.inspect(g); m.Written < written {
		b.Errorf("stopped, it has written %s, before %s", m.Written, written)
	}
	same("stopped")
	b.ok("Start", b.Provider.Start(b.ctx(), g))
	b.booted(g, 1)
	b.write(g, 3)
	same("started again")
	b.ok("Destroy", b.Provider.Destroy(b.ctx(), g))
	for _, path := range paths {
		if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
			b.Errorf("the birth of what was destroyed: %v", err)
		}
	}

	// What never ran has a birth too, and runs afterwards.
	two := gen("web", 2)
	b.ok("Create", b.Provider.Create(b.ctx(), b.spec(two)))
	ctx := b.ctx()
	b.crowd("Freeze", func(p providers.Provider) error {
		return p.(providers.Freezer).Freeze(ctx, two)
	})
	b.up(b.spec(two))
	b.write(two, 1)
}

func testSnapshots(b *bench) {
	p, ok := b.Provider.(providers.Freezer)
	if !ok {
		b.Skip("the provider does not freeze disks")
	}
	g := gen("bake", 1)
	b.up(b.spec(g))
	var layers []string
	snapshot := func() {
		b.Helper()
		f, err := p.Snapshot(b.ctx(), g)
		b.ok("Snapshot", err)
		if len(f.Layers) != 1 || f.Size != b.Image.Size {
			b.Fatalf("a snapshot: %+v", f)
		}
		layers = append(layers, f.Layers...)
	}
	for range 3 {
		b.write(g, 1)
		snapshot()
	}
	snapshot() // nothing was written: a layer all the same
	b.ok("Stop", b.Provider.Stop(b.ctx(), g, b.Patience))
	snapshot()
	if sorted := slices.Compact(slices.Sorted(slices.Values(layers))); len(sorted) != len(layers) {
		b.Fatalf("two snapshots are one: %q", layers)
	}
	before, err := contents(layers)
	b.ok("reading layers", err)

	// The layers outlive the machine as links, and two machines are born of them
	// while a third still has them.
	image := b.Image
	dir := b.TempDir()
	for i, layer := range layers[:3] {
		link := filepath.Join(dir, fmt.Sprint(i))
		b.ok("linking", os.Link(layer, link))
		image.Layers = append(image.Layers, link)
	}
	for n := range 2 {
		spec := b.spec(gen("web", n+1))
		spec.Image = image
		b.up(spec)
		if r, ok := b.Provider.(providers.DiskReader); ok {
			d, err := r.OpenDisk(b.ctx(), spec.Generation)
			b.ok("OpenDisk", err)
			if got := b.sectors(b.ReadDisk(b.T, d.Layers)); got != 3 {
				b.Errorf("born with %d sectors, baked were 3", got)
			}
			b.ok("Release", d.Release(b.ctx()))
		}
		b.write(spec.Generation, 1)
	}
	b.ok("Start", b.Provider.Start(b.ctx(), g))
	b.booted(g, 1)
	b.write(g, 1)
	after, err := contents(layers)
	b.ok("reading layers", err)
	if !slices.EqualFunc(before, after, bytes.Equal) {
		b.Error("a frozen layer has changed")
	}
	b.ok("Destroy", b.Provider.Destroy(b.ctx(), g))
	if _, err := contents(image.Layers); err != nil {
		b.Error(err)
	}
}

// openDisk opens the disk and checks how many sectors the birth and all of it
// have.
func (b *bench) openDisk(p providers.Provider, g lab.Generation, birth, all int) providers.Disk {
	b.Helper()
	d, err := p.(providers.DiskReader).OpenDisk(b.ctx(), g)
	b.ok("OpenDisk", err)
	if d.Birth == 0 != (birth < 0) || d.Birth > len(d.Layers) {
		b.Fatalf("%d of %d layers are the birth", d.Birth, len(d.Layers))
	}
	if birth >= 0 {
		if got := b.sectors(b.ReadDisk(b.T, d.Layers[:d.Birth])); got != birth {
			b.Errorf("the birth has %d sectors, want %d", got, birth)
		}
	}
	b.wantSectors(d, all)
	return d
}

func (b *bench) wantSectors(d providers.Disk, want int) {
	b.Helper()
	if got := b.sectors(b.ReadDisk(b.T, d.Layers)); got != want {
		b.Errorf("the disk has %d sectors, want %d", got, want)
	}
}

func testOpenDisk(b *bench) {
	r, ok := b.Provider.(providers.DiskReader)
	if !ok {
		b.Skip("the provider's disks cannot be read")
	}
	g := gen("web", 1)
	_, err := r.OpenDisk(b.ctx(), g)
	b.is("OpenDisk", err, providers.ErrNotFound)
	b.up(b.spec(g))
	b.write(g, 1)
	d := b.openDisk(b.Provider, g, -1, 1)
	b.write(g, 1)
	b.wantSectors(d, 1)
	b.ok("Release", d.Release(b.ctx()))
	b.ok("Freeze", b.Provider.(providers.Freezer).Freeze(b.ctx(), g))
	most := 0
	var frozen [][]byte
	same := func(d providers.Disk) {
		b.Helper()
		var birth []string
		for _, l := range d.Layers[1:d.Birth] { // above the image
			birth = append(birth, l.Path)
		}
		now, err := contents(birth)
		b.ok("reading the birth", err)
		if frozen == nil {
			frozen = now
		} else if !slices.EqualFunc(now, frozen, bytes.Equal) {
			b.Error("the birth has changed")
		}
	}
	for n := 2; n < 7; n++ {
		p := b.Provider
		if n%2 == 1 {
			p = b.Other
		}
		d := b.openDisk(p, g, 2, n)
		b.write(g, 1)
		b.wantSectors(d, n) // not what was written meanwhile
		same(d)
		short, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
		_, err := b.Other.(providers.DiskReader).OpenDisk(short, g)
		b.is("OpenDisk of what is open", err, context.DeadlineExceeded)
		cancel()
		b.ok("Release", d.Release(b.ctx()))
		most = max(most, len(d.Layers)-d.Birth)
	}
	if most > 2 {
		b.Errorf("%d layers above the birth: what was written meanwhile is not merged", most)
	}
	b.state(g, providers.StateRunning)

	// The machine is stopped and started while its disk is open.
	d = b.openDisk(b.Provider, g, 2, 7)
	b.write(g, 1)
	b.ok("Stop", b.Other.Stop(b.ctx(), g, b.Patience))
	b.ok("Start", b.Other.Start(b.ctx(), g))
	b.booted(g, 1)
	b.wantSectors(d, 7)
	b.ok("Release", d.Release(b.ctx()))
	for range 3 {
		d = b.openDisk(b.Provider, g, 2, 8)
		b.ok("Release", d.Release(b.ctx()))
	}
	if got := len(d.Layers) - d.Birth; got > 2 {
		b.Errorf("%d layers above the birth", got)
	}
	// It is destroyed while its disk is open.
	d = b.openDisk(b.Provider, g, 2, 8)
	same(d)
	b.ok("Destroy", b.Other.Destroy(b.ctx(), g))
	b.ok("Release", d.Release(b.ctx()))
}

func testOpenDiskOfStopped(b *bench) {
	if _, ok := b.Provider.(providers.DiskReader); !ok {
		b.Skip("the provider's disks cannot be read")
	}
	g := gen("web", 1)
	b.ok("Create", b.Provider.Create(b.ctx(), b.spec(g)))
	d := b.openDisk(b.Provider, g, -1, 0)
	b.ok("Start", b.Other.Start(b.ctx(), g))
	b.booted(g, 1)
	b.write(g, 1)
	b.wantSectors(d, 0)
	b.ok("Release", d.Release(b.ctx()))
	b.ok("Freeze", b.Provider.(providers.Freezer).Freeze(b.ctx(), g))
	b.write(g, 2)
	b.ok("Stop", b.Provider.Stop(b.ctx(), g, b.Patience))
	layers := 0
	for range 3 {
		d = b.openDisk(b.Provider, g, 1, 3)
		b.ok("Release", d.Release(b.ctx()))
		if layers != 0 && len(d.Layers) != layers {
			b.Errorf("%d layers, before %d", len(d.Layers), layers)
		}
		layers = len(d.Layers)
	}
	b.ok("Start", b.Provider.Start(b.ctx(), g))
	b.booted(g, 1)
	d = b.openDisk(b.Provider, g, 1, 3)
	b.ok("Release", d.Release(b.ctx()))
}
