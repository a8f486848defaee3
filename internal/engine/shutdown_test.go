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

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/ledger"
	"github.com/labfile/lab/internal/supervise"
	"github.com/labfile/lab/providers"
	"github.com/labfile/lab/providers/memory"
)

// withVolume is a machine that writes to a volume.
func withVolume(name lab.Name) lab.Machine {
	m := replaced(name, lab.StopFirst)
	m.Volumes = []lab.Volume{bare("data", lab.MiB)}
	return m
}

// unasked checks that err is about web alone, which runs on, and that the hint is the
// command that ends it.
func (b *bench) unasked(l *Lab, err error, command string) {
	b.t.Helper()
	var up *UpError
	var e *UnaskedError
	if !errors.As(err, &up) || len(up.Failed) != 1 || up.Failed[0].Machine != "web" || up.Failed[0].Kept || !errors.As(err, &e) {
		b.t.Fatalf("got %v", err)
	}
	if !errors.Is(err, providers.ErrUnasked) || e.Error() != "the guest could not be asked to shut down: it is paused; it runs on" || !strings.Contains(e.Hint(), fmt.Sprintf("%q", command)) {
		b.t.Errorf("%v; %s", e, e.Hint())
	}
	b.provider.Pause(lab.Generation{Lab: l.ID(), Machine: "web", Number: 1}, false)
	b.expect(l, "web@1 ready")
	b.provider.Pause(lab.Generation{Lab: l.ID(), Machine: "web", Number: 1}, true)
}

// stops returns how the ledger says that machines were stopped, or why they were not.
func stops(t *testing.T, l *Lab) []string {
	t.Helper()
	records, err := l.History()
	if err != nil {
		t.Fatal(err)
	}
	var all []string
	for _, r := range records {
		if r.Type == ledger.MachineStopped || r.Type == ledger.MachineStays {
			all = append(all, r.Summary())
		}
	}
	return all
}

// A machine that cannot be asked to shut down runs on, and the ledger still says so.
func TestStopWithoutBeingHeard(t *testing.T) {
	b := newBench(t)
	l := b.open()
	b.up(l, b.want(machine("web")))
	web := lab.Generation{Lab: l.ID(), Machine: "web", Number: 1}
	b.provider.Pause(web, true)
	b.unasked(l, l.Stop(b.ctx, StopOptions{Grace: time.Minute}), "lab stop web --force")
	if err := l.Stop(b.ctx, StopOptions{Grace: time.Minute, Options: Options{Force: true}}); err != nil {
		t.Fatal(err)
	}
	why := "the guest could not be asked to shut down: it is paused"
	b.expect(l, "web@1 stopped: powered off: "+why)
	want := []string{
		"web@1: runs on: " + why,
		"web@1: powered off: " + why,
	}
	if got := stops(t, l); !slices.Equal(got, want) {
		t.Errorf("the ledger says %q", got)
	}
}

// A guest that was asked and does not obey is powered off, and that is said.
func TestStopOfADeafGuest(t *testing.T) {
	b := newBench(t)
	b.provider = memory.New(memory.Config{Program: func(providers.Spec) memory.Program {
		return func(ctx context.Context, g *memory.Guest) error {
			if _, err := g.Write([]byte(memory.Banner + "\n")); err != nil {
				return err
			}
			return memory.Deaf(ctx, g)
		}
	}})
	b.Providers["memory"], b.watched = b.provider, b.provider
	l := b.open()
	b.up(l, b.want(machine("web")))
	var said []string
	err := l.Stop(b.ctx, StopOptions{Grace: time.Millisecond, Options: Options{Events: func(e Event) {
		if e.Stage == StageStopped {
			said = append(said, e.Text)
		}
	}}})
	if err != nil {
		t.Fatal(err)
	}
	why := "it did not shut down within 1ms"
	if !slices.Equal(said, []string{"powered off: " + why}) {
		t.Errorf("it said %q", said)
	}
	b.expect(l, "web@1 stopped: powered off: "+why)
	if got := stops(t, l); !slices.Equal(got, []string{"web@1: powered off: " + why}) {
		t.Errorf("the ledger says %q", got)
	}
}

