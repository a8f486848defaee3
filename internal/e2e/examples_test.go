// SPDX-License-Identifier: Apache-2.0

//go:build e2e

package e2e

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// example makes a site with a copy of a folder of examples.
func (w *world) example(t *testing.T, name string) *site {
	t.Helper()
	from := filepath.Join("../../examples", name)
	labfile, err := os.ReadFile(filepath.Join(from, "Labfile"))
	if err != nil {
		t.Fatal(err)
	}
	s := w.site(t, string(labfile))
	err = filepath.WalkDir(from, func(path string, d fs.DirEntry, err error) error {
		rel, relErr := filepath.Rel(from, path)
		if err = errors.Join(err, relErr); err != nil || rel == "." || rel == "Labfile" {
			return err
		}
		to := filepath.Join(s.dir, rel)
		if d.IsDir() {
			return errors.Join(os.Mkdir(to, 0o755), w.own(to))
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		text, err := os.ReadFile(path)
		return errors.Join(err, os.WriteFile(to, text, info.Mode().Perm()), w.own(to))
	})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// TestExampleCluster brings up the three nodes, and loses one: it comes back to the others,
// with its data.
func TestExampleCluster(t *testing.T) {
	s := ordinary(t).example(t, "cluster")
	s.ok("up")
	s.ok("burn", "node-2", "--yes")
	for _, name := range []string{"node-1", "node-2", "node-3"} {
		s.equal("the node's data", s.ok("exec", name, "--", "cat /srv/data/name"), name+"\n")
		s.equal("what the node sees", s.ok("exec", name, "--", "member quorum 3"), "3 of 3 answer\n")
	}
	if r := s.verify(0); r.Passed != 6 {
		t.Errorf("%d checks passed, want 6", r.Passed)
	}
	s.ok("destroy", "--yes", "--volumes")
}

// TestExampleCI runs the job: what it says, that it reports, and that it leaves nothing,
// neither when it passes nor when a check fails.
func TestExampleCI(t *testing.T) {
	s := ordinary(t).example(t, "ci")
	job := func(version string) (string, error) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		cmd := s.command(ctx, []string{"PATH=" + filepath.Dir(labBinary) + ":" + os.Getenv("PATH"), "VERSION=" + version}, "./run")
		var out, errOut bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &errOut
		err := cmd.Run()
		t.Logf("the job's standard error:\n%s", errOut.String())
		return out.String(), err
	}
	out, err := job("1.2.3")
	if err != nil {
		t.Fatalf("the job failed: %v", err)
	}
	s.equal("what the job says", out, "app serves version 1.2.3\n")
	if report := string(read(s, filepath.Join(s.dir, "junit.xml"))); !strings.Contains(report, `tests="5" failures="0"`) {
		t.Errorf("the report is\n%s", report)
	}
	s.nothingLeft()

	s.write("Labfile", strings.Replace(string(read(s, filepath.Join(s.dir, "Labfile"))), "dns: app}", "dns: nowhere}", 1))
	if out, err = job("1.2.3"); err == nil {
		t.Errorf("the job passed although a check fails:\n%s", out)
	}
	if report := string(read(s, filepath.Join(s.dir, "junit.xml"))); !strings.Contains(report, `failures="1"`) {
		t.Errorf("the report is\n%s", report)
	}
	s.nothingLeft()
}
