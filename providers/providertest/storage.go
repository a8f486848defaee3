// SPDX-License-Identifier: Apache-2.0

package providertest

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/providers"
	"github.com/labfile/lab/providers/qcow2"
)

// volume makes an empty volume.
func (b *bench) volume() string {
	b.Helper()
	path := filepath.Join(b.TempDir(), "volume, one.qcow2")
	b.ok("making a volume", qcow2.Create(path, lab.MiB))
	return path
}

func testVolumes(b *bench) {
	data, shared := b.volume(), b.volume()
	spec := func(number int, readOnly bool) providers.Spec {
		s := b.spec(gen("db", number))
		s.Volumes = []providers.Volume{
			{Name: "data", Path: data, ReadOnly: readOnly}, {Name: "shared", Path: shared, ReadOnly: true},
		}
		return s
	}
	if err := b.Provider.Create(b.ctx(), spec(1, false)); errors.Is(err, providers.ErrIncapable) {
		b.Skip(err)
	}
	b.up(spec(1, false))
	b.has(gen("db", 1), spec(1, false).Volumes...)
	for number, readOnly := range map[int]bool{2: false, 3: true} {
		b.ok("Create", b.Other.Create(b.ctx(), spec(number, readOnly)))
		err := b.Other.Start(b.ctx(), gen("db", number))
		b.is("Start with a volume that is in use", err, providers.ErrInUse)
		if !strings.Contains(err.Error(), `volume "data" (`+data+") is attached to") {
			b.Errorf("the error does not name the volume: %v", err)
		}
		b.state(gen("db", number), providers.StateStopped)
	}
	b.ok("Stop", b.Provider.Stop(b.ctx(), gen("db", 1), b.Patience))
	b.ok("Start", b.Provider.Start(b.ctx(), gen("db", 3)))
	b.up(spec(4, true)) // two readers
	b.is("Start of a writer beside readers", b.Provider.Start(b.ctx(), gen("db", 2)), providers.ErrInUse)
	for _, n := range []int{3, 4} {
		b.ok("Destroy", b.Provider.Destroy(b.ctx(), gen("db", n)))
	}
	b.ok("Start", b.Provider.Start(b.ctx(), gen("db", 2)))
	b.booted(gen("db", 2), 1)
	if c, ok := b.Provider.(providers.VolumeChanger); ok {
		b.is("SetVolumes", c.SetVolumes(b.ctx(), gen("db", 9), nil), providers.ErrNotFound)
		b.ok("Stop", b.Provider.Stop(b.ctx(), gen("db", 2), b.Patience))
		// A snapshot: what was written to lies below now, and others may read it.
		given := []providers.Volume{{Name: "data", Path: b.volume(), Layers: []string{data}}}
		b.ok("SetVolumes", c.SetVolumes(b.ctx(), gen("db", 2), given))
		b.ok("Start", b.Other.Start(b.ctx(), gen("db", 2)))
		b.booted(gen("db", 2), 1)
		b.has(gen("db", 2), given...)
		b.up(spec(5, true))
		b.ok("Create", b.Provider.Create(b.ctx(), spec(6, false)))
		b.is("Start of a writer to what lies below", b.Provider.Start(b.ctx(), gen("db", 6)), providers.ErrInUse)
		for _, n := range []int{5, 6} {
			b.ok("Destroy", b.Provider.Destroy(b.ctx(), gen("db", n)))
		}
	}
	if p, ok := b.Provider.(providers.VolumePusher); ok {
		b.push(p, gen("db", 2), spec)
	}
	b.ok("Destroy", b.Provider.Destroy(b.ctx(), gen("db", 2)))
	for _, path := range []string{data, shared} {
		if _, err := os.Stat(path); err != nil {
			b.Errorf("after Destroy: %v", err)
		}
	}
}

// has checks which volumes a machine says it has.
func (b *bench) has(g lab.Generation, want ...providers.Volume) {
	b.Helper()
	same := func(v, w providers.Volume) bool {
		return v.Name == w.Name && v.Path == w.Path && v.ReadOnly == w.ReadOnly && slices.Equal(v.Layers, w.Layers)
	}
	if got := b.inspect(g).Volumes; !slices.EqualFunc(got, want, same) {
		b.Errorf("%s has the volumes %+v, want %+v", g, got, want)
	}
}

// push takes snapshots of a volume while db@2, which runs, writes to it.
func (b *bench) push(p providers.VolumePusher, g lab.Generation, spec func(int, bool) providers.Spec) {
	b.Helper()
	below := []string{b.volume(), b.volume()}
	attached := providers.Volume{Name: "data", Path: below[1], Layers: below[:1]}
	b.ok("Stop", b.Provider.Stop(b.ctx(), g, b.Patience))
	b.is("PushVolume on a machine that is stopped", p.PushVolume(b.ctx(), g, attached), providers.ErrNotRunning)
	b.is("PushVolume on none", p.PushVolume(b.ctx(), gen("db", 9), attached), providers.ErrNotFound)
	changer, ok := b.Provider.(providers.VolumeChanger)
	if !ok {
		b.Fatal("a provider that pushes volumes changes them")
	}
	b.ok("SetVolumes", changer.SetVolumes(b.ctx(), g, []providers.Volume{attached}))
	b.ok("Start", b.Provider.Start(b.ctx(), g))
	b.booted(g, 1)
	other := attached
	other.Name = "other"
	b.is("PushVolume of what it does not have", p.PushVolume(b.ctx(), g, other), providers.ErrNotFound)
	for range 2 {
		next := b.volume()
		attached.Layers, attached.Path = append(slices.Clone(attached.Layers), attached.Path), next
		b.ok("PushVolume", p.PushVolume(b.ctx(), g, attached))
		b.state(g, providers.StateRunning)
		b.has(g, attached)
	}
	// Others read what it wrote to before, and cannot write to that.
	reader, writer := spec(7, true), spec(8, false)
	last := len(attached.Layers) - 1
	reader.Volumes = []providers.Volume{{Name: "data", Path: attached.Layers[last], Layers: attached.Layers[:last], ReadOnly: true}}
	writer.Volumes = []providers.Volume{{Name: "data", Path: attached.Layers[last], Layers: attached.Layers[:last]}}
	b.up(reader)
	b.ok("Create", b.Provider.Create(b.ctx(), writer))
	b.is("Start of a writer to what lies below", b.Provider.Start(b.ctx(), writer.Generation), providers.ErrInUse)
	writer.Generation.Number, writer.Volumes[0] = 10, attached
	b.ok("Create", b.Provider.Create(b.ctx(), writer))
	b.is("Start of a second writer", b.Other.Start(b.ctx(), writer.Generation), providers.ErrInUse)
	for _, n := range []int{7, 8, 10} {
		b.ok("Destroy", b.Provider.Destroy(b.ctx(), gen("db", n)))
	}
	// It starts again on what it was given last.
	b.ok("Stop", b.Provider.Stop(b.ctx(), g, b.Patience))
	b.ok("Start", b.Provider.Start(b.ctx(), g))
	b.booted(g, 1)
	for _, path := range below {
		if _, err := os.Stat(path); err != nil { // they stay the caller's
			b.Error(err)
		}
	}
}

func testMounts(b *bench) {
	spec := b.spec(gen("web", 1))
	spec.Mounts = []providers.Mount{{Tag: "src", Path: b.TempDir()}, {Tag: "out", Path: b.TempDir(), Writable: true}}
	if err := b.Provider.Create(b.ctx(), spec); errors.Is(err, providers.ErrIncapable) {
		b.Skip(err)
	}
	b.up(spec)
}