// A command that was to stop a machine is interrupted: whether the guest obeys later or not,
// what is shown and recorded is true.
func TestInterruptedStop(t *testing.T) {
	b := newBench(t)
	b.provider = memory.New(memory.Config{Program: func(providers.Spec) memory.Program {
		return func(ctx context.Context, g *memory.Guest) error {
			if _, err := g.Write([]byte(memory.Banner + "\n")); err != nil {
				return err
			}
			return memory.Deaf(ctx, g)
		}
	}})
	b.Providers["memory"], b.watched = b.provider, b.provider
	l := b.open()
	w := b.want(machine("web"))
	web := lab.Generation{Lab: l.ID(), Machine: "web", Number: 1}
	runsOn := "web@1 ready: the command that was to stop it was interrupted, and it still runs; \"lab stop web\" stops it"
	phase := func() ledger.Phase {
		t.Helper()
		state, err := l.read()
		if err != nil {
			t.Fatal(err)
		}
		return state.Machines["web"].Phase
	}
	interrupt := func() {
		t.Helper()
		ctx, cancel := context.WithCancel(b.ctx)
		defer cancel()
		var said []string
		err := l.Stop(ctx, StopOptions{Grace: time.Hour, Options: Options{Events: func(e Event) {
			said = append(said, e.Text)
			cancel()
		}}})
		if !errors.Is(err, context.Canceled) {
			t.Fatalf("it ended with %v", err)
		}
		if want := []string{"stopping", "interrupted; it still runs, and stops later if its guest obeys"}; !slices.Equal(said, want) {
			t.Errorf("it said %q", said)
		}
		b.expect(l, runsOn)
	}
	t.Run("and the machine ends later", func(t *testing.T) {
		b.up(l, w)
		interrupt()
		b.provider.Kill(web)
		deadline := time.Now().Add(time.Minute)
		for phase() != ledger.PhaseStopped { // the supervisor records it
			if time.Now().After(deadline) {
				t.Fatalf("it is %s", phase())
			}
			time.Sleep(5 * time.Millisecond)
		}
		b.expect(l, "web@1 stopped")
	})
	t.Run("and the machine runs on", func(t *testing.T) {
		b.up(l, w)
		interrupt()
		if p := b.up(l, w); p.Steps[0].Action != "start" || p.Steps[0].Reasons[0] != "a command was interrupted that was about to stop it" {
			t.Errorf("the plan was %+v", p.Steps[0])
		}
		b.expect(l, "web@1 ready")
	})
	t.Run("and nobody sees the machine end", func(t *testing.T) {
		interrupt()
		if err := supervise.Stop(b.ctx, b.Dirs, l.ID()); err != nil {
			t.Fatal(err)
		}
		if err := b.provider.Stop(b.ctx, web, 0); err != nil {
			t.Fatal(err)
		}
		b.expect(l, "web@1 stopped")
		if got := phase(); got != ledger.PhaseStopping {
			t.Errorf("looking changed the ledger: it is %s", got)
		}
		if err := l.Stop(b.ctx, StopOptions{}); err != nil {
			t.Fatal(err)
		}
		if got := phase(); got != ledger.PhaseStopped {
			t.Errorf("it is %s", got)
		}
	})
}

// What would cut a machine's power follows the rule of stop if it writes to a volume.
func TestVolumesAreNotCutOff(t *testing.T) {
	for name, do := range map[string]func(*bench, *Lab, *lab.Lab) error{
		"replace": func(b *bench, l *Lab, w *lab.Lab) error { _, err := l.Rebuild(b.ctx, w, UpOptions{}); return err },
		"destroy": func(b *bench, l *Lab, _ *lab.Lab) error { return l.Destroy(b.ctx, Options{}) },
		"destroy web": func(b *bench, l *Lab, _ *lab.Lab) error {
			return l.Destroy(b.ctx, Options{Machines: []lab.Name{"web"}})
		},
		"burn": func(b *bench, l *Lab, w *lab.Lab) error { _, err := l.Burn(b.ctx, w, BurnOptions{}); return err },
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t)
			l := b.open()
			w := b.want(withVolume("web"))
			b.up(l, w)
			web := lab.Generation{Lab: l.ID(), Machine: "web", Number: 1}
			b.provider.Pause(web, true)
			command := "lab stop web --force"
			if strings.HasPrefix(name, "destroy") {
				command = "lab " + name + " --force"
			}
			b.unasked(l, do(b, l, w), command)
			if p, err := l.Plan(b.ctx, w, UpOptions{}); err != nil || p.Steps[0].Action == "replace" {
				t.Errorf("the plan is %+v, %v", p, err)
			}
			if err := l.Destroy(b.ctx, Options{Machines: []lab.Name{"web"}, Force: true}); err != nil {
				t.Fatal(err)
			}
			if there := b.there(l); len(there) > 0 {
				t.Errorf("there are still %v", there)
			}
			if left, err := l.VolumeNames(); err != nil || !slices.Equal(left, []string{"data"}) {
				t.Errorf("volumes %v, %v", left, err)
			}
		})
	}
}

// Without a volume there is nothing that a cut would cost.
func TestDestroyOfAPausedMachine(t *testing.T) {
	b := newBench(t)
	l := b.open()
	w := b.want(machine("web"))
	b.up(l, w)
	b.provider.Pause(lab.Generation{Lab: l.ID(), Machine: "web", Number: 1}, true)
	if err := l.Destroy(b.ctx, Options{}); err != nil {
		t.Fatal(err)
	}
	if there := b.there(l); len(there) > 0 {
		t.Errorf("there are still %v", there)
	}
}
