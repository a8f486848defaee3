// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/ledger"
	"github.com/labfile/lab/internal/plan"
	"github.com/labfile/lab/internal/supervise"
	"github.com/labfile/lab/providers"
)

// replaced is a machine that is replaced by a strategy.
func replaced(name lab.Name, s lab.Strategy) lab.Machine {
	m := machine(name)
	m.Replace = lab.DefaultReplace
	m.Replace.Strategy, m.Replace.Drain = s, 100*time.Millisecond
	return m
}

// broken is a machine that never becomes ready.
func broken(m lab.Machine) lab.Machine {
	m.Ready = []lab.Check{{Kind: lab.CheckConsole, Pattern: "never printed", Timeout: 100 * time.Millisecond, Interval: 10 * time.Millisecond}}
	m.Memory++
	return m
}

// there says of every generation that the provider has "name@n state".
func (b *bench) there(l *Lab) []string {
	b.t.Helper()
	all, err := b.provider.List(b.ctx, l.ID())
	if err != nil {
		b.t.Fatal(err)
	}
	got := []string{}
	for _, m := range all {
		got = append(got, fmt.Sprintf("%s %s", m.Generation, m.State))
	}
	return got
}

func (b *bench) expectThere(l *Lab, want ...string) {
	b.t.Helper()
	if diff := cmp.Diff(want, b.there(l)); diff != "" {
		b.t.Error(diff)
	}
}

// plugged says of every generation that the supervisor knows "name@n phase".
func (b *bench) plugged(l *Lab) []string {
	b.t.Helper()
	c, err := supervise.Dial(b.ctx, b.Dirs, l.ID())
	if err != nil {
		b.t.Fatal(err)
	}
	defer c.Close()
	st, err := c.Status(b.ctx)
	if err != nil {
		b.t.Fatal(err)
	}
	var got []string
	for _, m := range st.Machines {
		got = append(got, fmt.Sprintf("%s %s", m.Generation, m.Phase))
	}
	return got
}

func (b *bench) expectPlugged(l *Lab, want ...string) {
	b.t.Helper()
	if diff := cmp.Diff(want, b.plugged(l)); diff != "" {
		b.t.Error(diff)
	}
}

func (b *bench) rebuild(l *Lab, w *lab.Lab) plan.Plan {
	b.t.Helper()
	p, err := l.Rebuild(b.ctx, w, UpOptions{})
	if err != nil {
		b.t.Fatal(err)
	}
	return p
}

// The old generation runs until the next one has taken over, with its ports.
func TestBlueGreen(t *testing.T) {
	b := newBench(t)
	l := b.open()
	m := replaced("web", lab.BlueGreen)
	m.Ports = []lab.Forward{{GuestPort: 80}}
	w := b.want(m)
	b.up(l, w)
	before, _ := l.Status(b.ctx)
	var during []string
	p, err := l.Rebuild(b.ctx, w, UpOptions{Options: Options{Events: func(e Event) {
		if e.Stage == StageHandover && during == nil {
			during = slices.Concat(b.there(l), b.plugged(l))
		}
	}}})
	if err != nil {
		t.Fatal(err)
	}
	if p.Steps[0].Strategy != lab.BlueGreen || p.Steps[0].Leftovers != nil {
		t.Errorf("the plan was %+v", p.Steps[0])
	}
	if diff := cmp.Diff([]string{"web@1 running", "web@2 running", "web@1 present", "web@2 standby"}, during); diff != "" {
		t.Error(diff)
	}
	b.expect(l, "web@2 ready")
	b.expectThere(l, "web@1 stopped", "web@2 running")
	b.expectPlugged(l, "web@2 present")
	after, _ := l.Status(b.ctx)
	if diff := cmp.Diff(before.Machines[0].Ports, after.Machines[0].Ports); diff != "" || after.Machines[0].Address != before.Machines[0].Address {
		t.Errorf("address %s became %s, ports: %s", before.Machines[0].Address, after.Machines[0].Address, diff)
	}
	if p := b.up(l, w); p.Changes() {
		t.Errorf("there is still something to do: %+v", p)
	}
}

