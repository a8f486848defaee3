// SPDX-License-Identifier: Apache-2.0

package boxes_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"oras.land/oras-go/v2"
	"oras.land/oras-go/v2/content/oci"

	"github.com/labfile/lab/boxes"
)

func open(t *testing.T) *boxes.Store {
	t.Helper()
	s, err := boxes.Open(filepath.Join(t.TempDir(), "data", "boxes"))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// write makes a file; a disk is one of a whole number of sectors.
func write(t *testing.T, content string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func rawDisk(fill string) string { return strings.Repeat(fill, 4096) }

func ingest(t *testing.T, s *boxes.Store, fill string, names ...string) boxes.Box {
	t.Helper()
	b, err := s.Ingest(t.Context(), boxes.Ingredients{Config: boxes.Config{Architecture: "amd64"}, Disk: write(t, rawDisk(fill))}, names...)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// files lists all files below dir, with their sizes and modes.
func files(t *testing.T, dir string) []string {
	t.Helper()
	var list []string
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		fi, err := e.Info()
		rel, _ := filepath.Rel(dir, path)
		list = append(list, fmt.Sprintf("%s %d %v", rel, fi.Size(), fi.Mode()))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return list
}

func names(t *testing.T, s *boxes.Store) map[string]digest.Digest {
	t.Helper()
	entries, err := s.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	m := map[string]digest.Digest{}
	for _, e := range entries {
		for _, n := range e.Names {
			m[n] = e.Digest
		}
	}
	return m
}

func TestIngest(t *testing.T) {
	s := open(t)
	created := time.Date(2024, 5, 6, 7, 8, 9, 10, time.FixedZone("", 3600))
	var progress [][2]int64
	in := boxes.Ingredients{
		Config: boxes.Config{
			Architecture: "amd64", Created: created, Append: "quiet", User: "root", Agent: true,
			MinMemory: 64 << 20, Packages: []string{"busybox=1.35"},
		},
		Disk: write(t, rawDisk("d")), Kernel: write(t, "kernel"), Initrd: write(t, "initrd!"),
		Origin:   "builtin/tiny",
		Progress: func(done, total int64) { progress = append(progress, [2]int64{done, total}) },
	}
	got, err := s.Ingest(t.Context(), in, "builtin/tiny", "mybox")
	if err != nil {
		t.Fatal(err)
	}
	file := func(content string) boxes.File {
		d := digest.FromString(content)
		return boxes.File{Path: filepath.Join(s.Dir(), "blobs/sha256", d.Encoded()), Digest: d, Size: int64(len(content))}
	}
	config := in.Config
	config.Created = time.Date(2024, 5, 6, 6, 8, 9, 0, time.UTC)
	config.Format, config.Size = "raw", 4096
	want := boxes.Box{Digest: got.Digest, Bytes: got.Bytes, Config: config, Disk: file(rawDisk("d")), Kernel: file("kernel"), Initrd: file("initrd!")}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("Ingest (-want +got)\n%s", diff)
	}
	const total = 4096 + 6 + 7
	if diff := cmp.Diff([][2]int64{{4096, total}, {4102, total}, {total, total}}, progress); diff != "" {
		t.Errorf("progress (-want +got)\n%s", diff)
	}
	for _, f := range []boxes.File{got.Disk, got.Kernel, got.Initrd} {
		fi, err := os.Stat(f.Path)
		if err != nil {
			t.Fatal(err)
		}
		if fi.Mode() != 0o444 {
			t.Errorf("%s has mode %v, want 0444", f.Path, fi.Mode())
		}
	}
	for _, ref := range []string{"builtin/tiny", "mybox", got.Digest.String(), got.Digest.Encoded(), got.Digest.Encoded()[:6], got.Digest.String()[:13]} {
		again, err := s.Get(t.Context(), ref)
		if err != nil {
			t.Errorf("Get(%q): %v", ref, err)
		}
		if diff := cmp.Diff(got, again); diff != "" {
			t.Errorf("Get(%q) (-want +got)\n%s", ref, diff)
		}
	}
	entries, err := s.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]boxes.Entry{{Box: got, Names: []string{"builtin/tiny", "mybox"}, Origin: "builtin/tiny"}}, entries); diff != "" {
		t.Errorf("List (-want +got)\n%s", diff)
	}
	var sum int64
	err = filepath.WalkDir(filepath.Join(s.Dir(), "blobs"), func(_ string, e fs.DirEntry, err error) error {
		if err == nil && !e.IsDir() {
			var fi fs.FileInfo
			if fi, err = e.Info(); err == nil {
				sum += fi.Size()
			}
		}
		return err
	})
	if err != nil || sum != got.Bytes {
		t.Errorf("Bytes = %d, the blobs take %d (%v)", got.Bytes, sum, err)
	}
}

