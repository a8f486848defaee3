// SPDX-License-Identifier: Apache-2.0

package cli_test

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const movable = `lab: shop
provider: memory
boxes: {base: ./disk.raw}
machines:
  web:
    box: base
    ready: [{console: lab test disk, timeout: 1m, interval: 10ms}]
`

// newMovableDesk is a desk whose labs are destroyed when the test ends, wherever they are.
func newMovableDesk(t *testing.T) *desk {
	d := newDesk(t, movable)
	t.Cleanup(func() {
		labs, err := os.ReadDir(d.host.Dirs.Labs())
		if err != nil {
			t.Error(err)
		}
		for _, l := range labs {
			_, _, _ = d.runContext(context.Background(), "destroy", "--lab", l.Name(), "--yes")
		}
	})
	return d
}

// move renames the desk's folder.
func (d *desk) move() (before string) {
	d.t.Helper()
	before = d.folder
	d.folder += "-moved"
	if err := os.Rename(before, d.folder); err != nil {
		d.t.Fatal(err)
	}
	return before
}

// labID returns the ID of the only lab.
func (d *desk) labID() string {
	d.t.Helper()
	entries, err := os.ReadDir(d.host.Dirs.Labs())
	if err != nil || len(entries) != 1 {
		d.t.Fatalf("labs: %v, %v", entries, err)
	}
	return entries[0].Name()
}

// do runs a command that must succeed.
func (d *desk) do(args ...string) (out, errOut string) {
	d.t.Helper()
	code, out, errOut := d.run(args...)
	if code != 0 {
		d.t.Fatalf("lab %s: exit code %d\n%s%s", strings.Join(args, " "), code, out, errOut)
	}
	return out, errOut
}

// A folder that is moved takes its lab along, which is said once.
func TestMovedFolder(t *testing.T) {
	d := newMovableDesk(t)
	d.do("up")
	id := d.labID()
	before := d.move()
	d.do("complete", "--", "ssh", "") // says and changes nothing
	out, said := d.do("status")
	if !strings.Contains(out, "ready") || said != "lab: this folder was moved here from "+before+": lab "+id+" moves with it\n" {
		t.Errorf("status said %s%s", out, said)
	}
	if out, said := d.do("status"); !strings.Contains(out, "ready") || said != "" {
		t.Errorf("the second time: %s%s", out, said)
	}
	if out, _ := d.do("up"); !strings.Contains(out, "ready") {
		t.Errorf("up: %s", out)
	}
	if out, _ := d.do("history"); strings.Contains(out, "web@2") || !strings.Contains(out, filepath.Join(d.folder, "Labfile")) {
		t.Errorf("the history is %s", out)
	}

	// Whatever comes to the old place is another lab, and both live.
	moved := d.folder
	if err := os.CopyFS(before, os.DirFS(moved)); err != nil {
		t.Fatal(err)
	}
	d.folder = before
	if code, _, said := d.run("status"); code != 1 || !strings.Contains(said, "there is no such lab") {
		t.Errorf("a copy has a lab: %d, %s", code, said)
	}
	d.do("up")
	if entries, err := os.ReadDir(d.host.Dirs.Labs()); err != nil || len(entries) != 2 {
		t.Fatalf("labs: %v, %v", entries, err)
	}
	d.do("destroy", "--yes")
	d.folder = moved
	if out, _ := d.do("status"); !strings.Contains(out, "ready") {
		t.Errorf("status said %s", out)
	}

	// It is found even if its Labfile cannot be read any more.
	d.move()
	d.write("Labfile", "lab: [")
	d.do("destroy", "--yes")
	if entries, err := os.ReadDir(d.host.Dirs.Labs()); err != nil || len(entries) != 0 {
		t.Errorf("labs: %v, %v", entries, err)
	}
}

// Where an inode is used again, or the folder is a copy, the lab is lost until it is
// adopted.
func TestCopiedFolder(t *testing.T) {
	d := newMovableDesk(t)
	d.do("up")
	id, before := d.labID(), d.folder
	d.folder += "-copy"
	if err := os.CopyFS(d.folder, os.DirFS(before)); err != nil {
		t.Fatal(err)
	}
	if code, _, said := d.run("status"); code != 1 || !strings.Contains(said, "there is no such lab") || strings.Contains(said, "adopt") {
		t.Errorf("a copy beside the folder: %d, %s", code, said)
	}
	if err := os.RemoveAll(before); err != nil {
		t.Fatal(err)
	}
	hint := "lab: lab " + id + " was made from " + before + `/Labfile, which is gone: if that is this one, "lab adopt ` + id + `" takes it over` + "\n"
	if code, _, said := d.run("status"); code != 1 || !strings.HasPrefix(said, hint) {
		t.Errorf("a copy without the folder: %d, %s", code, said)
	}
	if _, said := d.do("adopt", id); said != "lab: lab "+id+" is that of "+d.folder+"/Labfile from now on; it was made from "+before+"/Labfile\n" {
		t.Errorf("adopt said %s", said)
	}
	if _, said := d.do("adopt", id[:6]); said != "lab: lab "+id+" is that of this Labfile already\n" {
		t.Errorf("adopt said %s", said)
	}
	if out, said := d.do("status"); !strings.Contains(out, "ready") || said != "" {
		t.Errorf("status said %s%s", out, said)
	}
	d.do("destroy", "--yes")
}

// A Labfile that has a lab takes over no other one, unless as another instance.
func TestAdoptBesideALab(t *testing.T) {
	d := newMovableDesk(t)
	d.do("up")
	id, first := d.labID(), d.folder
	d.folder += "-copy"
	if err := os.CopyFS(d.folder, os.DirFS(first)); err != nil {
		t.Fatal(err)
	}
	d.do("up")
	if code, _, said := d.run("adopt", id); code != 1 || !strings.Contains(said, "this Labfile has a lab already: shop-") || !strings.Contains(said, "--name") {
		t.Errorf("adopt: %d, %s", code, said)
	}
	d.do("adopt", id, "--name", "two")
	if out, _ := d.do("status", "--name", "two"); !strings.Contains(out, id) {
		t.Errorf("status said %s", out)
	}
	d.do("destroy", "--yes")
	d.do("destroy", "--yes", "--name", "two")
	d.folder = first
	if code, _, said := d.run("status"); code != 1 || !strings.Contains(said, "there is no such lab") {
		t.Errorf("the first folder still has a lab: %d, %s", code, said)
	}
}
