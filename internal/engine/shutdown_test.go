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
