// SPDX-License-Identifier: Apache-2.0

package bake

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/labfile/lab/internal/guest"
	"github.com/labfile/lab/internal/lab"
)

func bootStep(p lab.Provision) lab.BootStep {
	p.Kind = lab.ProvisionShell
	return lab.BootStep{Provision: p, Timeout: time.Minute}
}

func TestBootSteps(t *testing.T) {
	env := []string{"LAB_MACHINE=web-1", "LAB_NAME=it's $HOME"}
	for _, tt := range []struct {
		name   string
		step   lab.Provision
		script string
		out    []string
		code   int
	}{
		{"variables", shell("echo $LAB_MACHINE \"$LAB_NAME\" $HOME $DEBIAN_FRONTEND"), "", []string{"web-1 it's $HOME /root noninteractive"}, 0},
		{"its input is empty", shell("cat; echo end >&2"), "", []string{"end"}, 0},
		{"it ends at the first error", shell("echo a\nfalse\necho b"), "", []string{"a"}, 1},
		{"the script is what is handed over", lab.Provision{Script: "gone/x.sh", Args: []string{"a b"}}, "echo \"$1 ${0##*/}\"; exit 7", []string{"a b x.sh"}, 7},
		{"a script with its own interpreter", lab.Provision{Script: "x"}, "#!/bin/sh\nfalse\necho $LAB_MACHINE\n", []string{"web-1"}, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var got []string
			m := &Machine{Guest: here{}, Env: env}
			err := m.Boot(t.Context(), bootStep(tt.step), []byte(tt.script), func(line string) { got = append(got, line) })
			if diff := cmp.Diff(tt.out, got); diff != "" {
				t.Error(diff)
			}
			var failed *FailedError
			switch {
			case tt.code == 0 && err != nil:
				t.Error(err)
			case tt.code != 0 && (!errors.As(err, &failed) || failed.Code != tt.code || !cmp.Equal(tt.out, failed.Output)):
				t.Errorf("got error %v, want exit code %d and the output", err, tt.code)
			}
		})
	}
}

func TestBootStepsAreLimited(t *testing.T) {
	m := &Machine{Guest: here{}}
	step := bootStep(shell("echo begun; sleep 1000"))
	step.Timeout = time.Second
	err := m.Boot(t.Context(), step, nil, func(string) {})
	var failed *FailedError
	if !errors.As(err, &failed) || err.Error() != "it did not end within 1s" || len(failed.Output) == 0 || failed.Output[0] != "begun" {
		t.Errorf("got %v (%+v)", err, failed)
	}
	var hint interface{ Hint() string }
	if !errors.As(err, &hint) || !strings.Contains(hint.Hint(), "timeout:") {
		t.Error("it names no next step")
	}

	ctx, cancel := context.WithCancelCause(t.Context())
	defer cancel(nil)
	why := errors.New("Ctrl-C")
	step.Timeout = time.Hour
	err = m.Boot(ctx, step, nil, func(string) { cancel(why) })
	if !errors.As(err, &failed) || failed.Error() == "it did not end within 1h" || len(failed.Output) == 0 || failed.Output[0] != "begun" {
		t.Errorf("got %v (%+v)", err, failed)
	}

	for limit, want := range map[time.Duration]string{
		10 * time.Minute: "10m", 90 * time.Second: "1m30s", time.Hour: "1h", 90 * time.Minute: "1h30m", 20 * time.Second: "20s", time.Hour + time.Second: "1h0m1s",
	} {
		if got := (&timeoutError{limit}).Error(); got != "it did not end within "+want {
			t.Errorf("%s is %q", limit, got)
		}
	}
}

// deaf is a guest that ends nothing, as an ssh server does with what sudo runs.
type deaf struct{ ended chan error }

func (d deaf) Run(ctx context.Context, c guest.Command) error {
	go func() { d.ended <- here{}.Run(context.WithoutCancel(ctx), c) }()
	<-ctx.Done()
	return context.Cause(ctx)
}

