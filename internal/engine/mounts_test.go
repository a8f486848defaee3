// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/ledger"
	"github.com/labfile/lab/internal/supervise"
	"github.com/labfile/lab/providers"
)

// TestMountsAreRefused finds before anything is made what no machine can mount.
func TestMountsAreRefused(t *testing.T) {
	b := newBench(t)
	l := b.open()
	file := filepath.Join(b.folder, "file")
	if err := os.WriteFile(file, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	web := machine("web")
	web.Mounts = []lab.Mount{{From: filepath.Join(b.folder, "none"), To: "/none"}, {From: file, To: "/file"}, {From: b.folder, To: "/src"}}
	_, err := l.Up(b.ctx, b.want(web), UpOptions{})
	want := `machine "web": mount at /none: there is no folder ` + b.folder + `/none; make it, or correct "from"
machine "web": mount at /file: ` + file + ` is not a folder; mount the folder that it is in, or put the file into the image by a provision step (file: …)`
	if err == nil || err.Error() != want {
		t.Errorf("got %v\nwant %s", err, want)
	}
	if _, err := os.Stat(b.Dirs.Lab(l.ID())); !errors.Is(err, os.ErrNotExist) {
		t.Error("something was made:", err)
	}
	web.Mounts = nil
	for range providers.MaxMounts + 1 {
		web.Mounts = append(web.Mounts, lab.Mount{From: b.folder, To: "/src"})
	}
	if errs := mountable(web); len(errs) != 1 || errs[0].Error() != "11 mounts; a machine can have 10" {
		t.Error(errs)
	}
}

// TestMountOrder has a mount that is within another come after it.
func TestMountOrder(t *testing.T) {
	m := lab.Machine{Mounts: []lab.Mount{
		{From: "/home/ada/out", To: "/srv/my src/out", Writable: true, Owner: "www-data"}, {From: "/home/ada/src", To: "/srv/my src"},
	}}
	want := []supervise.Mount{
		{From: "/home/ada/src", To: "/srv/my src", Owner: "lab"},
		{From: "/home/ada/out", To: "/srv/my src/out", Writable: true, Owner: "www-data"},
	}
	if diff := cmp.Diff(want, shared(m, ledger.Create{User: "lab"})); diff != "" {
		t.Error(diff)
	}
}
