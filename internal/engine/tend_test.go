// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/ledger"
	"github.com/labfile/lab/providers"
)

func TestFallDue(t *testing.T) {
	now := time.Date(2026, 5, 1, 12, 0, 0, 0, time.UTC)
	ago := func(d time.Duration) time.Time { return now.Add(-d) }
	hour := func(then lab.ExpiryAction) *ledger.Expiry { return &ledger.Expiry{After: time.Hour, Then: then} }
	tests := map[string]struct {
		life    ledger.Life
		phase   ledger.Phase
		ready   time.Duration // ago; negative for never
		stopped bool          // it does not run
		entered time.Duration // ago; 0 for never
		used    *use
		expires time.Duration
		want    []Due
		next    time.Time
	}{
		"no rules":       {ready: 1000 * time.Hour},
		"young":          {life: ledger.Life{MaxAge: hour(lab.ExpiryReplace)}, ready: 10 * time.Minute, next: now.Add(50 * time.Minute)},
		"old":            {life: ledger.Life{MaxAge: hour(lab.ExpiryReplace)}, ready: time.Hour, want: []Due{{"web", 3, lab.ExpiryReplace, "it is 1h old, and max_age is 1h"}}},
		"old, stopped":   {life: ledger.Life{MaxAge: hour(lab.ExpiryReplace)}, ready: 2 * time.Hour, phase: ledger.PhaseStopped, stopped: true},
		"old, to go":     {life: ledger.Life{MaxAge: hour(lab.ExpiryDestroy)}, ready: 2 * time.Hour, phase: ledger.PhaseStopped, stopped: true, want: []Due{{"web", 3, lab.ExpiryDestroy, "it is 2h old, and max_age is 1h"}}},
		"being made":     {life: ledger.Life{MaxAge: hour(lab.ExpiryReplace)}, ready: -1, phase: ledger.PhaseCreating},
		"being stopped":  {life: ledger.Life{MaxAge: hour(lab.ExpiryDestroy)}, ready: 2 * time.Hour, phase: ledger.PhaseStopping},
		"gone":           {life: ledger.Life{MaxAge: hour(lab.ExpiryDestroy)}, ready: 2 * time.Hour, phase: ledger.PhaseGone},
		"idle":           {life: ledger.Life{Idle: hour(lab.ExpiryStop)}, ready: 2 * time.Hour, used: &use{3, ago(90 * time.Minute), false}, want: []Due{{"web", 3, lab.ExpiryStop, "it was last used 1h30m ago, and idle is 1h"}}},
		"used lately":    {life: ledger.Life{Idle: hour(lab.ExpiryStop)}, ready: 2 * time.Hour, used: &use{3, ago(15 * time.Minute), false}, next: now.Add(45 * time.Minute)},
		"entered lately": {life: ledger.Life{Idle: hour(lab.ExpiryStop)}, ready: 2 * time.Hour, entered: 20 * time.Minute, used: &use{3, ago(90 * time.Minute), false}, next: now.Add(40 * time.Minute)},
		"in use":         {life: ledger.Life{Idle: hour(lab.ExpiryStop)}, ready: 2 * time.Hour, used: &use{3, ago(90 * time.Minute), true}},
		"unknown use":    {life: ledger.Life{Idle: hour(lab.ExpiryStop)}, ready: 2 * time.Hour},
		"use of another": {life: ledger.Life{Idle: hour(lab.ExpiryStop)}, ready: 2 * time.Hour, used: &use{2, ago(90 * time.Minute), false}},
		"idle, as new":   {life: ledger.Life{Idle: hour(lab.ExpiryReplace)}, ready: 2 * time.Hour, used: &use{3, ago(3 * time.Hour), false}},
		"idle, was used": {life: ledger.Life{Idle: hour(lab.ExpiryReplace)}, ready: 3 * time.Hour, used: &use{3, ago(2 * time.Hour), false}, want: []Due{{"web", 3, lab.ExpiryReplace, "it was last used 2h ago, and idle is 1h"}}},
		"old and idle":   {life: ledger.Life{MaxAge: hour(lab.ExpiryReplace), Idle: hour(lab.ExpiryStop)}, ready: 2 * time.Hour, used: &use{3, ago(90 * time.Minute), false}, want: []Due{{"web", 3, lab.ExpiryReplace, "it is 2h old, and max_age is 1h"}}},
		"the lab":        {life: ledger.Life{MaxAge: hour(lab.ExpiryReplace)}, ready: 2 * time.Hour, expires: 8 * time.Hour, want: []Due{{"", 0, lab.ExpiryDestroy, "the lab is 8h old, and expires is 8h"}}},
		"not yet":        {ready: time.Hour, expires: 9 * time.Hour, next: now.Add(time.Hour)},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			m := ledger.Machine{Name: "web", Generation: 3, Phase: tt.phase, Create: ledger.Create{Spec: ledger.Spec{Life: tt.life}}}
			if tt.phase == "" {
				m.Phase = ledger.PhaseReady
			}
			if tt.ready >= 0 {
				m.Ready = ago(tt.ready)
			}
			if tt.entered > 0 {
				m.LastEntered = ago(tt.entered)
			}
			seen := map[lab.Name][]providers.Machine{"web": {{Generation: lab.Generation{Machine: "web", Number: 3}, State: providers.StateRunning}}}
			if tt.stopped {
				seen["web"][0].State = providers.StateStopped
			}
			used := uses{}
			if tt.used != nil {
				used["web"] = *tt.used
			}
			due, next := fallDue(ledger.State{
				Opened: ledger.Opened{Expires: tt.expires}, Since: ago(8 * time.Hour), Machines: map[lab.Name]ledger.Machine{"web": m},
			}, seen, used, now)
			if diff := cmp.Diff(tt.want, due); diff != "" {
				t.Error(diff)
			}
			if len(tt.want) == 0 && !next.Equal(tt.next) {
				t.Errorf("next is %v, want %v", next, tt.next)
			}
		})
	}
}

