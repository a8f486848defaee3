// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/plan"
	"github.com/labfile/lab/internal/supervise"
	"github.com/labfile/lab/providers"
	"github.com/labfile/lab/providers/memory"
)

// elsewhere is the same host as a command sees it whose environment names another
// runtime directory.
func (b *bench) elsewhere() *Host {
	b.t.Helper()
	h := *b.Host
	h.Dirs.Run = filepath.Join(filepath.Dir(h.Dirs.Run), "elsewhere")
	if err := os.MkdirAll(h.Dirs.Run, 0o700); err != nil {
		b.t.Fatal(err)
	}
	return &h
}

// A lab is found wherever its sockets and its lock are, not where the environment says.
func TestAnotherRuntimeDirectory(t *testing.T) {
	b := newBench(t)
	l := b.open()
	b.up(l, b.want(machine("web")))
	far := b.elsewhere().Lab(l.ID())
	lk, err := l.acquire("lab up")
	if err != nil {
		t.Fatal(err)
	}
	var locked *LockedError
	if err := far.Stop(b.ctx, StopOptions{}); !errors.As(err, &locked) || locked.Command != "lab up" {
		t.Errorf("the lock was not found: %v", err)
	}
	lk.release()
	st, err := far.Status(b.ctx)
	if err != nil || st.Supervisor != "running" || st.Problem != "" || st.Machines[0].State != StateReady {
		t.Errorf("%+v, %v", st, err)
	}
	if err := far.Stop(b.ctx, StopOptions{}); err != nil {
		t.Fatal(err)
	}
	b.expect(l, "web@1 stopped")
	if err := far.Start(b.ctx, Options{}); err != nil {
		t.Fatal(err)
	}
	b.expectPlugged(l, "web@1 present")
	if entries, err := os.ReadDir(far.host.Dirs.Run); err != nil || len(entries) > 0 {
		t.Errorf("there are %v, %v", entries, err)
	}
	if err := far.Destroy(b.ctx, Options{}); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(b.Dirs.Run, string(l.ID()))); err == nil {
		t.Error("the runtime directory is left")
	}
}

// Two commands that begin a lab at once, with different runtime directories, do not both
// work on it.
func TestBegunTwice(t *testing.T) {
	b := newBench(t)
	l := b.open()
	w := b.want(machine("web"))
	far := b.elsewhere().Lab(l.ID())
	var second error
	_, err := l.Up(b.ctx, w, UpOptions{Options: Options{Confirm: func(plan.Plan) error {
		_, second = far.Up(b.ctx, w, UpOptions{})
		return nil
	}}})
	var locked *LockedError
	if second != nil || !errors.As(err, &locked) {
		t.Errorf("the second ended with %v, the first with %v", second, err)
	}
	b.expect(l, "web@1 ready")
}

// cutOff is a lab whose runtime directory is gone while its machine runs, and the dirs of
// the supervisor that nobody finds any more.
func (b *bench) cutOff(l *Lab, w *lab.Lab) {
	b.t.Helper()
	b.up(l, w)
	if err := supervise.Stop(b.ctx, b.Dirs, l.ID()); err != nil {
		b.t.Fatal(err)
	}
	b.provider.Isolate(lab.Generation{Lab: l.ID(), Machine: "web", Number: 1}, true)
	if err := os.RemoveAll(b.Dirs.RunLab(l.ID())); err != nil {
		b.t.Fatal(err)
	}
}