// Of the generations that gave way the newest are kept, whatever the strategy, and
// neither up nor gc touches them.
func TestRetention(t *testing.T) {
	for _, s := range []lab.Strategy{lab.StopFirst, lab.BlueGreen} {
		t.Run(string(s), func(t *testing.T) {
			b := newBench(t)
			l := b.open()
			m := replaced("web", s)
			w := b.want(m)
			b.up(l, w)
			for range 3 {
				b.rebuild(l, w)
			}
			b.expect(l, "web@4 ready")
			b.expectThere(l, "web@2 stopped", "web@3 stopped", "web@4 running")
			if found, err := b.GC(b.ctx, false); err != nil || len(found) != 0 {
				t.Errorf("gc found %v, %v", found, err)
			}
			if p := b.up(l, w); p.Changes() {
				t.Errorf("there is still something to do: %+v", p)
			}
			m.Replace.Keep = 1
			if p := b.up(l, b.want(m)); !slices.Equal(p.Steps[0].Leftovers, []int{2}) {
				t.Errorf("with fewer to keep: %+v", p.Steps[0])
			}
			b.expectThere(l, "web@3 stopped", "web@4 running")
			m.Replace.Keep = 0
			b.rebuild(l, b.want(m))
			b.expectThere(l, "web@5 running")
		})
	}
}

// A generation that never becomes ready takes nobody's place.
func TestFailureChangesNothing(t *testing.T) {
	for _, s := range []lab.Strategy{lab.StopFirst, lab.BlueGreen} {
		for _, f := range []lab.OnFailure{lab.KeepFailed, lab.DiscardFailed} {
			t.Run(string(s)+", "+string(f), func(t *testing.T) {
				b := newBench(t)
				l := b.open()
				m := replaced("web", s)
				m.Replace.OnFailure = f
				b.up(l, b.want(m))
				_, err := l.Up(b.ctx, b.want(broken(m)), UpOptions{})
				var up *UpError
				if !errors.As(err, &up) || len(up.Failed) != 1 {
					t.Fatalf("got error %v", err)
				}
				e := up.Failed[0]
				if e.Instead != 1 || e.Generation != 2 || e.Kept != (f == lab.KeepFailed) ||
					!strings.HasPrefix(e.Error(), "web: generation 2 did not take over, generation 1 stays: ") {
					t.Errorf("the machine's error is %+v", e)
				}
				b.expect(l, "web@1 ready")
				b.expectPlugged(l, "web@1 present")
				if f == lab.DiscardFailed {
					b.expectThere(l, "web@1 running")
				} else {
					b.expectThere(l, "web@1 running", "web@2 stopped")
				}
				if found, err := b.GC(b.ctx, false); err != nil || len(found) != 0 {
					t.Errorf("gc found %v, %v", found, err)
				}
				if p := b.up(l, b.want(m)); p.Changes() {
					t.Errorf("with the old Labfile, there is still something to do: %+v", p)
				}
				// The next replacement has no use for what failed.
				b.rebuild(l, b.want(m))
				b.expect(l, "web@3 ready")
				b.expectThere(l, "web@1 stopped", "web@3 running")
			})
		}
	}
}

// A machine that was stopped before its replacement failed is stopped behind it.
func TestFailureDoesNotStartWhatWasStopped(t *testing.T) {
	b := newBench(t)
	l := b.open()
	m := replaced("web", lab.BlueGreen)
	b.up(l, b.want(m))
	if err := l.Stop(b.ctx, StopOptions{}); err != nil {
		t.Fatal(err)
	}
	p, err := l.Up(b.ctx, b.want(broken(m)), UpOptions{})
	if err == nil || p.Steps[0].Strategy != lab.StopFirst || p.Steps[0].StrategyWhy != plan.NotRunning {
		t.Fatalf("got %+v, %v", p.Steps[0], err)
	}
	b.expect(l, "web@1 stopped")
}

// A port that cannot be had is found at the last moment, and costs nothing.
func TestTakeOverWithoutItsPort(t *testing.T) {
	b := newBench(t)
	l := b.open()
	other := machine("other")
	other.Ports = []lab.Forward{{GuestPort: 80}}
	m := replaced("web", lab.BlueGreen)
	b.up(l, b.want(m, other))
	st, _ := l.Status(b.ctx)
	m.Memory++
	m.Ports = []lab.Forward{{HostPort: st.Machines[0].Ports[0].Host, GuestPort: 80}}
	_, err := l.Up(b.ctx, b.want(m, other), UpOptions{})
	var up *UpError
	if !errors.As(err, &up) || up.Failed[0].Instead != 1 || up.Failed[0].Stage != StageHandover {
		t.Fatalf("got error %v", err)
	}
	b.expect(l, "other@1 ready", "web@1 ready")
	b.expectPlugged(l, "other@1 present", "web@1 present")
	b.expectThere(l, "other@1 running", "web@1 running", "web@2 stopped")
}

