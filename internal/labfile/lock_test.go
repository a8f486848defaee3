// SPDX-License-Identifier: Apache-2.0

package labfile

import (
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/labfile/lab/internal/lab"
)

func testLock() Lock {
	hex := strings.Repeat("0123456789abcdef", 4)
	return Lock{Version: LockVersion, Boxes: map[string]LockedBox{
		"base":         {From: "builtin/debian-12", Arch: "amd64", Digest: "sha256:" + hex},
		"builtin/tiny": {From: "builtin/tiny", Arch: "amd64", Digest: "sha256:" + strings.Repeat("f", 64)},
		"on":           {From: "https://images.example.com/x.img?a=b#c: d", Arch: "arm64", Digest: "sha256:" + hex, Checksum: "sha512:" + hex + hex},
	}}
}

func TestLock(t *testing.T) {
	dir := t.TempDir()
	path := LockPath(filepath.Join(dir, "Labfile"))
	if path != filepath.Join(dir, "Labfile.lock") {
		t.Errorf("the lock file is %s", path)
	}
	empty, err := ReadLock(path)
	if err != nil || empty.Version != 0 || len(empty.Boxes) != 0 {
		t.Errorf("a missing lock file: got %+v, %v", empty, err)
	}
	want := testLock()
	if err := WriteLock(path, want); err != nil {
		t.Fatal(err)
	}
	golden(t, filepath.Join("testdata", "Labfile.lock"), read(t, path))
	got, err := ReadLock(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("reading back (-want +got):\n%s", diff)
	}
	files, err := os.ReadDir(dir)
	if err != nil || len(files) != 1 {
		t.Errorf("the directory holds %v, %v; want the lock file alone", files, err)
	}
}

func TestWriteLockLeavesTheSameAlone(t *testing.T) {
	path := filepath.Join(t.TempDir(), "Labfile.lock")
	if err := WriteLock(path, testLock()); err != nil {
		t.Fatal(err)
	}
	before, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := WriteLock(path, testLock().Clone()); err != nil {
		t.Fatal(err)
	}
	after, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if !os.SameFile(before, after) {
		t.Error("the file was replaced by the same content")
	}
}

func TestWriteLockIsAllOrNothing(t *testing.T) {
	path := filepath.Join(t.TempDir(), "Labfile.lock")
	locks := []Lock{testLock(), testLock().Clone()}
	delete(locks[1].Boxes, "on")
	if err := WriteLock(path, locks[0]); err != nil {
		t.Fatal(err)
	}
	var writers sync.WaitGroup
	for i := range 4 {
		writers.Go(func() {
			for n := range 20 {
				if err := WriteLock(path, locks[(i+n)%2]); err != nil {
					t.Error(err)
				}
			}
		})
	}
	done := make(chan struct{})
	go func() {
		writers.Wait()
		close(done)
	}()
	for reading := true; reading; {
		select {
		case <-done:
			reading = false
		default:
		}
		lk, err := ReadLock(path)
		if err != nil {
			t.Fatal(err)
		}
		if !cmp.Equal(lk, locks[0]) && !cmp.Equal(lk, locks[1]) {
			t.Fatalf("read a lock that nobody wrote: %+v", lk)
		}
	}
}

func TestWriteLockErrors(t *testing.T) {
	dir := t.TempDir()
	err := WriteLock(filepath.Join(dir, "none", "Labfile.lock"), testLock())
	if !errors.Is(err, os.ErrNotExist) || message(err) != "writing the lock file: write "+dir+"/none/Labfile.lock: no such file or directory" {
		t.Errorf("without a directory: got %v", err)
	}
	bad := testLock()
	bad.Boxes["base"] = LockedBox{From: "builtin/tiny", Arch: "amd64", Digest: "sha256:12"}
	path := filepath.Join(dir, "Labfile.lock")
	if err := WriteLock(path, bad); message(err) != `writing the lock file: lock file:8:13: boxes.base.digest: "sha256:12" is not a digest` {
		t.Errorf("with a bad digest: got %v", err)
	}
	if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a bad lock left a file: %v", err)
	}
	if err := os.Mkdir(path, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := WriteLock(path, testLock()); err == nil {
		t.Error("a directory was replaced")
	}
	if files, _ := os.ReadDir(dir); len(files) != 1 {
		t.Errorf("a failed write left %v", files)
	}
	if _, err := ReadLock(path); message(err) != path+": a directory, not a file" {
		t.Errorf("reading a directory: got %v", err)
	}
}

