// SPDX-License-Identifier: Apache-2.0

package providertest

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/providers"
	"github.com/labfile/lab/providers/qcow2"
)

// volume makes an empty volume, where the provider wants it.
func (b *bench) volume() string {
	b.Helper()
	if files := b.files(); files != nil {
		name := fmt.Sprintf("data@%s.qcow2", strings.ToLower(rand.Text()[:8]))
		b.make(files, name)
		return files.Path(name)
	}
	path := filepath.Join(b.TempDir(), "volume, one.qcow2")
	b.ok("making a volume", qcow2.Create(path, lab.MiB))
	return path
}

// files is where the provider keeps files of volumes; nil if that is anywhere.
func (b *bench) files() providers.VolumeFiles {
	b.Helper()
	k, ok := b.Provider.(providers.VolumeKeeper)
	if !ok {
		return nil
	}
	files, err := k.VolumeFiles(b.ctx(), testLab)
	b.ok("VolumeFiles", err)
	return files
}

// make makes an empty file of a volume, for as long as the test.
func (b *bench) make(files providers.VolumeFiles, name string) {
	b.Helper()
	b.Cleanup(func() { b.ok("Remove", files.Remove(b.ctx(), name)) })
	b.ok("Make", files.Make(b.ctx(), name, lab.MiB))
}

// kept checks that the files of volumes are there.
func (b *bench) kept(paths ...string) {
	b.Helper()
	if files := b.files(); files != nil {
		names, err := files.List(b.ctx())
		b.ok("List", err)
		for _, path := range paths {
			if !slices.ContainsFunc(names, func(name string) bool { return files.Path(name) == path }) {
				b.Errorf("%s is gone", path)
			}
		}
		return
	}
	for _, path := range paths {
		if _, err := os.Stat(path); err != nil {
			b.Error(err)
		}
	}
}

