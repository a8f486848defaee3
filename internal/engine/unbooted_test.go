// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"errors"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/plan"
)

// expectHint checks an error, and that it has a next step.
func expectHint(t *testing.T, err error, text, hint string) {
	t.Helper()
	var h interface{ Hint() string }
	if err == nil || !strings.Contains(err.Error(), text) || !errors.As(err, &h) || !strings.Contains(h.Hint(), hint) {
		t.Errorf("got %v, want %q with the hint %q", err, text, hint)
	}
}

// However a generation whose boot steps failed comes to run, it does not count as ready.
func TestUnbootedIsNeverReady(t *testing.T) {
	b := newBench(t)
	b.withAgents()
	l := b.open()
	var failed *MachineError
	if _, err := l.Up(b.ctx, b.want(booted("web", lab.StopFirst, "exit 3\n")), UpOptions{}); !errors.As(err, &failed) || !failed.Enterable {
		t.Fatalf("got %v", err)
	}
	if err := l.Stop(b.ctx, StopOptions{}); err != nil {
		t.Fatal(err)
	}
	b.expect(l, "web@1 failed: its boot steps did not run to their end")
	if err := b.provider.Start(b.ctx, lab.Generation{Lab: l.ID(), Machine: "web", Number: 1}); err != nil {
		t.Fatal(err)
	}
	b.expect(l, "web@1 failed: its boot steps did not run to their end")
	list, err := b.List(b.ctx)
	if err != nil || len(list) != 1 || list[0].Ready != 0 {
		t.Errorf("the list is %+v, %v", list, err)
	}
}

func TestForbiddenMachineIsNotEnterable(t *testing.T) {
	b := newBench(t)
	b.withAgents()
	l := b.open()
	m := booted("web", lab.StopFirst, "exit 3\n")
	m.OnShell = lab.ShellForbid
	var failed *MachineError
	if _, err := l.Up(b.ctx, b.want(m), UpOptions{}); !errors.As(err, &failed) || !failed.Kept || failed.Enterable {
		t.Errorf("got %v, %+v", err, failed)
	}
}

func TestScriptChangesWhileThePlanIsShown(t *testing.T) {
	b := newBench(t)
	d := b.withAgents()
	l := b.open()
	b.script("join.sh", "join one\n")
	web := booted("web", lab.StopFirst)
	web.Boot = []lab.BootStep{bootOf(lab.Provision{Script: "join.sh", Place: "Labfile:7:9"})}
	_, err := l.Up(b.ctx, b.want(web), UpOptions{Options: Options{Confirm: func(plan.Plan) error {
		b.script("join.sh", "join two\n")
		return nil
	}}})
	expectHint(t, err, "the script was changed while the plan was shown", "run the command again")
	if left := b.there(l); len(left) > 0 {
		t.Errorf("made %v", left)
	}
	if seen := d.of("web@1"); len(seen) > 0 {
		t.Errorf("it ran %q", seen)
	}
}

// A script that is lost during the birth fails it before any step has run.
func TestScriptIsLostDuringTheBirth(t *testing.T) {
	b := newBench(t)
	d := b.withAgents()
	l := b.open()
	b.script("join.sh", "join one\n")
	web := booted("web", lab.StopFirst, "first\n")
	web.Boot = append(web.Boot, bootOf(lab.Provision{Script: "join.sh", Place: "Labfile:8:9"}))
	_, err := l.Up(b.ctx, b.want(web), UpOptions{Options: Options{Events: func(e Event) {
		if e.Stage == StageIdentity {
			b.script("join.sh", "join two\n")
			if err := os.RemoveAll(b.Dirs.Boot(l.ID())); err != nil {
				t.Error(err)
			}
		}
	}}})
	expectHint(t, err, `web: Labfile:8:9: boot step "shell join.sh": the script is not the one that generation 1 was born with, which the lab has lost`, `"lab up"`)
	if seen := d.of("web@1"); len(seen) != 1 || seen[0] != "identity web" {
		t.Errorf("it was asked for %q", seen)
	}
}

// What a boot step starts finds the proxy settings in the guest's own files.
func TestBootStepsFindTheProxies(t *testing.T) {
	b := newBench(t)
	d := b.withAgents()
	l := b.open()
	b.Getenv = proxied("http://127.0.0.1:3128")
	w := b.want(booted("web", lab.StopFirst, "first\n"))
	w.InheritProxy = true
	b.up(l, w)
	seen := d.of("web@1")
	if told, ran := slices.Index(seen, "proxies"), slices.Index(seen, "first\n"); told < 0 || ran < told {
		t.Errorf("it was asked for %q", seen)
	}
}