// The digest of a box depends on its content alone: not on the store, the
// paths, the names, the time or the way.
func TestSameContentSameDigest(t *testing.T) {
	one, two := open(t), open(t)
	a := ingest(t, one, "x", "first")
	before := files(t, one.Dir())
	b := ingest(t, one, "x", "first")
	if diff := cmp.Diff(before, files(t, one.Dir())); diff != "" {
		t.Errorf("adding a box again changed the store (-before +after)\n%s", diff)
	}
	c, err := two.Ingest(t.Context(), boxes.Ingredients{
		Config: boxes.Config{Architecture: "amd64"},
		Disk:   write(t, rawDisk("x")), Move: true, Origin: "elsewhere",
	}, "second")
	if err != nil {
		t.Fatal(err)
	}
	if a.Digest != b.Digest || a.Digest != c.Digest {
		t.Errorf("digests differ: %s, %s, %s", a.Digest, b.Digest, c.Digest)
	}
	// The manifest is written down here, so that no change of it goes unseen:
	// it would make every lock file stale.
	if want := "sha256:95cc9cb208f1462848d1f5181462d24392c61a4218112e0c7810314e32766d47"; a.Digest.String() != want {
		t.Errorf("digest = %s, want %s", a.Digest, want)
	}
}

func TestIngestRefuses(t *testing.T) {
	disk := rawDisk("x")
	dir := t.TempDir()
	fifo := filepath.Join(dir, "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	good := write(t, disk)
	wrong := digest.FromString("something else")
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	tests := []struct {
		name  string
		ctx   context.Context
		in    boxes.Ingredients
		as    string
		is    error
		wants string
	}{
		{name: "no disk", in: boxes.Ingredients{}, wants: "adding disk: no file was named"},
		{name: "missing disk", in: boxes.Ingredients{Disk: dir + "/none"}, is: fs.ErrNotExist, wants: "adding disk: open " + dir + "/none: no such file or directory"},
		{name: "missing kernel", in: boxes.Ingredients{Disk: good, Kernel: dir + "/none"}, is: fs.ErrNotExist, wants: "adding kernel: open " + dir + "/none: no such file or directory"},
		{name: "directory", in: boxes.Ingredients{Disk: dir}, wants: "adding disk: " + dir + " is a folder, not a file"},
		{name: "pipe", in: boxes.Ingredients{Disk: fifo}, wants: "adding disk: " + fifo + " is a named pipe, not a file"},
		{name: "unsafe", in: boxes.Ingredients{Disk: write(t, "KDMV"+disk)}, is: boxes.ErrUnsafe, wants: "the file is a VMware disk (VMDK), not a qcow2 or raw disk"},
		{
			name: "wrong sha256", in: boxes.Ingredients{Disk: good, Checksum: wrong}, is: boxes.ErrDigest,
			wants: "adding disk " + good + ": digest does not match: the checksum is " + digest.FromString(disk).String() + ", expected " + wrong.String(),
		},
		{
			name: "wrong sha512", in: boxes.Ingredients{Disk: good, Checksum: digest.SHA512.FromString("else")}, is: boxes.ErrDigest,
			wants: "adding disk " + good + ": digest does not match: the checksum is " + digest.SHA512.FromString(disk).String() + ", expected " + digest.SHA512.FromString("else").String(),
		},
		{name: "wrong sha256, moved", in: boxes.Ingredients{Disk: good, Checksum: wrong, Move: true}, is: boxes.ErrDigest, wants: "digest does not match"},
		{name: "not a checksum", in: boxes.Ingredients{Disk: good, Checksum: "md5:abc"}, is: digest.ErrDigestUnsupported, wants: `checksum "md5:abc": unsupported digest algorithm`},
		{name: "unexpected box", in: boxes.Ingredients{Disk: good, Expect: wrong}, is: boxes.ErrDigest, wants: ", expected " + wrong.String()},
		{name: "bad name", in: boxes.Ingredients{Disk: good}, as: "../up", wants: `"../up" is no name for a box: use lower-case letters, digits, "-", ".", "_" and "/", at most 128`},
		{name: "name like a digest", in: boxes.Ingredients{Disk: good}, as: wrong.String(), wants: "is no name for a box"},
		{name: "cancelled", ctx: cancelled, in: boxes.Ingredients{Disk: good}, is: context.Canceled, wants: "context canceled"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := open(t)
			ingest(t, s, "before", "before")
			before := files(t, s.Dir())
			ctx, as := tt.ctx, tt.as
			if ctx == nil {
				ctx = t.Context()
			}
			if as == "" {
				as = "after"
			}
			_, err := s.Ingest(ctx, tt.in, as)
			if err == nil {
				t.Fatal("no error")
			}
			if tt.is != nil && !errors.Is(err, tt.is) {
				t.Errorf("error %v does not wrap %v", err, tt.is)
			}
			if !strings.Contains(err.Error(), tt.wants) {
				t.Errorf("error\n got %s\nwant %s", err, tt.wants)
			}
			if diff := cmp.Diff(before, files(t, s.Dir())); diff != "" {
				t.Errorf("a refused box changed the store (-before +after)\n%s", diff)
			}
			if got, err := os.ReadFile(good); err != nil || string(got) != disk {
				t.Errorf("the disk itself was changed (%v)", err)
			}
		})
	}
}