func TestTheGuestEndsABootStep(t *testing.T) {
	for _, program := range []string{"sleep 1000", "trap '' TERM; while :; do sleep 1000; done", "sleep 1000 & wait"} {
		t.Run(program, func(t *testing.T) {
			d := deaf{make(chan error, 1)}
			step := bootStep(shell("echo begun\n" + program))
			step.Timeout = 100 * time.Millisecond
			if err := (&Machine{Guest: d}).Boot(t.Context(), step, nil, func(string) {}); err == nil || err.Error() != "it did not end within 100ms" {
				t.Errorf("got %v", err)
			}
			select { // when nothing holds its output any longer
			case err := <-d.ended:
				if err == nil {
					t.Error("it succeeded")
				}
			case <-time.After(time.Minute):
				t.Error("it goes on")
			}
			if left, _ := filepath.Glob("/tmp/lab-step.*"); len(left) > 0 {
				t.Errorf("left behind: %v", left)
			}
		})
	}
}

// What ends a step in the guest is gone with the step, and ends nothing that it left running.
func TestBootStepLeavesWhatItStarted(t *testing.T) {
	step := bootStep(shell(`sleep 1000 >/dev/null 2>&1 & echo $!; ps -o pid= -o args= -A | grep "[s]leep 777" || :`))
	step.Timeout = 776 * time.Second
	var out []string
	if err := (&Machine{Guest: here{}}).Boot(t.Context(), step, nil, func(line string) { out = append(out, line) }); err != nil || len(out) == 0 {
		t.Fatalf("got %v, %q", err, out)
	}
	pid, err := strconv.Atoi(out[0])
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(pid, 0); err != nil {
		t.Errorf("what the step started has ended: %v", err)
	}
	_ = syscall.Kill(pid, syscall.SIGKILL)
	if len(out) != 2 {
		t.Fatalf("nothing watches the time: %q", out)
	}
	sleeper, err := strconv.Atoi(strings.Fields(out[1])[0])
	if err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(time.Minute); syscall.Kill(sleeper, 0) == nil; time.Sleep(10 * time.Millisecond) {
		if b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", sleeper)); len(b) == 0 {
			break // it has ended, and its parent does not ask
		}
		if time.Now().After(end) {
			t.Fatal("what watches the time goes on")
		}
	}
}

func TestBootDigests(t *testing.T) {
	dir := t.TempDir()
	put(t, dir, map[string]string{"a.sh": "true\n", "b.sh": "true\n", "large": strings.Repeat("x", int(maxScript)+1)})
	digest := func(p lab.Provision, limit time.Duration) string {
		t.Helper()
		b := bootStep(p)
		b.Timeout, b.Place = limit, limit.String()
		steps, err := BootSteps(dir, []lab.BootStep{b})
		if err != nil {
			t.Fatal(err)
		}
		if steps[0].Step == "" || (steps[0].File == "") != (p.Script == "") {
			t.Errorf("the digests of %s are %+v", p, steps[0])
		}
		return lab.BootDigest(steps)
	}
	a := digest(lab.Provision{Script: "a.sh"}, time.Minute)
	if b := digest(lab.Provision{Script: "a.sh"}, time.Hour); a != b {
		t.Error("the time limit and the place are part of the digest")
	}
	if err := os.Chmod(filepath.Join(dir, "a.sh"), 0o755); err != nil {
		t.Fatal(err)
	}
	if b := digest(lab.Provision{Script: "a.sh"}, time.Minute); a != b {
		t.Error("the mode of the script, which the guest never sees, is part of the digest")
	}
	seen := map[string]string{a: "a.sh"}
	for _, p := range []lab.Provision{
		shell("true"), shell("false"), {Script: "b.sh"}, {Script: "a.sh", Args: []string{"x"}}, {Script: "a.sh", Args: []string{"x", ""}},
	} {
		d := digest(p, time.Minute)
		if other := seen[d]; other != "" {
			t.Errorf("%s and %s are the same", p, other)
		}
		seen[d] = p.String()
	}
	put(t, dir, map[string]string{"a.sh": "false\n"})
	if b := digest(lab.Provision{Script: "a.sh"}, time.Minute); a == b {
		t.Error("the script's content is no part of the digest")
	}

	for script, want := range map[string]string{
		"none":  "Labfile:3:5: boot step \"shell none\": open " + filepath.Join(dir, "none") + ": no such file or directory",
		".":     "is a folder, not a file",
		"large": "large is larger than 4MiB; let provision put it into the image",
	} {
		b := bootStep(lab.Provision{Script: script})
		b.Place = "Labfile:3:5"
		_, err := BootSteps(dir, []lab.BootStep{b})
		var se *InputError
		if !errors.As(err, &se) || !strings.Contains(err.Error(), want) {
			t.Errorf("got error %v, want %q", err, want)
		}
	}
}
