// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/ledger"
	"github.com/labfile/lab/internal/plan"
	"github.com/labfile/lab/internal/supervise"
	"github.com/labfile/lab/providers"
)

// What a lab that was killed within a replacement by stop-first leaves, at every
// step: the generation before is never lost.
func TestKilledStopFirstIsUndoneByTheNext(t *testing.T) {
	type scene struct {
		*bench
		l         *Lab
		c         *supervise.Client
		old, next lab.Generation
		create    ledger.Create
	}
	record := func(s scene, ty ledger.Type, g lab.Generation, data any) error {
		_, err := s.l.book.Append(ledger.Record{Type: ty, Machine: g.Machine, Generation: g.Number}, data)
		return err
	}
	steps := []struct {
		name string
		do   func(scene) error
	}{
		{"to be stopped", func(s scene) error { return record(s, ledger.MachineStop, s.old, nil) }},
		{"unplugged", func(s scene) error { return s.c.Unplug(s.ctx, s.old) }},
		{"stopped", func(s scene) error { return s.provider.Stop(s.ctx, s.old, 0) }},
		{"recorded", func(s scene) error { return record(s, ledger.MachineStopped, s.old, nil) }},
		{"intended", func(s scene) error { return record(s, ledger.MachineCreate, s.next, s.create) }},
		{"created", func(s scene) error {
			return s.provider.Create(s.ctx, providers.Spec{
				Generation: s.next, CPUs: 1, Memory: lab.MiB, MAC: lab.MACOf(s.create.Address), Image: providers.Image{Arch: "amd64"},
			})
		}},
		{"running", func(s scene) error { return s.provider.Start(s.ctx, s.next) }},
		{"plugged in", func(s scene) error {
			_, err := s.c.Plug(s.ctx, supervise.Machine{Generation: s.next, Role: "web", Addr: s.create.Address})
			return err
		}},
		{"failed", func(s scene) error { return record(s, ledger.MachineFailed, s.next, ledger.Failed{Error: "no answer"}) }},
	}
	for last := range steps {
		for _, by := range []string{"up", "start", "stop"} {
			t.Run(steps[last].name+", then "+by, func(t *testing.T) {
				b := newBench(t)
				l := b.open()
				w := b.want(replaced("web", lab.StopFirst))
				b.up(l, w)
				state, _ := l.read()
				c, err := supervise.Dial(b.ctx, b.Dirs, l.ID())
				if err != nil {
					t.Fatal(err)
				}
				defer c.Close()
				s := scene{
					b, l, c,
					lab.Generation{Lab: l.ID(), Machine: "web", Number: 1},
					lab.Generation{Lab: l.ID(), Machine: "web", Number: 2},
					state.Machines["web"].Create,
				}
				for _, step := range steps[:last+1] {
					if err := step.do(s); err != nil {
						t.Fatal(err)
					}
				}
				c.Close()

				if found, err := b.GC(b.ctx, false); err != nil || len(found) > 0 {
					t.Errorf("gc removed %v, %v", found, err)
				}
				before, _ := l.History()
				planned, err := l.PlanFor(b.ctx, w, UpOptions{})
				if err != nil {
					t.Fatal(err)
				}
				if step := planned.Plan.Steps[0]; step.Generation != 1 || step.Action != plan.Start || len(step.Leftovers) > 0 {
					t.Errorf("the plan is %+v", step)
				}
				left, err := l.read()
				if err != nil {
					t.Fatal(err)
				}
				said := strings.Contains(planned.Plan.Steps[0].Undone, "replacement by generation 2 was interrupted")
				if half := left.Machines["web"].Generation == 2; said != half {
					t.Errorf("it is half done: %v, and said: %v", half, said)
				}
				if step := planned.Plan.Steps[0]; step.Undone != "" && step.Next != 0 {
					t.Errorf("the plan is %+v", step)
				}
				if after, _ := l.History(); len(after) != len(before) {
					t.Errorf("looking wrote %d records", len(after)-len(before))
				}
				switch by {
				case "up":
					if _, err := l.Up(b.ctx, w, UpOptions{Exactly: &planned}); err != nil {
						t.Fatal(err)
					}
				case "start":
					if err := l.Start(b.ctx, Options{}); err != nil {
						t.Fatal(err)
					}
				case "stop":
					if err := record(s, ledger.MachineTainted, s.old, ledger.Tainted{Why: "meanwhile"}); err != nil {
						t.Fatal(err)
					}
					if err := l.Stop(b.ctx, StopOptions{}); err != nil {
						t.Fatal(err)
					}
				}
				running := "web@1 running"
				if by == "stop" {
					running = "web@1 stopped"
					b.expect(l, "web@1 stopped")
					state, _ = l.read()
					if m := state.Machines["web"]; !slices.Equal(m.Tainted, []string{"meanwhile"}) {
						t.Errorf("generation %d is tainted %q", m.Generation, m.Tainted)
					}
				} else {
					b.expect(l, "web@1 ready")
					b.expectPlugged(l, "web@1 present")
				}
				if steps[last].name == "failed" {
					b.expectThere(l, running, "web@2 stopped") // kept to be looked at
				} else {
					b.expectThere(l, running)
				}
				b.up(l, w)
				if p := b.up(l, w); p.Changes() {
					t.Errorf("there is still something to do: %+v", p)
				}
			})
		}
	}
}

// A killed blue-green replacement leaves two that run; stop leaves none.
func TestStopEndsWhatWasStandingBy(t *testing.T) {
	b := newBench(t)
	l := b.open()
	b.up(l, b.want(replaced("web", lab.BlueGreen)))
	state, _ := l.read()
	create := state.Machines["web"].Create
	create.Standby = true
	if _, err := l.book.Append(ledger.Record{Type: ledger.MachineCreate, Machine: "web", Generation: 2}, create); err != nil {
		t.Fatal(err)
	}
	next := lab.Generation{Lab: l.ID(), Machine: "web", Number: 2}
	if err := b.provider.Create(b.ctx, providers.Spec{Generation: next, CPUs: 1, Memory: lab.MiB, Image: providers.Image{Arch: "amd64"}}); err != nil {
		t.Fatal(err)
	}
	if err := b.provider.Start(b.ctx, next); err != nil {
		t.Fatal(err)
	}
	if err := l.Stop(b.ctx, StopOptions{}); err != nil {
		t.Fatal(err)
	}
	b.expectThere(l, "web@1 stopped", "web@2 stopped")
}

// Ctrl-C while the generation before is shut down: that comes to its end.
func TestInterruptedPark(t *testing.T) {
	b := newBench(t)
	l := b.open()
	w := b.want(replaced("web", lab.StopFirst))
	b.up(l, w)
	ctx, cancel := context.WithCancel(b.ctx)
	defer cancel()
	_, err := l.Rebuild(ctx, w, UpOptions{Options: Options{Events: func(e Event) {
		if e.Stage == StageStop {
			cancel()
		}
	}}})
	if !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	b.expect(l, "web@1 stopped")
	b.expectThere(l, "web@1 stopped")
}
