// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/labfile/lab/boxes"
	"github.com/labfile/lab/internal/engine"
	"github.com/labfile/lab/internal/guest"
	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/labfile"
	"github.com/labfile/lab/internal/network"
	"github.com/labfile/lab/providers"
)

func TestExplain(t *testing.T) {
	for _, tc := range []struct {
		name  string
		err   error
		code  int
		text  string
		hints []string
	}{
		{"nothing", nil, 0, "", nil},
		{"a plain error", errors.New("it broke"), 1, "it broke", nil},
		{"a silent code", exitCode(2), 2, "", nil},
		{"a command's code", passOn(&guest.ExitError{Code: 42}), 42, "", nil},
		{"a command's signal", passOn(&guest.ExitError{Signal: "TERM"}), 143, "", nil},
		{"a code that is nobody's to pass on", &guest.ExitError{Code: 5}, 1, "command ended with exit code 5", nil},
		{
			"a Labfile that is not there", &labfileError{fmt.Errorf("reading the Labfile: %w", fs.ErrNotExist)}, 3,
			"reading the Labfile: file does not exist",
			[]string{`"lab init" writes one; -f FILE names another; "lab list" shows the labs there are`},
		},
		{
			"a Labfile of somebody else", &labfileError{fmt.Errorf("reading the Labfile: %w", fs.ErrPermission)}, 3,
			"reading the Labfile: permission denied",
			[]string{"see that it is a file which you may read; -f FILE names another"},
		},
		{
			"a stale lock", fmt.Errorf("%w: web", engine.ErrStaleLock), 3, "the lock file is not up to date: web",
			[]string{`"lab lock" pins what is missing`},
		},
		{"usage", usage("try this", "no %s", "way"), 3, "no way", []string{"try this"}},
		{
			"no Labfile", fmt.Errorf("%w in /tmp", labfile.ErrNotFound), 3, "no Labfile found in /tmp",
			[]string{`"lab init" writes one; -f FILE names another; "lab list" shows the labs there are`},
		},
		{
			"locked", &engine.LockedError{Lab: "a-1"}, 4, "lab a-1 is locked: another command works on it",
			[]string{`wait for it to end, or stop it; readers such as "lab status" work meanwhile`},
		},
		{
			"no machine, near", &engine.NoMachineError{Name: "wbe", Known: []lab.Name{"db", "web"}}, 3, `there is no machine "wbe"`,
			[]string{`did you mean "web"?`},
		},
		{
			"no machine, far", &engine.NoMachineError{Name: "mail", Known: []lab.Name{"db", "web"}}, 3, `there is no machine "mail"`,
			[]string{"the machines are db and web"},
		},
		{"no lab", engine.ErrNoLab, 1, "there is no such lab", []string{`"lab up" brings it up; "lab list" shows the labs there are`}},
		{
			"incapable", fmt.Errorf("starting: %w", providers.ErrIncapable), 5, "starting: host not capable",
			[]string{`"lab doctor" checks this host and names the cure for what it lacks`},
		},
		{"incapable, with its own hint", &hinted{providers.ErrIncapable, "install it"}, 5, "host not capable", []string{"install it"}},
		{
			"digest", fmt.Errorf("box: %w", boxes.ErrDigest), 1, "box: digest does not match",
			[]string{`if the new content is what you want, "lab lock --update" pins it; if not, do not trust its source`},
		},
		{
			"disk full", fmt.Errorf("writing: %w", syscall.ENOSPC), 1, "writing: no space left on device",
			[]string{`make room on the disk; "lab gc" and "lab box prune" remove what nobody needs`},
		},
		{
			"machines failed", &engine.UpError{
				Failed: []*engine.MachineError{
					{Machine: "web", Kept: true, Err: errors.New("not ready\x1b[2J")},
					{Machine: "db", Err: &hinted{errors.New("port 80 is taken"), "take another"}},
				},
				Skipped: []lab.Name{"api"},
			}, 1, "2 machines failed\nweb: not ready\\x1b[2J\ndb: port 80 is taken\nnot tried, because of what failed: api",
			[]string{
				"take another",
				`"lab logs web" shows what the machine printed, "lab console web" opens its console; the next "lab up" goes on from here`,
			},
		},
		{
			"a machine failed for want of a host", &engine.UpError{
				Failed: []*engine.MachineError{{Machine: "web", Err: fmt.Errorf("no qemu: %w", providers.ErrIncapable)}},
			}, 5, "1 machine failed\nweb: no qemu: host not capable",
			[]string{`"lab doctor" checks this host and names the cure for what it lacks`},
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			code, text, hints := testApp().explain(context.Background(), tc.err)
			if code != tc.code || text != tc.text {
				t.Errorf("got %d, %q, want %d, %q", code, text, tc.code, tc.text)
			}
			if diff := cmp.Diff(tc.hints, hints); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// Of several problems each has its own next step, and none is told twice.
func TestSeveralProblems(t *testing.T) {
	taken := func(machine string) error {
		return fmt.Errorf("machine %q: %w", machine, &network.PortError{Port: 80, Err: syscall.EACCES})
	}
	privileged := []string{"choose a host port from 1024 up, or 0 to have one picked"}
	doctor := []string{`"lab doctor" checks this host and names the cure for what it lacks`}
	small := fmt.Errorf("machine %q: %w: it is small", "db", providers.ErrIncapable)
	for _, tc := range []struct {
		name string
		err  error
		code int
		want []problem
	}{
		{"none", nil, 0, nil},
		{"one", taken("web"), 1, []problem{{`machine "web": port 80 of 127.0.0.1 is reserved for root`, privileged}}},
		{"one of several", errors.Join(nil, taken("web"), nil), 1, []problem{{`machine "web": port 80 of 127.0.0.1 is reserved for root`, privileged}}},
		{
			"several", errors.Join(errors.Join(taken("a")), small, errors.Join(taken("b"), errors.New("it broke"))), 5,
			[]problem{
				{"machine \"a\": port 80 of 127.0.0.1 is reserved for root\nmachine \"b\": port 80 of 127.0.0.1 is reserved for root", privileged},
				{`machine "db": host not capable: it is small`, doctor},
				{"it broke", nil},
			},
		},
		{"the same twice", errors.Join(small, small), 5, []problem{{`machine "db": host not capable: it is small`, doctor}}},
		{
			"wrapped", fmt.Errorf("going back to web@1: %w", errors.Join(small, taken("web"))), 5,
			[]problem{
				{`going back to web@1: machine "db": host not capable: it is small`, doctor},
				{`going back to web@1: machine "web": port 80 of 127.0.0.1 is reserved for root`, privileged},
			},
		},
		{
			"with a next step for the whole", &hinted{errors.Join(small, taken("web")), "think again"}, 5,
			[]problem{{"machine \"db\": host not capable: it is small\nmachine \"web\": port 80 of 127.0.0.1 is reserved for root", []string{"think again"}}},
		},
		{
			"in a sentence", fmt.Errorf("%w; %w", small, taken("web")), 5,
			[]problem{{`machine "db": host not capable: it is small; machine "web": port 80 of 127.0.0.1 is reserved for root`, privileged}},
		},
		{
			"machines that failed, and something else",
			errors.Join(&engine.UpError{Failed: []*engine.MachineError{{Machine: "web", Err: errors.Join(small, taken("web"))}}}, errors.New("it broke")), 5,
			[]problem{
				{"1 machine failed\nweb: machine \"db\": host not capable: it is small\nweb: machine \"web\": port 80 of 127.0.0.1 is reserved for root", slices.Concat(doctor, privileged)},
				{"it broke", nil},
			},
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			code, got := testApp().problems(context.Background(), tc.err)
			if code != tc.code {
				t.Errorf("exit code %d, want %d", code, tc.code)
			}
			if diff := cmp.Diff(tc.want, got, cmp.AllowUnexported(problem{})); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestExplainInterruption(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	for want, err := range map[string]error{
		"interrupted":                      fmt.Errorf("booting: %w", context.Canceled),
		"interrupted\nundoing web@1: busy": errors.Join(context.Canceled, errors.New("undoing web@1: busy")),
	} {
		code, text, hints := testApp().explain(ctx, err)
		if code != ExitInterrupted || text != want || hints != nil {
			t.Errorf("got %d, %q, %q, want %d, %q", code, text, hints, ExitInterrupted, want)
		}
	}
}

func TestSayNamesTheSameLab(t *testing.T) {
	a := testApp()
	a.set = values{"file": {"my file"}, "name": {"two"}}
	if got, want := a.say("logs web"), "lab logs web -f 'my file' --name two"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}