func TestInterruptedHandOver(t *testing.T) {
	for _, stage := range []Stage{StageCreate, StageBoot, StageCheck, StageHandover, StageReady} {
		t.Run(string(stage), func(t *testing.T) {
			b := newBench(t)
			l := b.open()
			w := b.want(replaced("web", lab.BlueGreen))
			b.up(l, w)
			ctx, cancel := context.WithCancel(b.ctx)
			defer cancel()
			_, err := l.Rebuild(ctx, w, UpOptions{Options: Options{Events: func(e Event) {
				if e.Stage == stage {
					cancel()
				}
			}}})
			if !errors.Is(err, context.Canceled) {
				t.Fatalf("got error %v", err)
			}
			if stage == StageHandover || stage == StageReady { // too late to go back
				b.expect(l, "web@2 ready")
				b.expectThere(l, "web@1 stopped", "web@2 running")
				b.expectPlugged(l, "web@2 present")
			} else {
				b.expect(l, "web@1 ready")
				b.expectThere(l, "web@1 running")
				b.expectPlugged(l, "web@1 present")
			}
			if p := b.up(l, w); p.Changes() {
				t.Errorf("there is still something to do: %+v", p)
			}
		})
	}
}

// What a lab that was killed within a handover leaves, at every step.
func TestKilledHandOverIsFinishedByTheNext(t *testing.T) {
	type step struct {
		name   string
		record ledger.Type
		do     func(b *bench, c *supervise.Client, old, next lab.Generation, rec ledger.Machine) error
	}
	steps := []step{
		{"intended", ledger.MachineCreate, nil},
		{"created", "", func(b *bench, _ *supervise.Client, _, next lab.Generation, rec ledger.Machine) error {
			return b.provider.Create(b.ctx, providers.Spec{
				Generation: next, CPUs: 1, Memory: lab.MiB, MAC: lab.MACOf(rec.Create.Address), Image: providers.Image{Arch: "amd64"},
			})
		}},
		{"running", "", func(b *bench, _ *supervise.Client, _, next lab.Generation, _ ledger.Machine) error {
			return b.provider.Start(b.ctx, next)
		}},
		{"plugged in", "", func(b *bench, c *supervise.Client, _, next lab.Generation, rec ledger.Machine) error {
			_, err := c.Plug(b.ctx, supervise.Machine{Generation: next, Role: "web", Addr: rec.Create.Address, Standby: true})
			return err
		}},
		{"ready", ledger.MachineReady, nil},
		{"recorded", ledger.MachinePromoted, nil},
		{"promoted", "", func(b *bench, c *supervise.Client, _, next lab.Generation, rec ledger.Machine) error {
			_, err := c.Promote(b.ctx, next, nil, time.Minute)
			return err
		}},
		{"drained", "", func(b *bench, c *supervise.Client, old, _ lab.Generation, _ ledger.Machine) error {
			return c.Unplug(b.ctx, old)
		}},
		{"stopped", "", func(b *bench, _ *supervise.Client, old, _ lab.Generation, _ ledger.Machine) error {
			return b.provider.Stop(b.ctx, old, 0)
		}},
	}
	for last := range steps {
		for _, how := range [][2]string{{"alive", "up"}, {"killed", "up"}, {"alive", "replace"}, {"killed", "replace"}} {
			supervisor, by := how[0], how[1]
			t.Run(steps[last].name+", supervisor "+supervisor+", then "+by, func(t *testing.T) {
				b := newBench(t)
				l := b.open()
				w := b.want(replaced("web", lab.BlueGreen))
				b.up(l, w)
				state, _ := l.read()
				rec := state.Machines["web"]
				create := rec.Create
				create.Standby = true
				c, err := supervise.Dial(b.ctx, b.Dirs, l.ID())
				if err != nil {
					t.Fatal(err)
				}
				defer c.Close()
				old, next := lab.Generation{Lab: l.ID(), Machine: "web", Number: 1}, lab.Generation{Lab: l.ID(), Machine: "web", Number: 2}
				for _, s := range steps[:last+1] {
					var data any = ledger.Ready{}
					if s.record == ledger.MachineCreate {
						data = create
					}
					if s.record != "" {
						if _, err := l.book.Append(ledger.Record{Type: s.record, Machine: "web", Generation: 2}, data); err != nil {
							t.Fatal(err)
						}
					}
					if s.do != nil {
						if err := s.do(b, c, old, next, rec); err != nil {
							t.Fatal(err)
						}
					}
				}
				c.Close()
				if supervisor == "killed" {
					if err := supervise.Stop(b.ctx, b.Dirs, l.ID()); err != nil {
						t.Fatal(err)
					}
				}
				present := 1
				if last >= 5 {
					present = 2
				}
				b.expect(l, fmt.Sprintf("web@%d ready", present)) // even before anybody finishes it
				// What gave way is not cut off before its connections have had their time.
				atStop := []string{"web@2 present"}
				if name := steps[last].name; supervisor == "alive" && (name == "recorded" || name == "promoted") {
					atStop = []string{"web@1 draining", "web@2 present"}
				}
				look := Options{Events: func(e Event) {
					if e.Stage == StageStop && e.Generation == 1 && present == 2 {
						b.expectPlugged(l, atStop...)
					}
				}}
				if by == "replace" {
					if _, err := l.Rebuild(b.ctx, w, UpOptions{Options: look}); err != nil {
						t.Fatal(err)
					}
					b.expect(l, "web@3 ready")
					b.expectPlugged(l, "web@3 present")
					there := []string{"web@1 stopped", "web@2 stopped", "web@3 running"}
					if present == 1 { // generation 2 never took over
						there = slices.Delete(there, 1, 2)
					}
					b.expectThere(l, there...)
					return
				}
				if _, err := l.Up(b.ctx, w, UpOptions{Options: look}); err != nil {
					t.Fatal(err)
				}
				b.expect(l, fmt.Sprintf("web@%d ready", present))
				there := []string{fmt.Sprintf("web@%d running", present)}
				if present == 2 { // what gave way is kept
					there = append([]string{"web@1 stopped"}, there...)
				}
				b.expectThere(l, there...)
				b.expectPlugged(l, fmt.Sprintf("web@%d present", present))
				if garbage, err := b.GC(b.ctx, true); err != nil || len(garbage) > 0 {
					t.Errorf("garbage: %+v, %v", garbage, err)
				}
				if p := b.up(l, w); p.Changes() {
					t.Errorf("there is still something to do: %+v", p)
				}
				b.rebuild(l, w)
				b.expect(l, "web@3 ready")
			})
		}
	}
}