// Each act is done, and recorded with why before it.
func TestTend(t *testing.T) {
	b := newBench(t)
	l := b.open()
	if _, err := l.Tend(b.ctx, Options{}); !errors.Is(err, ErrNoLab) {
		t.Errorf("got %v, want ErrNoLab", err)
	}
	short := func(then lab.ExpiryAction) lab.Expiry { return lab.Expiry{After: time.Millisecond, Then: then} }
	w := b.want(machine("keep"), machine("again"), machine("stop"), machine("gone"))
	w.Machines[1].MaxAge, w.Machines[2].MaxAge, w.Machines[3].MaxAge = short(lab.ExpiryReplace), short(lab.ExpiryStop), short(lab.ExpiryDestroy)
	b.up(l, w)
	time.Sleep(2 * time.Millisecond)
	lock, err := l.acquire("somebody else")
	if err != nil {
		t.Fatal(err)
	}
	var locked *LockedError
	if done, err := l.Tend(b.ctx, Options{}); !errors.As(err, &locked) || len(done) > 0 {
		t.Errorf("got %v, %v, want that the lab is locked", done, err)
	}
	lock.release()
	done, err := l.Tend(b.ctx, Options{Command: "supervisor"})
	if err != nil || len(done) != 3 {
		t.Fatalf("got %v, %v", done, err)
	}
	b.expect(l, "again@2 ready", "keep@1 ready", "stop@1 stopped")
	records, err := l.History()
	if err != nil {
		t.Fatal(err)
	}
	var expired []string
	for i, r := range records {
		if r.Type != ledger.MachineExpired {
			continue
		}
		expired = append(expired, string(r.Machine))
		if next := records[i+1]; next.Machine != r.Machine {
			t.Errorf("behind %q stands %q", r.Summary(), next.Summary())
		}
	}
	if diff := cmp.Diff([]string{"again", "gone", "stop"}, expired); diff != "" {
		t.Error(diff)
	}
	if g, err := l.Generation("again", 0); err != nil || len(g.Why) != 1 || !strings.HasPrefix(g.Why[0], "expired: it is ") {
		t.Errorf("generation 2 was born because %q, %v", g.Why, err)
	}
}

// A generation that was replaced or stopped between the look at the clock and the
// lock is left alone.
func TestTendLooksAgain(t *testing.T) {
	for _, then := range []lab.ExpiryAction{lab.ExpiryReplace, lab.ExpiryStop, lab.ExpiryDestroy} {
		t.Run(string(then), func(t *testing.T) {
			b := newBench(t)
			l := b.open()
			w := b.want(machine("web"))
			w.Machines[0].MaxAge = lab.Expiry{After: time.Hour, Then: then}
			b.up(l, w)
			due := []Due{{Machine: "web", Generation: 1, Then: then, Why: "it was old"}}
			b.rebuild(l, w)
			before, _ := l.History()
			done, err := l.tendAll(b.ctx, due, Options{})
			if err != nil || len(done) > 0 {
				t.Errorf("did %v, %v", done, err)
			}
			b.expect(l, "web@2 ready")
			if after, _ := l.History(); len(after) != len(before) {
				t.Errorf("%d records were written about it", len(after)-len(before))
			}
		})
	}
}

// Watch sees what is due, and a lab that has expired is gone in the end.
func TestWatchEndsAnExpiredLab(t *testing.T) {
	b := newBench(t)
	l := b.open()
	w := b.want(machine("web"))
	w.Expires = 300 * time.Millisecond
	b.up(l, w)
	ctx, stop := context.WithCancel(b.ctx)
	defer stop()
	var done []Due
	l.Watch(ctx, func(ctx context.Context) error {
		var err error
		done, err = l.Tend(context.WithoutCancel(ctx), Options{Command: "supervisor"})
		stop()
		return err
	})
	if len(done) != 1 || done[0].Machine != "" || done[0].Then != lab.ExpiryDestroy {
		t.Errorf("did %v", done)
	}
	if _, err := l.History(); !errors.Is(err, ErrNoLab) {
		t.Errorf("got %v, want that the lab is gone", err)
	}
}

// The supervisor counts use: a machine that nobody talks to is stopped, and a record
// of the use keeps it.
func TestIdleMachineIsStopped(t *testing.T) {
	b := newBench(t)
	l := b.open()
	w := b.want(machine("busy"), machine("idle"))
	for i := range w.Machines {
		w.Machines[i].Idle = lab.Expiry{After: time.Second, Then: lab.ExpiryStop}
	}
	b.up(l, w)
	for range 12 {
		time.Sleep(100 * time.Millisecond)
		if _, err := l.Enter(b.ctx, "busy", "exec", nil); err != nil {
			t.Fatal(err)
		}
	}
	done, err := l.Tend(b.ctx, Options{})
	if err != nil || len(done) != 1 || done[0].Machine != "idle" {
		t.Fatalf("got %v, %v", done, err)
	}
	b.expect(l, "busy@1 ready", "idle@1 stopped")
	if due, err := l.Due(b.ctx); err != nil || slices.ContainsFunc(due, func(d Due) bool { return d.Machine == "idle" }) {
		t.Errorf("what is stopped is still due: %v, %v", due, err)
	}
}