func TestBadLocks(t *testing.T) {
	hex := strings.Repeat("0", 64)
	for _, c := range []struct{ data, want string }{
		{"", "Labfile.lock:1:1: the file is empty"},
		{"version: 2\nvolumes: {}\n", "Labfile.lock:1:10: version: version 2 of the lock file was written by a newer lab than this one"},
		{"boxes: {}\n", `Labfile.lock:1:1: version is missing; add "version: 1"`},
		{"version: 1\nboxes:\n<<<<<<< HEAD\n", "Labfile.lock:3:1: an unfinished merge; resolve the conflict first"},
		{
			"version: 1\nboxes:\n  a: {from: x, arch: amd64, digest: sha256:" + hex + "}\n  b: {from: x, arch: AMD 64, digest: md5:1, checksum: 12, size: 1}\n  c: x\n",
			"Labfile.lock:4:22: boxes.b.arch: \"AMD 64\" is not an architecture\n" +
				"Labfile.lock:4:38: boxes.b.digest: \"md5:1\" is not a digest\n" +
				"Labfile.lock:4:55: boxes.b.checksum: \"12\" is not a checksum\n" +
				"Labfile.lock:4:59: boxes.b: unknown key \"size\"; known keys are from, arch, digest, checksum\n" +
				"Labfile.lock:5:3: boxes.c: wants a mapping, such as {from: builtin/tiny, arch: amd64, digest: sha256:…}, not \"x\"",
		},
	} {
		_, err := parseLock("Labfile.lock", []byte(c.data))
		if message(err) != c.want {
			t.Errorf("%q:\ngot  %s\nwant %s", c.data, message(err), c.want)
		}
	}
	// What a lock says is taken as it is.
	lk, err := parseLock("Labfile.lock", []byte("version: 1\nboxes:\n  a: {from: '${HOME}', arch: amd64, digest: sha256:"+hex+"}\n"))
	if err != nil || lk.Boxes["a"].From != "${HOME}" {
		t.Errorf("got %+v, %v", lk, err)
	}
}

func TestStale(t *testing.T) {
	sum := func(c string) string { return "sha256:" + strings.Repeat(c, 64) }
	box := func(from, arch, checksum string) LockedBox {
		return LockedBox{From: from, Arch: arch, Digest: sum("0"), Checksum: checksum}
	}
	here, other := runtime.GOARCH, "other"
	l := &lab.Lab{Boxes: []lab.Box{
		{Name: "a", From: "x"},
		{Name: "b", From: "x"},
		{Name: "c", From: "x"},
		{Name: "d", From: "x"},
		{Name: "e", From: "x", Checksum: sum("1")},
		{Name: "f", From: "x", Checksum: sum("1")},
		{Name: "g", From: "x", Checksum: "file:SHA256SUMS"},
		{Name: "h", From: "x", Checksum: "sha512:" + strings.Repeat("1", 128)},
	}}
	got := Stale(l, Lock{Version: 1, Boxes: map[string]LockedBox{
		"a": box("x", here, ""), "b": box("y", here, ""), "d": box("x", other, ""),
		"e": box("x", here, sum("1")), "f": box("x", here, sum("2")), "g": box("x", here, sum("2")), "h": box("x", here, sum("1")),
		"unused": box("x", other, ""),
	}})
	want := []string{
		`box "b" is pinned as it came from y; the Labfile says x`,
		`box "c" is not pinned`,
		`box "d" is pinned for other; this host is ` + here,
		`box "f" is pinned with the checksum ` + sum("2") + `; the Labfile says ` + sum("1"),
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if got := Stale(&lab.Lab{}, Lock{}); got != nil {
		t.Errorf("without boxes: got %v", got)
	}
}
