// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/volume"
	"github.com/labfile/lab/providers"
)

// scribble makes a volume look written to.
func (b *bench) scribble(l *Lab, name string) {
	b.t.Helper()
	v, err := l.volumes().Get(name)
	if err != nil {
		b.t.Fatal(err)
	}
	f, err := os.OpenFile(b.top(l, v), os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		b.t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.Write(make([]byte, 64<<10)); err != nil {
		b.t.Fatal(err)
	}
}

// top is the file that a volume's writer writes to.
func (b *bench) top(l *Lab, v volume.Volume) string {
	b.t.Helper()
	paths, err := l.volumes().Paths(b.ctx, v, v.Layers)
	if err != nil {
		b.t.Fatal(err)
	}
	return paths[len(paths)-1]
}

func bare(name string, size lab.Bytes) lab.Volume {
	return lab.Volume{Name: name, Size: size, FS: "none"}
}

// wantReader is a machine that writes to a volume and one that reads it.
func (b *bench) wantReader() *lab.Lab {
	db, web := machine("db"), machine("web", "db")
	db.Volumes, web.Volumes = []lab.Volume{bare("data", lab.MiB)}, []lab.Volume{bare("data", lab.MiB)}
	web.Volumes[0].ReadOnly = true
	return b.want(db, web)
}

func (b *bench) volume(l *Lab, name string) VolumeStatus {
	b.t.Helper()
	all, err := l.Volumes(b.ctx)
	if err != nil {
		b.t.Fatal(err)
	}
	for _, v := range all {
		if v.Name == name {
			return v
		}
	}
	b.t.Fatalf("there is no volume %s", name)
	return VolumeStatus{}
}

func TestVolumesOutliveMachines(t *testing.T) {
	b := newBench(t)
	l := b.open()
	db := machine("db")
	db.Volumes = []lab.Volume{bare("data", lab.MiB)}
	w := b.want(db)
	b.up(l, w)
	if v := b.volume(l, "data"); !cmp.Equal(v.InUse, []string{"db@1"}) || v.Size != lab.MiB {
		t.Errorf("%+v", v)
	}
	b.scribble(l, "data")
	if _, err := l.Rebuild(b.ctx, w, UpOptions{}); err != nil {
		t.Fatal(err)
	}
	v := b.volume(l, "data")
	if !cmp.Equal(v.InUse, []string{"db@2"}) || len(v.Snapshots) != 1 || v.Snapshots[0].Why != "before db@2" {
		t.Errorf("%+v", v)
	}

	// What a machine has is left alone.
	for what, err := range map[string]error{
		"restore": func() error { _, err := l.RestoreVolume(b.ctx, "data", 1, Options{}); return err }(),
		"rm":      l.RemoveVolume(b.ctx, "data", 0, Options{}),
	} {
		var busy *VolumeInUseError
		if !errors.As(err, &busy) || !errors.Is(err, providers.ErrInUse) || busy.Error() != "volume data is in use by db@2" {
			t.Errorf("%s: %v", what, err)
		}
	}
	if _, err := l.RestoreVolume(b.ctx, "nothing", 1, Options{}); !errors.Is(err, volume.ErrNotFound) {
		t.Error(err)
	}

	// A snapshot of it can be taken all the same, and copies are made of one.
	b.scribble(l, "data")
	written, _ := l.volumes().Get("data")
	if n, err := l.SnapshotVolume(b.ctx, "data", "mine", Options{}); err != nil || n != 2 {
		t.Errorf("snapshot %d, %v", n, err)
	}
	v = b.volume(l, "data")
	if !cmp.Equal(v.InUse, []string{"db@2"}) || len(v.Snapshots) != 2 || v.Snapshots[1].Why != "mine" || v.Snapshots[1].Automatic {
		t.Errorf("%+v", v)
	}
	if now, _ := l.volumes().Get("data"); !cmp.Equal(now.Snapshots[1].Layers, written.Layers) || len(now.Layers) != len(written.Layers)+1 || now.Pushing {
		t.Errorf("%+v was %+v", now, written)
	}
	if n, err := l.SnapshotVolume(b.ctx, "data", "", Options{}); err != nil || n != 3 {
		t.Errorf("snapshot %d, %v", n, err)
	}
	if err := l.RemoveVolume(b.ctx, "data", 0, Options{}); !errors.Is(err, providers.ErrInUse) {
		t.Error(err)
	}

	// Growing replaces the machine; shrinking and another file system are refused.
	w.Machines[0].Volumes[0].Size = 2 * lab.MiB
	p := b.up(l, w)
	if got := strings.Join(p.Steps[0].Reasons, "; "); got != "size of volume data changed: 1MiB -> 2MiB" {
		t.Error(got)
	}
	if v := b.volume(l, "data"); v.Size != 2*lab.MiB {
		t.Errorf("%+v", v)
	}
	for want, change := range map[string]func(*lab.Volume){
		"volume data has 2MiB and cannot shrink to 1MiB": func(v *lab.Volume) { v.Size = lab.MiB },
		"volume data was made with fs: none":             func(v *lab.Volume) { v.FS, v.Mount = "ext4", "/srv" },
	} {
		other := b.want(machine("db"))
		other.Machines[0].Volumes = []lab.Volume{bare("data", 2*lab.MiB)}
		change(&other.Machines[0].Volumes[0])
		if _, err := l.Plan(b.ctx, other, UpOptions{}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %s", err, want)
		}
	}

	// The lab goes, its data does not, until that is asked for.
	b.scribble(l, "data")
	if err := l.Destroy(b.ctx, Options{}); err != nil {
		t.Fatal(err)
	}
	snapshots := len(b.volume(l, "data").Snapshots)
	if _, err := b.GC(b.ctx, false); err != nil {
		t.Fatal(err)
	}
	if labs, err := b.List(b.ctx); err != nil || len(labs) != 1 || !cmp.Equal(labs[0].Volumes, []string{"data"}) {
		t.Errorf("%+v, %v", labs, err)
	}
	b.up(l, w)
	if v := b.volume(l, "data"); !cmp.Equal(v.InUse, []string{"db@1"}) || len(v.Snapshots) != snapshots+1 {
		t.Errorf("%+v", v)
	}
	if err := l.Destroy(b.ctx, Options{}); err != nil {
		t.Fatal(err)
	}
	b.scribble(l, "data")
	b.up(l, w) // db@1 again, and yet another one
	if v := b.volume(l, "data"); len(v.Snapshots) != snapshots+2 {
		t.Errorf("%+v", v)
	}
	if err := l.Destroy(b.ctx, Options{Volumes: true}); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(b.Dirs.Lab(l.ID())); !errors.Is(err, os.ErrNotExist) {
		t.Error("something is left:", err)
	}
}

// TestDamagedVolumeIsKept destroys a lab with a volume whose description cannot be read:
// its data may be whole.
func TestDamagedVolumeIsKept(t *testing.T) {
	b := newBench(t)
	l := b.open()
	db := machine("db")
	db.Volumes = []lab.Volume{bare("data", lab.MiB)}
	b.up(l, b.want(db))
	v, err := l.volumes().Get("data")
	if err != nil {
		t.Fatal(err)
	}
	data, description := b.top(l, v), filepath.Join(b.Dirs.Volumes(l.ID()), "data.json")
	if err := os.WriteFile(description, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := l.Destroy(b.ctx, Options{}); err != nil {
		t.Fatal(err)
	}
	if _, err := b.GC(b.ctx, false); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{data, description} {
		if _, err := os.Stat(path); err != nil {
			t.Error(err)
		}
	}
	if err := l.Destroy(b.ctx, Options{Volumes: true}); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(b.Dirs.Lab(l.ID())); !errors.Is(err, os.ErrNotExist) {
		t.Error("something is left:", err)
	}
}

func TestVolumesOfOneMachine(t *testing.T) {
	if _, err := exec.LookPath("qemu-img"); err != nil {
		t.Fatal(err)
	}
	b := newBench(t)
	l := b.open()
	w := b.wantReader()

	// A reader beside a writer gets what the volume holds when it starts; the writer
	// goes on.
	b.up(l, w)
	v := b.volume(l, "data")
	if !cmp.Equal(v.InUse, []string{"db@1", "web@1"}) || len(v.Snapshots) != 0 {
		t.Errorf("%+v", v)
	}
	if p := b.up(l, w); p.Changes() {
		t.Errorf("there is still something to do: %+v", p)
	}
	if err := l.CloneVolume(b.ctx, "data", 0, "copy", Options{}); err != nil {
		t.Error(err)
	}
	if v := b.volume(l, "data"); len(v.Snapshots) != 0 {
		t.Errorf("%+v", v)
	}
	if err := l.Destroy(b.ctx, Options{Machines: []lab.Name{"web"}, Volumes: true}); err != nil {
		t.Fatal(err)
	}
	b.volume(l, "data") // db has it still
	if err := l.Destroy(b.ctx, Options{Machines: []lab.Name{"db"}, Volumes: true}); err != nil {
		t.Fatal(err)
	}
	all, err := l.Volumes(b.ctx)
	if err != nil || len(all) != 1 || all[0].Name != "copy" {
		t.Errorf("%+v, %v", all, err)
	}
	records, err := l.History()
	if err != nil {
		t.Fatal(err)
	}
	var told []string
	for _, r := range records {
		if strings.HasPrefix(string(r.Type), "volume.") {
			told = append(told, r.Summary())
		}
	}
	want := []string{
		"volume data: made, 1MiB", "volume data: cloned as copy", "volume data: removed",
	}
	if diff := cmp.Diff(want, told); diff != "" {
		t.Error(diff)
	}
}

// TestVolumesBesideReaders starts and replaces a machine that writes while another one
// reads, and looks at what the reader has.
func TestVolumesBesideReaders(t *testing.T) {
	b := newBench(t)
	l := b.open()
	w := b.wantReader()
	b.up(l, w)
	has := func(machine lab.Name, number int) providers.Volume {
		t.Helper()
		m, err := b.provider.Inspect(b.ctx, lab.Generation{Lab: l.ID(), Machine: machine, Number: number})
		if err != nil || len(m.Volumes) != 1 {
			t.Fatalf("%+v, %v", m, err)
		}
		return m.Volumes[0]
	}
	apart := func(writer, reader providers.Volume) {
		t.Helper()
		if reads := append(slices.Clone(reader.Layers), reader.Path); slices.Contains(reads, writer.Path) {
			t.Errorf("%s is written to and read", writer.Path)
		}
	}
	apart(has("db", 1), has("web", 1))
	b.scribble(l, "data")
	if _, err := l.Rebuild(b.ctx, w, UpOptions{Options: Options{Machines: []lab.Name{"db"}}}); err != nil {
		t.Fatal(err)
	}
	apart(has("db", 2), has("web", 1))
	if err := l.Stop(b.ctx, StopOptions{Options: Options{Machines: []lab.Name{"db"}}}); err != nil {
		t.Fatal(err)
	}

	// The reader starts while nobody writes; it does not keep the writer out.
	if _, err := l.Rebuild(b.ctx, w, UpOptions{Options: Options{Machines: []lab.Name{"web"}}}); err != nil {
		t.Fatal(err)
	}
	b.scribble(l, "data")
	if err := l.Start(b.ctx, Options{Machines: []lab.Name{"db"}}); err != nil {
		t.Fatal(err)
	}
	apart(has("db", 2), has("web", 2))

	// A snapshot is restored under it, one is removed, the volume is not.
	for range 7 {
		b.scribble(l, "data")
		if err := l.ExportVolume(b.ctx, "data", 0, "raw", filepath.Join(t.TempDir(), "data.raw"), Options{}); err != nil {
			t.Error(err)
		}
	}
	v := b.volume(l, "data")
	if len(v.Snapshots) != 1 || v.Snapshots[0].Why != "before db@2" {
		t.Errorf("%+v", v)
	}
	var busy *VolumeInUseError
	if _, err := l.RestoreVolume(b.ctx, "data", 9, Options{}); !errors.Is(err, volume.ErrNotFound) {
		t.Error(err)
	}
	if _, err := l.RestoreVolume(b.ctx, "data", 1, Options{}); !errors.As(err, &busy) || busy.By.Machine != "db" {
		t.Error(err)
	}
	if err := l.Stop(b.ctx, StopOptions{Options: Options{Machines: []lab.Name{"db"}}}); err != nil {
		t.Fatal(err)
	}
	if kept, err := l.RestoreVolume(b.ctx, "data", 1, Options{}); err != nil || kept != 2 {
		t.Errorf("kept %d, %v", kept, err)
	}
	if err := l.RemoveVolume(b.ctx, "data", 2, Options{}); err != nil {
		t.Error(err)
	}
	if err := l.RemoveVolume(b.ctx, "data", 0, Options{}); !errors.As(err, &busy) || busy.By.Machine != "web" {
		t.Error(err)
	}
}

// TestVolumesUndone interrupts the first up of a lab: nothing is left of it, but for
// what was there before.
func TestVolumesUndone(t *testing.T) {
	b := newBench(t)
	l := b.open()
	db := machine("db")
	db.Ready[0].Pattern = "never"
	db.Volumes = []lab.Volume{bare("data", lab.MiB)}
	for _, before := range []bool{false, true} {
		if before {
			if _, err := l.volumes().Create(b.ctx, bare("data", lab.MiB), volume.Place{}); err != nil {
				t.Fatal(err)
			}
		}
		ctx, cancel := context.WithCancel(b.ctx)
		_, err := l.Up(ctx, b.want(db), UpOptions{Options: Options{Events: func(e Event) {
			if e.Stage == StageCheck {
				cancel()
			}
		}}})
		if !errors.Is(err, context.Canceled) {
			t.Fatal(err)
		}
		if kept, err := l.volumes().Names(); err != nil || before != (len(kept) == 1) {
			t.Errorf("volume before: %v, after: %v, %v", before, kept, err)
		}
		if _, err := os.Stat(b.Dirs.Lab(l.ID())); before != (err == nil) {
			t.Errorf("volume before: %v, folder after: %v", before, err)
		}
	}
}

// TestCoverUnderAWriter has a machine write for the first time right after lab has seen
// that it had not: its file is given to nobody.
func TestCoverUnderAWriter(t *testing.T) {
	b := newBench(t)
	l := b.open()
	db := machine("db")
	db.Volumes = []lab.Volume{bare("data", lab.MiB)}
	b.up(l, b.want(db))
	s := &session{Lab: l, provider: b.provider}
	var err error
	if s.state, err = l.read(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.cover(b.ctx, "data"); err != nil {
		t.Fatal(err)
	}
	on, err := s.push(b.ctx, "data", func(ctx context.Context, v volume.Volume) (bool, error) {
		covered, err := l.volumes().Covered(ctx, v)
		b.scribble(l, "data")
		return covered, err
	})
	if err != nil || !on.written || on.pushed {
		t.Fatalf("%+v, %v", on, err)
	}
	for range 2 {
		m, err := b.provider.Inspect(b.ctx, lab.Generation{Lab: l.ID(), Machine: "db", Number: 1})
		if err != nil {
			t.Fatal(err)
		}
		now, err := s.cover(b.ctx, "data")
		if err != nil {
			t.Fatal(err)
		}
		v, err := l.volumes().Get("data")
		if err != nil {
			t.Fatal(err)
		}
		read, err := l.volumes().Paths(b.ctx, v, now.Layers)
		if err != nil {
			t.Fatal(err)
		}
		if m.Volumes[0].Path != read[len(read)-1] {
			b.scribble(l, "data")
			continue
		}
		// What was written to is read: then the machine writes elsewhere by now.
		if m, err = b.provider.Inspect(b.ctx, m.Generation); err != nil || slices.Contains(read, m.Volumes[0].Path) {
			t.Errorf("it reads %v, and %s is written to (%v)", now.Layers, m.Volumes[0].Path, err)
		}
	}
}

// TestNested mounts what lies within another volume after that.
func TestNested(t *testing.T) {
	db := machine("db")
	db.Volumes = []lab.Volume{
		{Name: "wal", FS: "ext4", Mount: "/srv/db/wal"}, {Name: "bare", FS: "none"}, {Name: "data", FS: "ext4", Mount: "/srv/db"},
	}
	if got, want := early(Image{Image: providers.Image{Kernel: "/k"}, Agent: true}, db), "lab.volume=data,rw,/srv/db lab.volume=wal,rw,/srv/db/wal"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

func TestSerial(t *testing.T) {
	for name, want := range map[string]string{
		"data":                  "data",
		"twenty-characters-xx":  "twenty-characters-xx",
		"twenty-one-characters": "twenty-one-.",
	} {
		if got := serial(name); !strings.HasPrefix(got, want) || len(got) > maxSerial {
			t.Errorf("serial of %s is %s", name, got)
		}
	}
	if serial("a-very-long-name-of-a-volume-1") == serial("a-very-long-name-of-a-volume-2") {
		t.Error("two volumes have one serial number")
	}
}