// testVolumeFiles has a provider work on files that no machine has.
func testVolumeFiles(b *bench) {
	files := b.files()
	if files == nil {
		b.Skip("volumes lie on files of this host")
	}
	dir := b.TempDir()
	// full makes a file with 64 KiB of each of the bytes at 64 KiB times the byte.
	full := func(name string, bytes ...int) {
		from := filepath.Join(dir, "from.qcow2")
		b.ok("making a file", qcow2.Create(from, lab.MiB))
		for _, n := range bytes {
			out, err := exec.Command("qemu-io", "-c", fmt.Sprintf("write -P %d %dk 64k", n, 64*n), from).CombinedOutput()
			if err != nil {
				b.Fatalf("qemu-io: %v: %s", err, out)
			}
		}
		b.Cleanup(func() { b.ok("Remove", files.Remove(b.ctx(), name)) })
		b.ok("Put", files.Put(b.ctx(), name, from))
		os.Remove(from)
	}
	holds := func(chain []string, bytes ...int) {
		b.Helper()
		to, err := os.MkdirTemp(dir, "")
		b.ok("MkdirTemp", err)
		paths, err := files.Open(b.ctx(), chain, to)
		b.ok("Open", err)
		var layers []providers.Layer
		for _, path := range paths {
			layers = append(layers, providers.Layer{Path: path, Format: "qcow2"})
		}
		disk := ReadDisk(b.T, layers)
		for n := range len(disk) >> 16 {
			want := byte(0)
			if slices.Contains(bytes, n) {
				want = byte(n)
			}
			if got := disk[n<<16]; got != want || disk[(n+1)<<16-1] != want {
				b.Errorf("%v holds %d at %d KiB", chain, got, n*64)
			}
		}
	}
	full("db@1.qcow2", 1, 2)
	full("db@2.qcow2", 3)
	full("db@3.qcow2", 4)
	b.make(files, "db@4.qcow2")
	b.make(files, "other@1.qcow2")
	names, err := files.List(b.ctx())
	b.ok("List", err)
	slices.Sort(names)
	if want := []string{"db@1.qcow2", "db@2.qcow2", "db@3.qcow2", "db@4.qcow2", "other@1.qcow2"}; !slices.Equal(names, want) {
		b.Errorf("the files are %v, want %v", names, want)
	}
	holds([]string{"db@1.qcow2", "db@2.qcow2", "db@3.qcow2", "db@4.qcow2"}, 1, 2, 3, 4)
	length, takes, err := files.Usage(b.ctx(), "db@4.qcow2")
	if b.ok("Usage", err); length > qcow2.EmptySize || takes == 0 {
		b.Errorf("an empty file has %d bytes and takes %d", length, takes)
	}
	if length, takes, err := files.Usage(b.ctx(), "db@1.qcow2"); err != nil || length <= qcow2.EmptySize || takes < 128*lab.KiB {
		b.Errorf("a file that is not empty has %d bytes and takes %d, %v", length, takes, err)
	}

	// A copy stands alone.
	b.Cleanup(func() { b.ok("Remove", files.Remove(b.ctx(), "copy@1.qcow2")) })
	b.ok("Flatten", files.Flatten(b.ctx(), []string{"db@1.qcow2", "db@2.qcow2"}, lab.MiB, "copy@1.qcow2"))
	holds([]string{"copy@1.qcow2"}, 1, 2, 3)

	// A machine may read what lies below of what is joined.
	spec := b.spec(gen("db", 1))
	spec.Volumes = []providers.Volume{{Name: "data", Path: files.Path("db@1.qcow2"), ReadOnly: true}}
	b.up(spec)
	b.ok("Commit", files.Commit(b.ctx(), []string{"db@1.qcow2", "db@2.qcow2", "db@3.qcow2"}))
	holds([]string{"db@2.qcow2"}, 3, 4)
	holds([]string{"db@1.qcow2"}, 1, 2)
	b.state(spec.Generation, providers.StateRunning)
	// What is in use is not joined, and not harmed.
	if err := files.Commit(b.ctx(), []string{"db@1.qcow2", "db@2.qcow2"}); err == nil {
		b.Error("a file that a machine reads was written to")
	}
	holds([]string{"db@1.qcow2"}, 1, 2)
	b.ok("Destroy", b.Provider.Destroy(b.ctx(), spec.Generation))
	for _, chain := range [][]string{{"db@9.qcow2", "db@4.qcow2"}, {"db@4.qcow2", "db@9.qcow2"}} {
		if err := files.Commit(b.ctx(), chain); err == nil {
			b.Errorf("%v was joined", chain)
		}
	}

	// What was discarded takes no space by being joined, and a file may be larger than the one
	// that it lies on.
	const size = 64 * lab.MiB
	for name, c := range map[string]struct {
		size lab.Bytes
		do   string
	}{
		"big@1.qcow2": {size / 2, "write -P 1 0 1M"}, "big@2.qcow2": {size, "write -z 1M 32M"},
	} {
		from := filepath.Join(dir, "from.qcow2")
		b.ok("making a file", qcow2.Create(from, c.size))
		if out, err := exec.Command("qemu-io", "-c", c.do, from).CombinedOutput(); err != nil {
			b.Fatalf("qemu-io: %v: %s", err, out)
		}
		b.Cleanup(func() { b.ok("Remove", files.Remove(b.ctx(), name)) })
		b.ok("Put", files.Put(b.ctx(), name, from))
		os.Remove(from)
	}
	b.Cleanup(func() { b.ok("Remove", files.Remove(b.ctx(), "large@1.qcow2")) })
	b.ok("Flatten", files.Flatten(b.ctx(), []string{"big@1.qcow2", "big@2.qcow2"}, size, "large@1.qcow2"))
	b.ok("Commit", files.Commit(b.ctx(), []string{"big@1.qcow2", "big@2.qcow2"}))
	for _, name := range []string{"big@1.qcow2", "large@1.qcow2"} {
		if _, takes, err := files.Usage(b.ctx(), name); err != nil || takes > 8*lab.MiB {
			b.Errorf("%s takes %s, %v", name, takes, err)
		}
		paths, err := files.Open(b.ctx(), []string{name}, b.TempDir())
		b.ok("Open", err)
		disk := ReadDisk(b.T, []providers.Layer{{Path: paths[0], Format: "qcow2"}})
		if lab.Bytes(len(disk)) != size || disk[1<<20-1] != 1 || slices.ContainsFunc(disk[1<<20:], func(c byte) bool { return c != 0 }) {
			b.Errorf("%s has %d bytes, or others than it should", name, len(disk))
		}
	}
	for _, name := range []string{"big@1.qcow2", "big@2.qcow2", "large@1.qcow2"} {
		b.ok("Remove", files.Remove(b.ctx(), name))
	}

	b.ok("Remove", files.Remove(b.ctx(), "db@1.qcow2"))
	b.ok("Remove what is gone", files.Remove(b.ctx(), "db@1.qcow2"))
	_, _, err = files.Usage(b.ctx(), "db@1.qcow2")
	b.is("Usage of what is gone", err, fs.ErrNotExist)
	if _, err := files.Open(b.ctx(), []string{"db@1.qcow2"}, b.TempDir()); err == nil {
		b.Error("a file that is gone was opened")
	}
	// Nothing is left of how it was done.
	names, err = files.List(b.ctx())
	b.ok("List", err)
	slices.Sort(names)
	if want := []string{"copy@1.qcow2", "db@2.qcow2", "db@3.qcow2", "db@4.qcow2", "other@1.qcow2"}; !slices.Equal(names, want) {
		b.Errorf("the files are %v, want %v", names, want)
	}
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
	b.kept(data, shared)
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
	b.kept(below...) // they stay the caller's
}

func testMounts(b *bench) {
	spec := b.spec(gen("web", 1))
	spec.Mounts = []providers.Mount{{Tag: "src", Path: b.TempDir()}, {Tag: "out", Path: b.TempDir(), Writable: true}}
	if err := b.Provider.Create(b.ctx(), spec); errors.Is(err, providers.ErrIncapable) {
		b.Skip(err)
	}
	b.up(spec)
}