// roleOf makes replicas of web.
func roleOf(n int, change func(*lab.Machine)) []lab.Machine {
	var ms []lab.Machine
	for i := range n {
		m := replaced(lab.Name(fmt.Sprintf("web-%d", i+1)), lab.Rolling)
		m.Role = "web"
		change(&m)
		ms = append(ms, m)
	}
	return ms
}

func TestRolling(t *testing.T) {
	for _, width := range []int{1, 2} {
		for _, data := range []bool{false, true} {
			t.Run(fmt.Sprintf("%d at a time, volume %v", width, data), func(t *testing.T) {
				b := newBench(t)
				l := b.open()
				w := b.want(roleOf(4, func(m *lab.Machine) {
					m.Replace.MaxUnavailable = width
					if data {
						m.Volumes = []lab.Volume{{Name: string(m.Name), Size: lab.MiB, FS: "none"}}
					}
				})...)
				b.up(l, w)
				var (
					order          []lab.Name
					underWay, most int
				)
				if _, err := l.Rebuild(b.ctx, w, UpOptions{Options: Options{Events: func(e Event) {
					switch e.Stage {
					case StageCreate:
						order = append(order, e.Machine)
						underWay++
						most = max(most, underWay)
					case StageReady:
						underWay--
					}
				}}}); err != nil {
					t.Fatal(err)
				}
				if most != width {
					t.Errorf("%d were replaced at a time", most)
				}
				if diff := cmp.Diff([]lab.Name{"web-1", "web-2", "web-3", "web-4"}, order); width == 1 && diff != "" {
					t.Error(diff)
				}
				b.expect(l, "web-1@2 ready", "web-2@2 ready", "web-3@2 ready", "web-4@2 ready")
			})
		}
	}
}

func TestFailureStopsTheRoll(t *testing.T) {
	b := newBench(t)
	l := b.open()
	b.up(l, b.want(roleOf(3, func(*lab.Machine) {})...))
	_, err := l.Up(b.ctx, b.want(roleOf(3, func(m *lab.Machine) {
		m.Memory++
		if m.Name == "web-2" {
			*m = broken(*m)
		}
	})...), UpOptions{})
	var up *UpError
	if !errors.As(err, &up) || len(up.Failed) != 1 || up.Failed[0].Machine != "web-2" || !slices.Equal(up.Skipped, []lab.Name{"web-3"}) {
		t.Fatalf("got error %v", err)
	}
	b.expect(l, "web-1@2 ready", "web-2@1 ready", "web-3@1 ready")
	b.expectPlugged(l, "web-1@2 present", "web-2@1 present", "web-3@1 present")
}

// A generation that is not there is told with those that are.
func TestRollbackToNothing(t *testing.T) {
	b := newBench(t)
	l := b.open()
	w := b.want(machine("web"))
	b.up(l, w)
	says := func(to int, want string) {
		t.Helper()
		var e *NoGenerationError
		if _, err := l.Rollback(b.ctx, "web", to, Options{}); !errors.As(err, &e) || e.Error() != want {
			t.Errorf("going back to %d gave %v, want %s", to, err, want)
		}
	}
	says(0, "web has no earlier generation that was ready")
	says(5, "web has no generation 5; there is only generation 1")
	b.rebuild(l, w)
	says(5, "web has no generation 5; it has 1")
}
