// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
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

// A guest that writes to a folder must not choose what another mount shows, nor what
// lab does.
func TestMountsThatReachTooFar(t *testing.T) {
	b := newBench(t)
	l := b.open()
	if err := os.MkdirAll(filepath.Join(b.folder, "src", "sub"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(b.Dirs.Data, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(filepath.Join("src", "sub"), filepath.Join(b.folder, "link")); err != nil {
		t.Fatal(err)
	}
	at := func(name string) string { return filepath.Join(b.folder, name) }
	for name, tt := range map[string]struct {
		web, db lab.Mount
		want    string // part of the error; empty for none
	}{
		"one in another that is read": {lab.Mount{From: at("src"), To: "/a"}, lab.Mount{From: at("src/sub"), To: "/b", Writable: true}, ""},
		"one folder for two":          {lab.Mount{From: at("src"), To: "/a", Writable: true}, lab.Mount{From: at("src"), To: "/b", Writable: true}, ""},
		"one in another":              {lab.Mount{From: at("src"), To: "/a", Writable: true}, lab.Mount{From: at("src/sub"), To: "/b"}, `which machine "web" may write to`},
		"one in another, by a link":   {lab.Mount{From: at("src"), To: "/a", Writable: true}, lab.Mount{From: at("link"), To: "/b"}, `which machine "web" may write to`},
		"lab's own files":             {lab.Mount{From: b.Dirs.Data, To: "/a", Writable: true}, lab.Mount{From: at("src"), To: "/b"}, "lab keeps its own files in"},
		"what lab's own files lie in": {lab.Mount{From: filepath.Dir(b.Dirs.Data), To: "/a", Writable: true}, lab.Mount{From: at("src"), To: "/b"}, "lab keeps its own files in"},
		"lab's own files, to be read": {lab.Mount{From: b.Dirs.Data, To: "/a"}, lab.Mount{From: at("src"), To: "/b"}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			web, db := machine("web"), machine("db")
			web.Mounts, db.Mounts = []lab.Mount{tt.web}, []lab.Mount{tt.db}
			_, err := l.Plan(b.ctx, b.want(web, db), UpOptions{})
			if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want %q", err, tt.want)
			}
		})
	}
}
