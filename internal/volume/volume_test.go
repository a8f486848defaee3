// SPDX-License-Identifier: Apache-2.0

package volume

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/providers"
)

// paths are those of files of a store.
func paths(s kept, names []string) []string {
	all, _ := s.files.Open(context.Background(), names, "")
	return all
}

// write puts 64 KiB of one byte at an offset of a volume's disk.
func write(t *testing.T, s kept, name string, at int, pattern byte) {
	t.Helper()
	v, err := s.Get(name)
	if err != nil {
		t.Fatal(err)
	}
	qemuIO(t, chainSpec(paths(s, v.Layers)), fmt.Sprintf("write -P %d %d 64k", pattern, at))
}

// reads checks that a chain has 64 KiB of the byte at the offset.
func reads(t *testing.T, chain []string, at int, pattern byte) {
	t.Helper()
	qemuIO(t, chainSpec(chain), fmt.Sprintf("read -P %d %d 64k", pattern, at))
}

func qemuIO(t *testing.T, image, command string) {
	t.Helper()
	out, err := exec.Command("qemu-io", "-c", command, image).CombinedOutput()
	if err != nil || strings.Contains(string(out), "failed") {
		t.Fatalf("qemu-io %s: %v\n%s", command, err, out)
	}
}

// kept is a store that keeps files at a place.
type kept struct {
	*Store
	at    Place
	files folder // where that is
}

// elsewhere is a place that no path of the store leads to.
var elsewhere = Place{Provider: "libvirt", URI: "qemu+ssh://far/system"}

// far are files of another host: they are copied.
type far struct{ folder }

func (f far) Put(_ context.Context, name, from string) error { return copyFile(from, f.Path(name)) }

func (f far) Open(_ context.Context, names []string, dir string) (paths []string, err error) {
	for _, name := range names {
		paths = append(paths, filepath.Join(dir, name))
		err = errors.Join(err, copyFile(f.Path(name), filepath.Join(dir, name)))
	}
	return paths, err
}

func copyFile(from, to string) error {
	b, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	return os.WriteFile(to, b, 0o600)
}

func newStore(t *testing.T, at Place) kept {
	t.Helper()
	for _, tool := range []string{"qemu-img", "qemu-io"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Fatal(err)
		}
	}
	there := t.TempDir()
	s := Open(filepath.Join(t.TempDir(), "volumes"), func(_ context.Context, at Place) (providers.VolumeFiles, error) {
		if at != elsewhere {
			return nil, fmt.Errorf("asked for %v", at)
		}
		return far{folder(there)}, nil
	})
	if at == (Place{}) {
		there = s.dir
	}
	return kept{s, at, folder(there)}
}

// each tests a store that keeps files here, and one that keeps them on another host.
func each(t *testing.T, test func(*testing.T, kept)) {
	t.Run("here", func(t *testing.T) { test(t, newStore(t, Place{})) })
	t.Run("elsewhere", func(t *testing.T) {
		s := newStore(t, elsewhere)
		test(t, s)
		// No copy is left, and nothing but descriptions.
		if files, _ := os.ReadDir(s.dir); slices.ContainsFunc(files, func(e os.DirEntry) bool { return !strings.HasSuffix(e.Name(), description) }) {
			t.Errorf("left here: %v", files)
		}
	})
}

