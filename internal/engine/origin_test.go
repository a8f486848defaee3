// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/ledger"
)

// Only a folder that was moved is taken for the one before.
func TestMoved(t *testing.T) {
	root := t.TempDir()
	at := func(name string) string { return filepath.Join(root, name, "Labfile") }
	for _, name := range []string{"old", "other"} {
		if err := os.Mkdir(filepath.Join(root, name), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	o := ledger.Opened{File: at("old"), Folder: folderOf(at("old"))}
	if o.Folder.Born == 0 {
		t.Fatalf("%s does not say when folders are born", root)
	}
	if moved(o, folderOf(at("other"))) || moved(o, folderOf(at("none"))) {
		t.Error("another folder is taken for it")
	}
	if err := os.Symlink("old", filepath.Join(root, "alias")); err != nil {
		t.Fatal(err)
	}
	if moved(o, folderOf(at("alias"))) {
		t.Error("another name of it, which is where it was, is a move")
	}
	if err := os.Rename(filepath.Join(root, "old"), filepath.Join(root, "new")); err != nil {
		t.Fatal(err)
	}
	if !moved(o, folderOf(at("new"))) {
		t.Error("it was not recognized where it was moved to")
	}
	used := o
	used.Folder.Born++ // the inode was free in between
	if moved(used, folderOf(at("new"))) {
		t.Error("an inode that is used again is taken for it")
	}
	unborn := folderOf(at("new"))
	unborn.Born = 0
	if used.Folder = unborn; moved(used, unborn) {
		t.Error("a folder of unknown birth is taken for it")
	}
	if old := (ledger.Opened{File: at("old")}); moved(old, folderOf(at("new"))) {
		t.Error("a record that says nothing of the folder is enough")
	}
}

// Mounts below a folder that was moved are where they are now, and no reason to replace
// their machine.
func TestMovedMounts(t *testing.T) {
	b := newBench(t)
	l := b.open()
	b.up(l, b.want(machine("web"), machine("db")))
	state, err := l.read()
	if err != nil {
		t.Fatal(err)
	}
	web := state.Machines["web"]
	spec := web.Create.Spec.Machine("web")
	spec.Mounts = []lab.Mount{{From: b.folder, To: "/a"}, {From: b.folder + "/src", To: "/b"}, {From: "/srv", To: "/c"}, {From: b.folder + "-2", To: "/d"}}
	if err := l.note(ledger.MachineChanged, web, "", ledger.Changed{Spec: ledger.SpecOf(spec)}); err != nil {
		t.Fatal(err)
	}
	before, _ := l.History()
	next := b.folder + "-moved"
	if err := os.Rename(b.folder, next); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(next, "Labfile")
	f, err := b.Find("shop", file)
	if err != nil || f.ID != l.ID() || f.From != filepath.Join(b.folder, "Labfile") {
		t.Fatalf("%+v, %v", f, err)
	}
	if taken, err := l.TakeOver("shop", file, "lab status"); err != nil || taken.From != f.From || !slices.Equal(taken.Mounts, []lab.Name{"web"}) {
		t.Fatalf("%+v, %v", taken, err)
	}
	if state, err = l.read(); err != nil {
		t.Fatal(err)
	}
	want := []lab.Mount{{From: next, To: "/a"}, {From: next + "/src", To: "/b"}, {From: "/srv", To: "/c"}, {From: b.folder + "-2", To: "/d"}}
	if got := state.Machines["web"].Create.Spec.Machine("web").Mounts; !slices.Equal(got, want) {
		t.Errorf("mounts: %+v", got)
	}
	if after, _ := l.History(); len(after) != len(before)+2 {
		t.Errorf("%d records", len(after)-len(before))
	}
}

// The lab's ID is that of the path, until another lab has it.
func TestFind(t *testing.T) {
	b := newBench(t)
	file := filepath.Join(b.folder, "Labfile")
	find := func() lab.ID {
		t.Helper()
		f, err := b.Find("shop", file)
		if err != nil {
			t.Fatal(err)
		}
		return f.ID
	}
	first := lab.NewID("shop", file)
	if got := find(); got != first {
		t.Errorf("before there is one: %s", got)
	}
	l := b.open()
	w := b.want(machine("web"))
	b.up(l, w)
	if got := find(); got != first {
		t.Errorf("of the one there is: %s", got)
	}
	if o, ok, err := l.origin(); err != nil || !ok || o.Folder != folderOf(file) {
		t.Errorf("%+v, %v, %v", o, ok, err)
	}
	if err := l.Stop(b.ctx, StopOptions{}); err != nil { // looks at no Labfile
		t.Fatal(err)
	}
	if _, err := l.TakeOver("shop", "/elsewhere/Labfile", "lab adopt"); err != nil {
		t.Fatal(err)
	}
	if got := find(); got != lab.NthID("shop", file, 1) {
		t.Errorf("after that moved away: %s", got)
	}
	if f, err := b.Find("shop", "/elsewhere/Labfile"); err != nil || f.ID != first || f.From != "" {
		t.Errorf("at its new place: %+v, %v", f, err)
	}
	if f, err := b.Find("other", "/elsewhere/Labfile"); err != nil || f.ID != lab.NewID("other", "/elsewhere/Labfile") {
		t.Errorf("another name there: %+v, %v", f, err)
	}
	if err := l.Start(b.ctx, Options{}); err != nil {
		t.Fatal(err)
	}
	if o, _, _ := l.origin(); o.File != "/elsewhere/Labfile" {
		t.Errorf("start forgot where it is: %+v", o)
	}
}
