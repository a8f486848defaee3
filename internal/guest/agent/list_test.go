// SPDX-License-Identifier: Apache-2.0

//go:build linux

package agent

import (
	"bytes"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/labfile/lab/internal/drift"
)

// TestListFiles lists a tree, edits it, and finds what was done.
func TestListFiles(t *testing.T) {
	dir := t.TempDir()
	root, err := os.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	list := func() *drift.Manifest {
		t.Helper()
		var b bytes.Buffer
		if err := listFiles(t.Context(), &b, root); err != nil {
			t.Fatal(err)
		}
		m, err := drift.ReadManifest(&b)
		if err != nil {
			t.Fatal(err)
		}
		return m
	}
	sh := func(script string) {
		t.Helper()
		cmd := exec.Command("sh", "-euc", script)
		cmd.Dir = dir
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
	}
	sh(`mkdir -p etc/sub; echo a > etc/a; chmod 4755 etc/a; ln etc/a etc/twin; ln -s "'to'" etc/link; mkfifo etc/pipe
echo q > etc/quiet; touch -d 2020-01-01 etc/quiet`)
	before := list()
	if before.Len() != 8 {
		t.Errorf("%d files, not 8", before.Len())
	}
	if r := drift.CompareManifests(before, list(), true, drift.Options{}); len(r.Changes) > 0 {
		t.Errorf("without a change: %+v", r.Changes)
	}
	sh(`chmod 0755 etc/a; ln -sf to etc/link; rmdir etc/sub; sed -i s/q/r/ etc/quiet; touch -d 2020-01-01 etc/quiet; mkdir etc/d`)
	var got []string
	for _, c := range drift.CompareManifests(before, list(), true, drift.Options{}).Changes {
		got = append(got, strings.TrimSpace(string(c.Op)+" "+c.Path+" "+strings.Join(c.What, ",")+" "+strings.Join(c.Links, ",")))
	}
	want := []string{"M /etc/a mode /etc/twin", "A /etc/d", "M /etc/link target", "M /etc/quiet content", "D /etc/sub"}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}