func create(t *testing.T, s kept, name, fs string, size lab.Bytes) Volume {
	t.Helper()
	v, err := s.Create(t.Context(), lab.Volume{Name: name, Size: size, FS: fs}, s.at)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func current(t *testing.T, s kept, name string) Volume {
	t.Helper()
	v, err := s.Get(name)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func cover(t *testing.T, s kept, name string) Snapshot {
	t.Helper()
	snap, err := s.Cover(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	return snap
}

func nobody(string) bool { return false }

func TestSnapshots(t *testing.T) { each(t, testSnapshots) }

func testSnapshots(t *testing.T, s kept) {
	create(t, s, "db", "none", 8*lab.MiB)
	write(t, s, "db", 0, 1)
	first, err := s.Snapshot(t.Context(), "db", "by hand")
	if err != nil || first.Number != 1 {
		t.Fatal(first, err)
	}
	write(t, s, "db", 0, 2)
	reads(t, paths(s, first.Layers), 0, 1)
	reads(t, paths(s, current(t, s, "db").Layers), 0, 2)

	kept, err := s.Restore(t.Context(), "db", 1)
	if err != nil || kept != 2 {
		t.Fatalf("kept %d, %v", kept, err)
	}
	reads(t, paths(s, current(t, s, "db").Layers), 0, 1)
	write(t, s, "db", 0, 3)
	second, err := current(t, s, "db").Snapshot(2)
	if err != nil {
		t.Fatal(err)
	}
	reads(t, paths(s, second.Layers), 0, 2)
	reads(t, paths(s, first.Layers), 0, 1)

	if _, err := s.Clone(t.Context(), "db", second, "old"); err != nil {
		t.Fatal(err)
	}
	if err := s.Remove(t.Context(), "db"); err != nil {
		t.Fatal(err)
	}
	reads(t, paths(s, current(t, s, "old").Layers), 0, 2)
	if _, err := s.Get("db"); !errors.Is(err, ErrNotFound) {
		t.Error(err)
	}
	if left, _ := filepath.Glob(s.files.Path("db@*")); len(left) > 0 {
		t.Error("left", left)
	}
	if err := s.Remove(t.Context(), "old"); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(s.dir); !errors.Is(err, os.ErrNotExist) {
		t.Error("the folder is left:", err)
	}
}

// TestAttach takes a snapshot per generation that wrote, and keeps the newest.
func TestAttach(t *testing.T) { each(t, testAttach) }

func testAttach(t *testing.T, s kept) {
	create(t, s, "db", "none", 8*lab.MiB)
	for n := 1; n <= 9; n++ {
		for range 2 { // the second time nothing happens
			if _, err := s.Attach(t.Context(), "db", Attachment{Machine: "web", Generation: n}); err != nil {
				t.Fatal(err)
			}
			if err := s.Thin(t.Context(), "db", nobody); err != nil {
				t.Fatal(err)
			}
		}
		write(t, s, "db", n*64<<10, byte(n))
	}
	// Nobody wrote since: no snapshot of nothing.
	if snap, err := s.Attach(t.Context(), "db", Attachment{Machine: "web", Generation: 10}); err != nil || snap == nil {
		t.Fatal(snap, err)
	}
	if snap, err := s.Attach(t.Context(), "db", Attachment{Machine: "web", Generation: 11}); err != nil || snap != nil {
		t.Fatal(snap, err)
	}
	if err := s.Thin(t.Context(), "db", nobody); err != nil {
		t.Fatal(err)
	}
	v := current(t, s, "db")
	var numbers []int
	for _, snap := range v.Snapshots {
		numbers = append(numbers, snap.Number)
		chain := paths(s, snap.Layers)
		for n := 1; n <= 9; n++ {
			want := byte(0)
			if n <= snap.Number {
				want = byte(n)
			}
			reads(t, chain, n*64<<10, want)
		}
	}
	if !slices.Equal(numbers, []int{5, 6, 7, 8, 9}) {
		t.Error("snapshots", numbers)
	}
	if len(v.Layers) != 6 { // five that snapshots end at, and the one that is written to
		t.Error("layers", v.Layers)
	}
	files, _ := filepath.Glob(s.files.Path("db@*"))
	if len(files) != 6 {
		t.Error("files", files)
	}
}

// TestCover reads what a volume holds while it goes on from there.
func TestCover(t *testing.T) { each(t, testCover) }

func testCover(t *testing.T, s kept) {
	create(t, s, "db", "none", 8*lab.MiB)
	empty := cover(t, s, "db")
	reads(t, paths(s, empty.Layers), 0, 0)
	if again := cover(t, s, "db"); !slices.Equal(again.Layers, empty.Layers) {
		t.Errorf("nothing was written, and %v became %v", empty.Layers, again.Layers)
	}
	write(t, s, "db", 0, 1)
	first := cover(t, s, "db")
	write(t, s, "db", 0, 2)
	reads(t, paths(s, first.Layers), 0, 1)
	second := cover(t, s, "db")

	// It is not lost by going back to another state.
	if snap, err := s.Snapshot(t.Context(), "db", ""); err != nil || snap.Number != 1 {
		t.Fatal(snap, err)
	}
	write(t, s, "db", 0, 3)
	third := cover(t, s, "db")
	if kept, err := s.Restore(t.Context(), "db", 1); err != nil || kept != 2 {
		t.Fatalf("kept %d, %v", kept, err)
	}
	snap, err := current(t, s, "db").Snapshot(2)
	if err != nil {
		t.Fatal(err)
	}
	reads(t, paths(s, snap.Layers), 0, 3)

	// Files are joined, but for those that somebody has open.
	held := []Snapshot{first, third}
	open := func(path string) bool {
		return slices.ContainsFunc(held, func(snap Snapshot) bool { return slices.Contains(paths(s, snap.Layers), path) })
	}
	if err := s.Forget(t.Context(), "db", 2, open); err != nil {
		t.Fatal(err)
	}
	reads(t, paths(s, first.Layers), 0, 1)
	reads(t, paths(s, second.Layers), 0, 2)
	held = nil
	if err := s.Thin(t.Context(), "db", open); err != nil {
		t.Fatal(err)
	}
	v := current(t, s, "db")
	if len(v.Layers) != 2 {
		t.Errorf("left apart: %v", v.Layers)
	}
	reads(t, paths(s, v.Layers), 0, 2)

	// A reader of what was grown sees the size.
	if err := s.Grow(t.Context(), "db", 16*lab.MiB); err != nil {
		t.Fatal(err)
	}
	reads(t, paths(s, cover(t, s, "db").Layers), 12<<20, 0)
}

// TestForgetTheLatest forgets the snapshot that the volume goes on from: what it holds
// is not lost by that.
func TestForgetTheLatest(t *testing.T) { each(t, testForgetTheLatest) }

func testForgetTheLatest(t *testing.T, s kept) {
	create(t, s, "db", "none", 8*lab.MiB)
	for n := 1; n <= 2; n++ {
		write(t, s, "db", 0, byte(n))
		if _, err := s.Snapshot(t.Context(), "db", ""); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Forget(t.Context(), "db", 2, nobody); err != nil {
		t.Fatal(err)
	}
	kept, err := s.Restore(t.Context(), "db", 1)
	if err != nil || kept != 3 {
		t.Fatalf("kept %d, %v", kept, err)
	}
	snap, err := current(t, s, "db").Snapshot(3)
	if err != nil {
		t.Fatal(err)
	}
	reads(t, paths(s, snap.Layers), 0, 2)
}

// TestForget keeps what a restored branch stands on.
func TestForget(t *testing.T) { each(t, testForget) }

func testForget(t *testing.T, s kept) {
	create(t, s, "db", "none", 8*lab.MiB)
	for n := 1; n <= 3; n++ {
		write(t, s, "db", n*64<<10, byte(n))
		if _, err := s.Snapshot(t.Context(), "db", ""); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := s.Restore(t.Context(), "db", 2); err != nil {
		t.Fatal(err)
	}
	write(t, s, "db", 3*64<<10, 7)
	for _, n := range []int{1, 2} {
		if err := s.Forget(t.Context(), "db", n, nobody); err != nil {
			t.Fatal(err)
		}
	}
	v := current(t, s, "db")
	third, err := v.Snapshot(3)
	if err != nil {
		t.Fatal(err)
	}
	for n := 1; n <= 3; n++ {
		reads(t, paths(s, third.Layers), n*64<<10, byte(n))
	}
	reads(t, paths(s, v.Layers), 2*64<<10, 2)
	reads(t, paths(s, v.Layers), 3*64<<10, 7)
}

func TestInterrupted(t *testing.T) { each(t, testInterrupted) }

func testInterrupted(t *testing.T, s kept) {
	create(t, s, "db", "none", 8*lab.MiB)
	for _, path := range []string{s.files.Path("db@2.qcow2"), filepath.Join(s.dir, ".db@123")} {
		if err := os.WriteFile(path, []byte("half"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(t, s, "db", 0, 1)
	if _, err := s.Snapshot(t.Context(), "db", ""); err != nil {
		t.Fatal(err)
	}
	reads(t, paths(s, current(t, s, "db").Layers), 0, 1)
	if _, err := os.Stat(filepath.Join(s.dir, ".db@123")); err == nil {
		t.Error("the scratch file is left")
	}
}

func TestExt4(t *testing.T) { each(t, testExt4) }

func testExt4(t *testing.T, s kept) {
	for _, tool := range []string{"mke2fs", "resize2fs"} {
		if _, err := exec.LookPath(filepath.Join("/usr/sbin", tool)); err != nil {
			t.Fatal(err)
		}
	}
	create(t, s, "db", "ext4", 64*lab.MiB)
	before, err := s.Snapshot(t.Context(), "db", "")
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Grow(t.Context(), "db", 96*lab.MiB); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "db.raw")
	if err := s.Export(t.Context(), "db", cover(t, s, "db"), "raw", file); err != nil {
		t.Fatal(err)
	}
	if got := blocks(t, file); got != "24576" {
		t.Errorf("the file system has %s blocks", got)
	}
	small := filepath.Join(t.TempDir(), "small.raw")
	if fi, err := os.Stat(file); err != nil || fi.Mode() != 0o600 {
		t.Errorf("others may read what was exported: %v, %v", fi, err)
	}
	if err := s.Export(t.Context(), "db", before, "raw", small); err != nil {
		t.Fatal(err)
	}
	if got := blocks(t, small); got != "16384" {
		t.Errorf("the snapshot's file system has %s blocks", got)
	}
	v, err := s.Import(t.Context(), file, "copy", nil, s.at)
	if err != nil || v.FS != "ext4" || v.Size != 96*lab.MiB {
		t.Errorf("imported %+v, %v", v, err)
	}
	if err := s.Grow(t.Context(), "db", 64*lab.MiB); err == nil || !strings.Contains(err.Error(), "cannot shrink to 64MiB") {
		t.Error(err)
	}
	if err := s.Export(t.Context(), "db", cover(t, s, "db"), "raw", file); err == nil || !strings.Contains(err.Error(), "exists already") {
		t.Error(err)
	}
	if _, err := s.Create(t.Context(), lab.Volume{Name: "db", Size: lab.GiB, FS: "ext4"}, s.at); !errors.Is(err, ErrExists) {
		t.Error(err)
	}
}

// blocks checks a file system and returns how many blocks it has.
func blocks(t *testing.T, file string) string {
	t.Helper()
	if out, err := exec.Command("/usr/sbin/e2fsck", "-f", "-n", file).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	out, err := exec.Command("/usr/sbin/dumpe2fs", "-h", file).Output()
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(out)) {
		if n, ok := strings.CutPrefix(line, "Block count:"); ok {
			return strings.TrimSpace(n)
		}
	}
	return ""
}

// TestTidy removes what is no volume's, and nothing else.
func TestTidy(t *testing.T) { each(t, testTidy) }

func testTidy(t *testing.T, s kept) {
	create(t, s, "db", "none", 8*lab.MiB)
	for _, name := range []string{"half@1.qcow2", "db-2@1.qcow2"} {
		if err := s.files.Make(t.Context(), name, lab.MiB); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Tidy(t.Context(), s.at); err != nil {
		t.Fatal(err)
	}
	left, err := filepath.Glob(s.files.Path("*@*"))
	if err != nil || !slices.Equal(left, paths(s, []string{"db@1.qcow2"})) {
		t.Errorf("left %v, %v", left, err)
	}
}

// TestUnreachable keeps the descriptions of what cannot be reached.
func TestUnreachable(t *testing.T) {
	s := newStore(t, elsewhere)
	create(t, s, "db", "none", 8*lab.MiB)
	away := errors.New("the host is off")
	s.keeper = func(context.Context, Place) (providers.VolumeFiles, error) { return nil, away }
	v := current(t, s, "db")
	_, taken := s.Taken(t.Context(), v)
	_, snapshot := s.Snapshot(t.Context(), "db", "")
	_, create := s.Create(t.Context(), lab.Volume{Name: "other", Size: lab.MiB, FS: "none"}, elsewhere)
	for what, err := range map[string]error{"Taken": taken, "Snapshot": snapshot, "Create": create, "Remove": s.Remove(t.Context(), "db")} {
		if !errors.Is(err, away) || !strings.Contains(err.Error(), "at qemu+ssh://far/system") {
			t.Errorf("%s: %v", what, err)
		}
	}
	if all, err := s.List(); err != nil || len(all) != 1 || !slices.Equal(all[0].Layers, v.Layers) {
		t.Errorf("%+v, %v", all, err)
	}
}

// What the Labfile says of a volume is compared with the image before anything is
// written.
func TestImportDeclared(t *testing.T) {
	s := newStore(t, Place{})
	dir := t.TempDir()
	large, pipe, bare := filepath.Join(dir, "large.qcow2"), filepath.Join(dir, "pipe"), filepath.Join(dir, "bare.raw")
	if _, err := qemuImg(t.Context(), "create", "-q", "-f", "qcow2", large, "48G"); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(syscall.Mkfifo(pipe, 0o600), os.WriteFile(bare, make([]byte, 1<<20), 0o600)); err != nil {
		t.Fatal(err)
	}
	refused := func(from, fs, want, hint string) {
		t.Helper()
		_, err := s.Import(t.Context(), from, "db", &lab.Volume{Name: "db", Size: 16 * lab.MiB, FS: fs}, Place{})
		if err == nil || err.Error() != "importing volume db: "+want {
			t.Errorf("got %v\nwant %s", err, want)
		}
		var mismatch *MismatchError
		if errors.As(err, &mismatch) != (hint != "") || hint != "" && mismatch.Hint() != hint {
			t.Errorf("the hint of %v is not %q", err, hint)
		}
		if left, err := os.ReadDir(s.dir); err != nil && !errors.Is(err, os.ErrNotExist) || len(left) > 0 {
			t.Errorf("left over: %v, %v", left, err)
		}
	}
	refused(pipe, "ext4", pipe+" is a named pipe, not a file", "")
	refused(large, "ext4", "the image has 48GiB, and the Labfile gives volume db 16MiB",
		"write size: 48GiB for the volume in the Labfile, or import the image under another name")
	refused(bare, "ext4", "the image has the file system none, and the Labfile gives volume db ext4",
		"write fs: none for the volume in the Labfile, or import the image under another name")
	v, err := s.Import(t.Context(), bare, "db", &lab.Volume{Name: "db", Size: 16 * lab.MiB, FS: "none"}, Place{})
	if err != nil || v.FS != "none" || v.Size != lab.MiB {
		t.Errorf("imported %+v, %v", v, err)
	}
}

// TestImportRefuses has a disk that names a file of the host.
func TestImportRefuses(t *testing.T) {
	s := newStore(t, Place{})
	dir := t.TempDir()
	base, evil := filepath.Join(dir, "secret.raw"), filepath.Join(dir, "evil.qcow2")
	if err := os.WriteFile(base, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := qemuImg(t.Context(), "create", "-q", "-f", "qcow2", "-F", "raw", "-b", base, evil); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Import(t.Context(), evil, "evil", nil, Place{}); err == nil || !strings.Contains(err.Error(), "backing") {
		t.Error(err)
	}
	if all, err := s.List(); err != nil || len(all) > 0 {
		t.Error(all, err)
	}
}
