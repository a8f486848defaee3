// SPDX-License-Identifier: Apache-2.0

package program

import (
	"bufio"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

const parentVariable = "LAB_TEST_PROGRAM_PARENT"

func TestMain(m *testing.M) {
	if os.Getenv(parentVariable) != "" {
		cmd := exec.Command("sh", "-c", "echo started; exec sleep 1000")
		cmd.Stdout = os.Stdout
		Run(cmd)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// A program ends with the process that ran it: the pipe that only the program still
// holds is closed.
func TestRunKilled(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	parent := exec.Command(self)
	parent.Env = append(os.Environ(), parentVariable+"=1")
	parent.Stdout = w
	if err := parent.Start(); err != nil {
		t.Fatal(err)
	}
	w.Close()
	in := bufio.NewReader(r)
	if line, err := in.ReadString('\n'); err != nil || line != "started\n" {
		t.Fatalf("the program printed %q, %v", line, err)
	}
	if err := parent.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	parent.Wait()
	if rest, err := io.ReadAll(in); err != nil || len(rest) > 0 {
		t.Errorf("then %q, %v", rest, err)
	}
}

func TestLook(t *testing.T) {
	dir := t.TempDir()
	want := filepath.Join(dir, "lab-test-program")
	if err := os.WriteFile(want, []byte("#!/bin/sh\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir)
	if got, err := Look("lab-test-program"); err != nil || got != want {
		t.Errorf("found %q, %v; want %q", got, err, want)
	}
	if got, err := Look("lab-test-nothing"); !errors.Is(err, exec.ErrNotFound) {
		t.Errorf("found %q, %v", got, err)
	}
}