// A machine whose sockets are gone is not ready, whatever asks, and up or stop and start
// bring it back in order.
func TestUnreachable(t *testing.T) {
	for _, by := range []string{"up", "stop", "replace"} {
		t.Run(by, func(t *testing.T) {
			b := newBench(t)
			l := b.open()
			web := replaced("web", lab.BlueGreen)
			web.Ports = []lab.Forward{{GuestPort: 80}}
			w := b.want(web)
			b.cutOff(l, w)
			b.expect(l, "web@1 unreachable: its sockets are gone")
			if st, err := l.Status(b.ctx); err != nil || st.Problem != "" {
				t.Errorf("%+v, %v", st, err)
			}
			var e *UnreachableError
			if _, err := l.Connect(b.ctx, "web", ""); !errors.As(err, &e) || !strings.Contains(e.Hint(), `"lab stop web && lab start web"`) {
				t.Errorf("a login gave %v", err)
			}
			p, err := l.Plan(b.ctx, w, UpOptions{})
			if err != nil || p.Steps[0].Action != plan.Start || !slices.Equal(p.Steps[0].Reasons, []string{"it cannot be reached: its sockets are gone; it is shut down and started again"}) {
				t.Errorf("the plan is %+v, %v", p, err)
			}
			switch by {
			case "up":
				b.up(l, w)
			case "stop":
				if err := l.Stop(b.ctx, StopOptions{Grace: time.Minute}); err != nil {
					t.Fatal(err)
				}
				b.expect(l, "web@1 stopped")
				if err := l.Start(b.ctx, Options{}); err != nil {
					t.Fatal(err)
				}
			case "replace":
				if p := b.rebuild(l, w); p.Steps[0].Strategy != lab.StopFirst || p.Steps[0].StrategyWhy != "there is nothing to hand over: its sockets are gone" {
					t.Errorf("the plan was %+v", p.Steps[0])
				}
				b.expect(l, "web@2 ready")
				return
			}
			if got := stops(t, l); !slices.Equal(got, []string{"web@1: stopped"}) {
				t.Errorf("it was not stopped in order: %q", got)
			}
			b.expect(l, "web@1 ready")
			b.expectPlugged(l, "web@1 present")
		})
	}
}

// A supervisor that can be reached has a machine unplugged before it is started again, or
// it would take the next run for the one before.
func TestUnreachableIsUnplugged(t *testing.T) {
	b := newBench(t)
	late := tardy{b.provider, make(chan struct{})}
	b.watched = late
	l := b.open()
	w := b.want(machine("web"))
	b.up(l, w)
	b.provider.Isolate(lab.Generation{Lab: l.ID(), Machine: "web", Number: 1}, true)
	var plugged []string
	if _, err := l.Up(b.ctx, w, UpOptions{Options: Options{Events: func(e Event) {
		if e.Stage == StageBoot {
			plugged = append(plugged, b.plugged(l)...)
		}
	}}}); err != nil {
		t.Fatal(err)
	}
	close(late.noticed)
	if len(plugged) > 0 {
		t.Errorf("when it boots again, the supervisor still has %q", plugged)
	}
	b.expectPlugged(l, "web@1 present")
}

// With another machine still reachable, that one is not given up.
func TestOneOfTwoUnreachable(t *testing.T) {
	b := newBench(t)
	l := b.open()
	w := b.want(machine("web"), machine("db"))
	b.cutOff(l, w)
	b.expect(l, "db@1 ready", "web@1 unreachable: its sockets are gone")
	b.expectPlugged(l, "db@1 present")
	b.up(l, w)
	b.expect(l, "db@1 ready", "web@1 ready")
}

// socketless is a provider that talks to hypervisors by way of their sockets.
type socketless struct{ *memory.Provider }

var errDial = errors.New("dial unix /run/lab/web-1.qmp: connect: no such file or directory")

func (s socketless) OpenDisk(context.Context, lab.Generation) (providers.Disk, error) {
	return providers.Disk{}, errDial
}

func (s socketless) PushVolume(context.Context, lab.Generation, providers.Volume) error {
	return errDial
}

// What needs the hypervisor's sockets says that the machine cannot be reached, as a login
// does, and nothing of sockets.
func TestReadingAnUnreachableMachine(t *testing.T) {
	b := newBench(t)
	l := b.open()
	b.cutOff(l, b.want(withVolume("web")))
	b.Providers["memory"] = socketless{b.provider}
	_, diff := l.Diff(b.ctx, DiffOptions{New: Subject{Machine: "web"}})
	_, snapshot := l.SnapshotVolume(b.ctx, "data", "", Options{})
	for what, err := range map[string]error{"diff": diff, "snapshot": snapshot} {
		var e *UnreachableError
		if !errors.As(err, &e) || strings.Contains(err.Error(), "dial unix") || !strings.Contains(err.Error(), `machine "web" runs, but cannot be reached: its sockets are gone`) {
			t.Errorf("%s gave %v", what, err)
		}
	}
	b.provider.Isolate(lab.Generation{Lab: l.ID(), Machine: "web", Number: 1}, false)
	if _, err := l.Diff(b.ctx, DiffOptions{New: Subject{Machine: "web"}}); !errors.Is(err, errDial) {
		t.Errorf("another failure is not told: %v", err)
	}
}
