// SPDX-License-Identifier: Apache-2.0

package bake

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/labfile/lab/internal/guest"
	"github.com/labfile/lab/internal/lab"
)

// here runs shell steps on this host, as the user of the tests: what they do here is
// harmless.
type here struct{}

func (here) Run(ctx context.Context, c guest.Command) error {
	cmd := exec.CommandContext(ctx, c.Args[0], c.Args[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = c.Stdin, c.Stdout, c.Stderr
	// As the guest's ssh server does it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM) }
	err := cmd.Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return &guest.ExitError{Code: exit.ExitCode()}
	}
	return err
}

func TestShellSteps(t *testing.T) {
	dir := t.TempDir()
	put(t, dir, map[string]string{
		"plain.sh": "echo \"$0 $1\" | sed 's,.*/,,'\nfalse\necho not reached\n",
		"own.sh":   "#!/bin/sh\nfalse\necho \"$# $2\"\n",
	})
	for _, tt := range []struct {
		name string
		step lab.Provision
		out  []string
		code int
	}{
		{"output of both streams", shell("echo a\necho b >&2\nprintf 'c\\rd'"), []string{"a", "b", "c", "d"}, 0},
		{"it ends at the first error", shell("echo a\nfalse\necho b"), []string{"a"}, 1},
		{"exit code", shell("exit 7"), nil, 7},
		{"its input is empty", shell("cat; echo end"), []string{"end"}, 0},
		{"environment", shell("echo $HOME $DEBIAN_FRONTEND; umask"), []string{"/root noninteractive", "0022"}, 0},
		{"variables of lab", shell("echo $http_proxy; cat; env | grep -c _proxy="), []string{"http://a:b%20@p:1", "1"}, 0},
		{"a script", lab.Provision{Script: "plain.sh", Args: []string{"it's"}}, []string{"plain.sh it's"}, 1},
		{"a script with its own interpreter", lab.Provision{Script: "own.sh", Args: []string{"a", "b c"}}, []string{"2 b c"}, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			tt.step.Kind = lab.ProvisionShell
			layers, err := NewKeys(dir).Layers(box, []lab.Provision{tt.step})
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			m := &Machine{Guest: here{}, Dir: dir}
			if strings.HasPrefix(tt.name, "variables") {
				m.Env = []string{"http_proxy=http://a:b%20@p:1"}
			}
			err = m.Run(t.Context(), tt.step, layers[0], func(line string) { got = append(got, line) })
			if diff := cmp.Diff(tt.out, got); diff != "" {
				t.Error(diff)
			}
			var failed *FailedError
			switch {
			case tt.code == 0 && err != nil:
				t.Error(err)
			case tt.code != 0 && (!errors.As(err, &failed) || failed.Code != tt.code):
				t.Errorf("got error %v, want exit code %d", err, tt.code)
			case tt.code != 0:
				if diff := cmp.Diff(tt.out, failed.Output); diff != "" {
					t.Error(diff)
				}
			}
			if left, _ := filepath.Glob("/tmp/lab-step.*"); len(left) > 0 {
				t.Errorf("left behind: %v", left)
			}
		})
	}
}

func TestScriptThatChangedIsNotRun(t *testing.T) {
	dir := t.TempDir()
	put(t, dir, map[string]string{"x.sh": "true\n"})
	p := lab.Provision{Kind: lab.ProvisionShell, Script: "x.sh"}
	layers, err := NewKeys(dir).Layers(box, []lab.Provision{p})
	if err != nil {
		t.Fatal(err)
	}
	put(t, dir, map[string]string{"x.sh": "false\n"})
	m := &Machine{Guest: here{}, Dir: dir}
	if err := m.Run(t.Context(), p, layers[0], func(string) {}); !errors.Is(err, errChanged) {
		t.Errorf("got error %v", err)
	}
}

func TestRootIsReachedBySudo(t *testing.T) {
	m := &Machine{Sudo: true}
	want := []string{"sudo", "-n", "--", "/bin/sh", "-c", "id", "lab-step", "x"}
	if diff := cmp.Diff(want, m.sh("id", "x")); diff != "" {
		t.Error(diff)
	}
}

func TestTailIsShort(t *testing.T) {
	n := 0
	l := &lines{tell: func(string) { n++ }}
	for range 100 {
		l.Write([]byte("x\n\n"))
	}
	l.Write(bytes.Repeat([]byte("y"), 2*maxLine))
	l.end()
	if n != 101 || len(l.last) != tailLines || len(l.last[tailLines-1]) != maxLine {
		t.Errorf("%d lines told, %d kept, the last has %d bytes", n, len(l.last), len(l.last[len(l.last)-1]))
	}
}

// The clean-up runs where no tool can be taken for granted: it must at least be a
// program of the plainest shell.
func TestCleanIsAProgram(t *testing.T) {
	for _, sh := range [][]string{{"dash", "-n"}, {"busybox", "sh", "-n"}, {"sh", "-n"}} {
		path, err := exec.LookPath(sh[0])
		if err != nil {
			continue
		}
		cmd := exec.Command(path, sh[1:]...)
		cmd.Stdin = strings.NewReader(cleanProgram)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%s: %v\n%s", sh, err, out)
		}
	}
	if _, err := os.Stat("clean.sh"); err != nil {
		t.Error(err)
	}
}
