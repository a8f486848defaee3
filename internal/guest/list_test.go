// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/labfile/lab/internal/drift"
)

// programs are PATHs with GNU's find and with busybox's.
func programs(t *testing.T) map[string]string {
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		t.Fatal("busybox is missing: tools/deps test installs it")
	}
	dir := t.TempDir()
	for _, name := range []string{"find", "stat", "tr"} {
		if err := os.Symlink(busybox, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	return map[string]string{"GNU": os.Getenv("PATH"), "busybox": dir}
}

// listed runs the program that lists files as if dir were a guest's root.
func listed(t *testing.T, path, dir string) *drift.Manifest {
	t.Helper()
	cmd := exec.Command("/bin/sh", "-c", strings.ReplaceAll(listProgram, "find / ", "find "+dir+" "))
	cmd.Env = []string{"PATH=" + path}
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	out = bytes.ReplaceAll(out, []byte(dir+"\x00"), []byte("/\x00"))
	m, err := drift.ReadManifest(bytes.NewReader(bytes.ReplaceAll(out, []byte(dir+"/"), []byte("/"))))
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// TestListProgram lists a tree with the programs that guests have, edits it, and finds
// what was done.
func TestListProgram(t *testing.T) {
	for name, path := range programs(t) {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			sh := func(script string) {
				t.Helper()
				cmd := exec.Command("sh", "-euc", script)
				cmd.Dir = dir
				if out, err := cmd.CombinedOutput(); err != nil {
					t.Fatalf("%v\n%s", err, out)
				}
			}
			sh(`mkdir -p etc/sub; echo a > etc/a; echo b > etc/b; chmod 4755 etc/b; ln etc/a etc/twin
ln -s "it's -> 'there'" "etc/a 'link'"; mkfifo etc/pipe; echo n > "etc/new
line"; echo q > etc/quiet; touch -d 2020-01-01 etc/quiet`)
			before := listed(t, path, dir)
			if before.Len() != 10 {
				t.Errorf("%d files, not 10", before.Len())
			}
			if r := drift.CompareManifests(before, listed(t, path, dir), true, drift.Options{}); len(r.Changes) > 0 {
				t.Errorf("without a change: %+v", r.Changes)
			}
			sh(`echo more >> etc/a; chmod 0755 etc/b; ln -sf "it's" "etc/a 'link'"; echo more >> "etc/new
line"; rmdir etc/sub; sed -i s/q/r/ etc/quiet; touch -d 2020-01-01 etc/quiet; mkdir etc/d`)
			var got []string
			for _, c := range drift.CompareManifests(before, listed(t, path, dir), true, drift.Options{}).Changes {
				got = append(got, strings.TrimSpace(string(c.Op)+" "+c.Path+" "+strings.Join(c.What, ",")+" "+strings.Join(c.Links, ",")))
			}
			want := []string{
				"M /etc/a content /etc/twin", "M /etc/a 'link' target", "M /etc/b mode", "A /etc/d",
				"M /etc/new\nline content", "M /etc/quiet content", "D /etc/sub",
			}
			if d := cmp.Diff(want, got); d != "" {
				t.Error(d)
			}
		})
	}
}

// TestListProgramsAgree compares what different programs say of one tree, to the second.
func TestListProgramsAgree(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"a", "b"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(name), 0o640); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chtimes(filepath.Join(dir, "b"), time.Time{}, time.Unix(-7, 5)); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("a", filepath.Join(dir, "c")); err != nil {
		t.Fatal(err)
	}
	p := programs(t)
	r := drift.CompareManifests(listed(t, p["GNU"], dir), listed(t, p["busybox"], dir), true, drift.Options{All: true})
	if len(r.Changes) > 0 {
		t.Errorf("they differ: %+v", r.Changes)
	}
}
