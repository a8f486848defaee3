// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"errors"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/ledger"
)

// policed is a machine with a policy.
func policed(name lab.Name, policy lab.Shell) lab.Machine {
	m := machine(name)
	m.OnShell = policy
	return m
}

func kinds(t *testing.T, l *Lab) []string {
	t.Helper()
	records, err := l.History()
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, r := range records {
		switch r.Type {
		case ledger.MachineEntered, ledger.MachineTainted, ledger.MachineUntainted:
			got = append(got, r.Summary())
		}
	}
	return got
}

func TestEnterDoesWhatThePolicySays(t *testing.T) {
	b := newBench(t)
	l := b.open()
	w := b.want(policed("a", ""), policed("w", lab.ShellWarn), policed("t", lab.ShellTaint), policed("f", lab.ShellForbid))
	b.up(l, w)
	for _, c := range []struct {
		name    lab.Name
		policy  lab.Shell
		tainted bool
	}{{"a", lab.ShellAllow, false}, {"w", lab.ShellWarn, false}, {"t", lab.ShellTaint, true}, {"t", lab.ShellTaint, false}} {
		e, err := l.Enter(b.ctx, c.name, "exec", []string{"id"})
		if err != nil {
			t.Fatal(err)
		}
		if want := (Entry{Machine: c.name, Generation: 1, Policy: c.policy, Tainted: c.tainted}); e != want {
			t.Errorf("got %+v, want %+v", e, want)
		}
	}
	_, err := l.Enter(b.ctx, "f", "ssh", nil)
	var no *ForbiddenError
	if !errors.As(err, &no) || no.Machine != "f" || no.How != "ssh" || no.Hint() == "" {
		t.Errorf("got %v, want that it is forbidden", err)
	}
	if err := l.Admit("f", "ssh"); !errors.As(err, &no) {
		t.Errorf("got %v, want that it is forbidden", err)
	}
	var none *NoMachineError
	if _, err := l.Enter(b.ctx, "x", "ssh", nil); !errors.As(err, &none) {
		t.Errorf("got %v, want that there is no such machine", err)
	}
	me := person()
	want := []string{
		"a@1: exec by " + me + ": id", "w@1: exec by " + me + ": id",
		"t@1: exec by " + me + ": id", "t@1: tainted: exec by " + me + ": id", "t@1: exec by " + me + ": id",
	}
	if diff := cmp.Diff(want, kinds(t, l)); diff != "" {
		t.Error(diff)
	}
	p, err := l.Plan(b.ctx, w, UpOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"keep a", "keep w", "replace t", "keep f"}, actions(p)); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff([]string{"tainted: exec by " + me + ": id"}, p.Steps[2].Reasons); diff != "" {
		t.Error(diff)
	}
	b.up(l, w)
	b.expect(l, "a@1 ready", "f@1 ready", "t@2 ready", "w@1 ready")
	if p, err = l.Plan(b.ctx, w, UpOptions{}); err != nil || p.Changes() {
		t.Errorf("got %v, %v: the new generation must not be tainted", actions(p), err)
	}
}

// A change of the policy holds at once, for the same generation.
func TestPolicyChangesInPlace(t *testing.T) {
	b := newBench(t)
	l := b.open()
	b.up(l, b.want(policed("web", lab.ShellAllow)))
	if err := l.Admit("web", "ssh"); err != nil {
		t.Fatal(err)
	}
	p := b.up(l, b.want(policed("web", lab.ShellForbid)))
	if diff := cmp.Diff([]string{"on_shell changed: allow -> forbid"}, p.Steps[0].Changes); diff != "" {
		t.Error(diff)
	}
	var no *ForbiddenError
	if err := l.Admit("web", "ssh"); !errors.As(err, &no) {
		t.Errorf("got %v, want that it is forbidden", err)
	}
	b.expect(l, "web@1 ready")
}

func TestTaintAndUntaint(t *testing.T) {
	b := newBench(t)
	l := b.open()
	w := b.want(machine("web"), machine("db"))
	if err := l.Taint(b.ctx, nil, "x", Options{}); !errors.Is(err, ErrNoLab) {
		t.Errorf("got %v, want ErrNoLab", err)
	}
	b.up(l, w)
	lock, err := l.acquire("somebody else") // neither waits for another command
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Taint(b.ctx, []lab.Name{"web"}, "found drift", Options{}); err != nil {
		t.Fatal(err)
	}
	lock.release()
	st, err := l.Status(b.ctx)
	if err != nil {
		t.Fatal(err)
	}
	if !cmp.Equal(st.Machines[1].Tainted, []string{"found drift"}) || st.Machines[0].Tainted != nil {
		t.Errorf("got %q and %q", st.Machines[1].Tainted, st.Machines[0].Tainted)
	}
	// What is tainted can be stopped and started: that is not what "lab up" is asked for.
	if err := l.Stop(b.ctx, StopOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := l.Start(b.ctx, Options{}); err != nil {
		t.Fatal(err)
	}
	b.expect(l, "db@1 ready", "web@1 ready")
	for range 2 {
		if err := l.Untaint(b.ctx, []lab.Name{"web"}, "it was a false alarm", Options{}); err != nil {
			t.Fatal(err)
		}
	}
	if diff := cmp.Diff([]string{"web@1: tainted: found drift", "web@1: no longer tainted: it was a false alarm"}, kinds(t, l)); diff != "" {
		t.Error(diff)
	}
	if p := b.up(l, w); p.Changes() {
		t.Errorf("untainted, it is replaced: %v", actions(p))
	}
	var none *NoMachineError
	if err := l.Taint(b.ctx, []lab.Name{"nope"}, "", Options{}); !errors.As(err, &none) {
		t.Errorf("got %v, want that there is no such machine", err)
	}
}

// A machine older than its max_age is replaced by the next up, whatever then says.
func TestOverdueMachineIsReplaced(t *testing.T) {
	b := newBench(t)
	l := b.open()
	w := b.want(machine("old"), machine("young"))
	w.Machines[0].MaxAge = lab.Expiry{After: time.Millisecond, Then: lab.ExpiryStop}
	w.Machines[1].MaxAge = lab.Expiry{After: time.Hour, Then: lab.ExpiryReplace}
	b.up(l, w)
	time.Sleep(2 * time.Millisecond)
	st, err := l.Status(b.ctx)
	if err != nil {
		t.Fatal(err)
	}
	if st.Machines[0].Expired == "" || st.Machines[1].Expired != "" {
		t.Errorf("got %q and %q", st.Machines[0].Expired, st.Machines[1].Expired)
	}
	p := b.up(l, w)
	if diff := cmp.Diff([]string{"replace old", "keep young"}, actions(p)); diff != "" {
		t.Error(diff)
	}
	if !slices.ContainsFunc(p.Steps[0].Reasons, func(s string) bool { return len(s) > 9 && s[:9] == "expired: " }) {
		t.Errorf("the reasons are %q", p.Steps[0].Reasons)
	}
}

func TestSpan(t *testing.T) {
	for d, want := range map[time.Duration]string{
		250 * time.Millisecond: "250ms", 90 * time.Second: "1m30s", 2 * time.Minute: "2m", 61 * time.Minute: "1h1m",
		24 * time.Hour: "24h", 24*time.Hour + 20*time.Second: "24h", 90*time.Minute + 29*time.Second: "1h30m",
	} {
		if got := span(d); got != want {
			t.Errorf("%v: got %q, want %q", d, got, want)
		}
	}
}