// An interruption in the middle leaves nothing.
func TestIngestInterrupted(t *testing.T) {
	s := open(t)
	before := files(t, s.Dir())
	path := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(path, make([]byte, 64<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	_, err := s.Ingest(ctx, boxes.Ingredients{Disk: path, Progress: func(done, total int64) {
		if done > total/2 {
			cancel()
		}
	}})
	if !errors.Is(err, context.Canceled) {
		t.Fatalf("error = %v, want context.Canceled", err)
	}
	if diff := cmp.Diff(before, files(t, s.Dir())); diff != "" {
		t.Errorf("an interrupted ingest changed the store (-before +after)\n%s", diff)
	}
}

// A store that cannot be written to is as it was, and says why.
func TestIngestIndexFails(t *testing.T) {
	s := open(t)
	ingest(t, s, "before", "before")
	if err := os.WriteFile(filepath.Join(s.Dir(), "index.json"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	before := files(t, s.Dir())
	_, err := s.Ingest(t.Context(), boxes.Ingredients{Disk: write(t, rawDisk("x"))}, "after")
	want := "adding box: reading the index of the box store, " + s.Dir() + "/index.json: unexpected end of JSON input"
	if err == nil || err.Error() != want {
		t.Errorf("error\n got %v\nwant %s", err, want)
	}
	if diff := cmp.Diff(before, files(t, s.Dir())); diff != "" {
		t.Errorf("the store changed (-before +after)\n%s", diff)
	}
}

func TestIngestSparseAndMove(t *testing.T) {
	for _, move := range []bool{false, true} {
		t.Run(fmt.Sprintf("move=%v", move), func(t *testing.T) {
			s := open(t)
			const size = 1 << 28
			path := filepath.Join(filepath.Dir(s.Dir()), "disk")
			f, err := os.Create(path)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			for _, off := range []int64{0, 9 << 20, 200 << 20} {
				if _, err := f.WriteAt([]byte("\x01\x02\x03\x04"), off); err != nil {
					t.Fatal(err)
				}
			}
			if err := f.Truncate(size); err != nil {
				t.Fatal(err)
			}
			b, err := s.Ingest(t.Context(), boxes.Ingredients{Disk: path, Move: move})
			if err != nil {
				t.Fatal(err)
			}
			fi, err := os.Stat(b.Disk.Path)
			if err != nil {
				t.Fatal(err)
			}
			if used := fi.Sys().(*syscall.Stat_t).Blocks * 512; fi.Size() != size || used > 1<<20 {
				t.Errorf("the disk has %d bytes and takes %d; holes were filled", fi.Size(), used)
			}
			if err := s.Verify(t.Context(), nil); err != nil {
				t.Error(err)
			}
			if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) != move {
				t.Errorf("the original after move=%v: %v", move, err)
			}
		})
	}
}

// A symbolic link is followed, never moved into the store.
func TestIngestLink(t *testing.T) {
	s := open(t)
	target := write(t, rawDisk("x"))
	path := filepath.Join(filepath.Dir(s.Dir()), "link")
	if err := os.Symlink(target, path); err != nil {
		t.Fatal(err)
	}
	b, err := s.Ingest(t.Context(), boxes.Ingredients{Disk: path, Move: true})
	if err != nil {
		t.Fatal(err)
	}
	if fi, err := os.Lstat(b.Disk.Path); err != nil || !fi.Mode().IsRegular() {
		t.Errorf("the blob is %v (%v)", fi, err)
	}
	if _, err := os.Stat(target); err != nil {
		t.Error(err)
	}
}

func TestNames(t *testing.T) {
	s := open(t)
	a := ingest(t, s, "a", "one", "two")
	b := ingest(t, s, "b", "one") // moves the name
	if diff := cmp.Diff(map[string]digest.Digest{"one": b.Digest, "two": a.Digest}, names(t, s)); diff != "" {
		t.Errorf("names (-want +got)\n%s", diff)
	}
	if err := s.Tag(t.Context(), b.Digest.String(), "two"); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(map[string]digest.Digest{"one": b.Digest, "two": b.Digest}, names(t, s)); diff != "" {
		t.Errorf("names (-want +got)\n%s", diff)
	}
	// The old box is still there by its digest.
	if _, err := s.Get(t.Context(), a.Digest.String()); err != nil {
		t.Error(err)
	}
	if err := s.Remove(t.Context(), "one"); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(map[string]digest.Digest{"two": b.Digest}, names(t, s)); diff != "" {
		t.Errorf("names (-want +got)\n%s", diff)
	}
	if err := s.Remove(t.Context(), b.Digest.String()); err != nil {
		t.Fatal(err)
	}
	entries, err := s.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(entries) != 2 || len(entries[0].Names)+len(entries[1].Names) != 0 {
		t.Errorf("List = %+v, want two boxes without names", entries)
	}
	for name, err := range map[string]error{
		"Get":         get(s, "one"),
		"Get digest":  get(s, digest.FromString("none").String()),
		"Remove":      s.Remove(t.Context(), "one"),
		"Tag":         s.Tag(t.Context(), "one", "other"),
		"Verify":      s.Verify(t.Context(), nil, "one"),
		"Get nothing": get(s, ""),
	} {
		if !errors.Is(err, boxes.ErrNotFound) {
			t.Errorf("%s: error %v does not wrap ErrNotFound", name, err)
		}
	}
	if err := s.Tag(t.Context(), a.Digest.String(), "Bad Name"); err == nil {
		t.Error("Tag accepted a bad name")
	}
}

func get(s *boxes.Store, ref string) error {
	_, err := s.Get(context.Background(), ref)
	return err
}

func TestGetAmbiguous(t *testing.T) {
	s := open(t)
	seen := map[string]bool{}
	for i := 0; ; i++ {
		// Two boxes in 65,000 pairs share the first four digits; six would take
		// too long, so the index is written by hand.
		d := ingest(t, s, fmt.Sprintf("%08d", i)).Digest.Encoded()
		seen[d] = true
		if i == 1 {
			break
		}
	}
	path := filepath.Join(s.Dir(), "index.json")
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for d := range seen {
		data = []byte(strings.ReplaceAll(string(data), d, "abcdef"+d[6:]))
	}
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	_, err = s.Get(t.Context(), "abcdef")
	if want := `box "abcdef": 2 boxes have a digest that begins so; give more of it`; err == nil || err.Error() != want {
		t.Errorf("error\n got %v\nwant %s", err, want)
	}
}

func TestPrune(t *testing.T) {
	s := open(t)
	named := ingest(t, s, "named", "named")
	kept := ingest(t, s, "kept")
	gone := ingest(t, s, "gone", "gone")
	// What a killed process leaves behind.
	stale := filepath.Join(s.Dir(), "ingest", "box-1234")
	if err := os.MkdirAll(stale, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(stale, "disk"), make([]byte, 100), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := s.Remove(t.Context(), "gone"); err != nil {
		t.Fatal(err)
	}
	keep := func(d digest.Digest) bool { return d == kept.Digest }
	got, err := s.Prune(t.Context(), keep)
	if err != nil {
		t.Fatal(err)
	}
	// Two disks of equal size have an equal config, of which one box still has need.
	config, err := json.Marshal(gone.Config)
	if err != nil {
		t.Fatal(err)
	}
	want := boxes.Pruned{Boxes: []digest.Digest{gone.Digest}, Bytes: gone.Bytes - int64(len(config)) + 100}
	if diff := cmp.Diff(kept.Config, gone.Config); diff != "" {
		t.Fatalf("the configs differ\n%s", diff)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("Prune (-want +got)\n%s", diff)
	}
	for d, there := range map[digest.Digest]bool{named.Digest: true, kept.Digest: true, gone.Digest: false} {
		if err := get(s, d.String()); errors.Is(err, boxes.ErrNotFound) == there {
			t.Errorf("Get(%s) after Prune: %v", d, err)
		}
	}
	if err := s.Verify(t.Context(), nil); err != nil {
		t.Error(err)
	}
	if again, err := s.Prune(t.Context(), keep); err != nil || again.Bytes != 0 || again.Boxes != nil {
		t.Errorf("Prune again = %+v, %v", again, err)
	}
	if err := s.Remove(t.Context(), "named"); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Prune(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	var left []string
	for _, f := range files(t, s.Dir()) {
		left = append(left, strings.Fields(f)[0])
	}
	if diff := cmp.Diff([]string{"index.json", "lock", "oci-layout"}, left); diff != "" {
		t.Errorf("files after pruning everything (-want +got)\n%s", diff)
	}
}

func damage(t *testing.T, path string, change func()) {
	t.Helper()
	if err := os.Chmod(path, 0o600); err != nil {
		t.Fatal(err)
	}
	change()
}

func TestVerify(t *testing.T) {
	tests := []struct {
		name   string
		change func(t *testing.T, b boxes.Box) string // returns the path
		reason string
		seen   bool // by Get, which hashes nothing large
	}{
		{"a bit of the disk", func(t *testing.T, b boxes.Box) string {
			damage(t, b.Disk.Path, func() { os.WriteFile(b.Disk.Path, []byte(rawDisk("y")), 0o600) })
			return b.Disk.Path
		}, "the content does not match its digest", false},
		{"a short disk", func(t *testing.T, b boxes.Box) string {
			damage(t, b.Disk.Path, func() { os.Truncate(b.Disk.Path, 7) })
			return b.Disk.Path
		}, "the file has 7 bytes instead of 4096", true},
		{"a missing disk", func(t *testing.T, b boxes.Box) string {
			damage(t, b.Disk.Path, func() { os.Remove(b.Disk.Path) })
			return b.Disk.Path
		}, "the file is missing", true},
		{"a bit of the manifest", func(t *testing.T, b boxes.Box) string {
			path := filepath.Join(filepath.Dir(b.Disk.Path), b.Digest.Encoded())
			damage(t, path, func() {
				data, _ := os.ReadFile(path)
				os.WriteFile(path, []byte(strings.Replace(string(data), "sha256:", "sha256;", 1)), 0o600)
			})
			return path
		}, "the content does not match its digest", true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := open(t)
			ingest(t, s, "good", "good")
			b := ingest(t, s, "x", "bad")
			var last int64
			if err := s.Verify(t.Context(), func(done, total int64) { last = total - done }); err != nil || last != 0 {
				t.Fatalf("Verify of a good store = %v, %d bytes to go", err, last)
			}
			path := tt.change(t, b)
			err := s.Verify(t.Context(), nil)
			if want := fmt.Sprintf("box \"bad\": %s: %s", path, tt.reason); err == nil || err.Error() != want {
				t.Errorf("error\n got %v\nwant %s", err, want)
			}
			var damaged *boxes.DamagedError
			if !errors.Is(err, boxes.ErrDigest) || !errors.As(err, &damaged) {
				t.Errorf("error is a %T and does not wrap what it should", err)
			}
			if err := s.Verify(t.Context(), nil, "good"); err != nil {
				t.Errorf("Verify of the good box alone: %v", err)
			}
			if err := get(s, "bad"); (err != nil) != tt.seen {
				t.Errorf("Get = %v", err)
			}
			// It never keeps the other boxes from being listed, and another
			// ingest heals it.
			entries, err := s.List(t.Context())
			if err != nil || len(entries) != 2 || (entries[0].Damage != nil) != tt.seen || entries[1].Damage != nil {
				t.Errorf("List = %+v, %v", entries, err)
			}
			if again := ingest(t, s, "x", "bad"); again.Digest != b.Digest {
				t.Errorf("digest changed from %s to %s", b.Digest, again.Digest)
			}
			if err := s.Verify(t.Context(), nil); err != nil {
				t.Errorf("after adding the box again: %v", err)
			}
		})
	}
}

// Nothing is removed while it is unknown what a box needs.
func TestPruneWithDamagedManifest(t *testing.T) {
	s := open(t)
	b := ingest(t, s, "x", "bad")
	path := filepath.Join(filepath.Dir(b.Disk.Path), b.Digest.Encoded())
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	before := files(t, s.Dir())
	if _, err := s.Prune(t.Context(), nil); err == nil || !strings.HasPrefix(err.Error(), "pruning boxes: reading what "+b.Digest.String()+" needs: ") {
		t.Errorf("error = %v", err)
	}
	if diff := cmp.Diff(before, files(t, s.Dir())); diff != "" {
		t.Errorf("the store changed (-before +after)\n%s", diff)
	}
}

// Many users of one directory, each with a Store of its own as processes have,
// never lose each other's changes.
func TestConcurrentStores(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "boxes")
	var wg sync.WaitGroup
	errs := make(chan error, 100)
	disks := map[int]string{}
	for i := range 16 {
		disks[i] = write(t, rawDisk(fmt.Sprintf("%04d", i/2))) // each twice
	}
	for i := range 16 {
		wg.Go(func() {
			s, err := boxes.Open(dir)
			if err != nil {
				errs <- err
				return
			}
			name := fmt.Sprintf("box-%d", i)
			if _, err := s.Ingest(context.Background(), boxes.Ingredients{Disk: disks[i]}, name); err != nil {
				errs <- err
			}
			if _, err := s.Prune(context.Background(), nil); err != nil {
				errs <- err
			}
			if _, err := s.Get(context.Background(), name); err != nil {
				errs <- err
			}
		})
	}
	wg.Wait()
	close(errs)
	for err := range errs {
		t.Error(err)
	}
	s, err := boxes.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	if got := names(t, s); len(got) != 16 {
		t.Errorf("%d names, want 16: %v", len(got), got)
	}
	if err := s.Verify(t.Context(), nil); err != nil {
		t.Error(err)
	}
}

func TestLockIsWaitedFor(t *testing.T) {
	s := open(t)
	lock, err := os.Open(filepath.Join(s.Dir(), "lock"))
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if err := s.Remove(ctx, "x"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("error = %v, want context.DeadlineExceeded", err)
	}
}

func TestOpenRefuses(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "oci-layout"), []byte(`{"imageLayoutVersion":"9.0.0"}`), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := boxes.Open(dir)
	if want := "opening box store " + dir + `: the image layout has version "9.0.0"; lab knows "1.0.0"`; err == nil || err.Error() != want {
		t.Errorf("error\n got %v\nwant %s", err, want)
	}
}

// What others know of the OCI image layout holds for the store: oras can read
// it and copy a box out of it.
func TestLayoutIsOCI(t *testing.T) {
	s := open(t)
	b := ingest(t, s, "x", "builtin/tiny", "mybox")
	from, err := oci.NewFromFS(t.Context(), os.DirFS(s.Dir()))
	if err != nil {
		t.Fatal(err)
	}
	var tags []string
	if err := from.Tags(t.Context(), "", func(t []string) error { tags = t; return nil }); err != nil {
		t.Fatal(err)
	}
	slices.Sort(tags)
	if diff := cmp.Diff([]string{"builtin/tiny", "mybox"}, tags); diff != "" {
		t.Errorf("tags (-want +got)\n%s", diff)
	}
	dir := t.TempDir()
	to, err := oci.New(dir)
	if err != nil {
		t.Fatal(err)
	}
	desc, err := oras.Copy(t.Context(), from, "mybox", to, "copy", oras.DefaultCopyOptions)
	if err != nil {
		t.Fatal(err)
	}
	if desc.Digest != b.Digest || desc.ArtifactType != boxes.ArtifactType || desc.MediaType != ocispec.MediaTypeImageManifest {
		t.Errorf("descriptor = %+v", desc)
	}
	other, err := boxes.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	c, err := other.Get(t.Context(), "copy")
	if err != nil {
		t.Fatal(err)
	}
	if c.Config.Format != "raw" || c.Disk.Digest != b.Disk.Digest {
		t.Errorf("copy = %+v", c)
	}
}

// An index that somebody damaged is an error, not a panic.
func TestMalformedIndex(t *testing.T) {
	dir := t.TempDir()
	s, err := boxes.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range []string{"", "nonsense", "sha256:../../x"} {
		index := fmt.Sprintf(`{"schemaVersion":2,"manifests":[{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":%q,"size":2}]}`, d)
		if err := os.WriteFile(filepath.Join(dir, "index.json"), []byte(index), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Get(t.Context(), "abcdef"); err == nil || !strings.Contains(err.Error(), "index.json") {
			t.Errorf("Get with the digest %q in the index: %v", d, err)
		}
	}
}
