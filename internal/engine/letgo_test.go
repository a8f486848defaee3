// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/labfile/lab/internal/guest/agentapi"
	"github.com/labfile/lab/internal/guest/channel"
	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/ledger"
	"github.com/labfile/lab/internal/supervise"
	"github.com/labfile/lab/providers"
	"github.com/labfile/lab/providers/memory"
)

var errFault = errors.New("the hypervisor does not answer")

// faulty is a provider some of whose methods fail on request. It notes how machines were
// stopped. Supervisors see the one below it.
type faulty struct {
	*memory.Provider
	mu    sync.Mutex
	fails map[string]bool
	noted []string
}

func newFaulty(t *testing.T) (*bench, *faulty) {
	b := newBench(t)
	f := &faulty{Provider: b.provider, fails: map[string]bool{}}
	b.Providers["memory"] = f
	return b, f
}

// fail has methods fail from now on, and all others work.
func (f *faulty) fail(methods ...string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	clear(f.fails)
	for _, m := range methods {
		f.fails[m] = true
	}
}

func (f *faulty) err(method string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.fails[method] {
		return errFault
	}
	return nil
}

// Create makes machines that have an agent, which their guest need not run.
func (f *faulty) Create(ctx context.Context, s providers.Spec) error {
	s.Agent = true
	return f.Provider.Create(ctx, s)
}

func (f *faulty) Inspect(ctx context.Context, g lab.Generation) (providers.Machine, error) {
	if err := f.err("inspect"); err != nil {
		return providers.Machine{}, err
	}
	return f.Provider.Inspect(ctx, g)
}

func (f *faulty) Wait(ctx context.Context, g lab.Generation) (providers.Exit, error) {
	if err := f.err("wait"); err != nil {
		return providers.Exit{}, err
	}
	return f.Provider.Wait(ctx, g)
}

func (f *faulty) Stop(ctx context.Context, g lab.Generation, grace time.Duration) error {
	if err := f.err("stop"); err != nil {
		return err
	}
	how := "cut"
	if grace > 0 {
		how = "asked"
	}
	f.mu.Lock()
	f.noted = append(f.noted, fmt.Sprintf("%s@%d %s", g.Machine, g.Number, how))
	f.mu.Unlock()
	return f.Provider.Stop(ctx, g, grace)
}

// first returns how a machine was first stopped.
func (f *faulty) first() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return strings.Join(f.noted[:min(1, len(f.noted))], "")
}

// runsOn checks that err says that a machine runs on, and that it does.
func (b *bench) runsOn(g lab.Generation, err error) {
	b.t.Helper()
	var e *UnaskedError
	if !errors.As(err, &e) || e.Machine != g.Machine {
		b.t.Errorf("got %v", err)
	}
	if m, err := b.provider.Inspect(b.ctx, g); err != nil || !isOn(m) {
		b.t.Errorf("%s: %+v, %v", g, m, err)
	}
}

// A machine of which the provider says nothing may write to a volume: its power is not cut.
func TestVolumesWhereNothingIsSeen(t *testing.T) {
	b, f := newFaulty(t)
	l := b.open()
	w := b.want(withVolume("web"))
	b.up(l, w)
	for name, do := range map[string]func() error{
		"destroy":     func() error { return l.Destroy(b.ctx, Options{}) },
		"destroy web": func() error { return l.Destroy(b.ctx, Options{Machines: []lab.Name{"web"}}) },
		"replace":     func() error { _, err := l.Rebuild(b.ctx, w, UpOptions{}); return err },
	} {
		f.fail("inspect")
		var hinted interface{ Hint() string }
		if err := do(); !errors.Is(err, errFault) || !errors.As(err, &hinted) || !strings.Contains(hinted.Hint(), `--force"`) {
			t.Errorf("%s: got %v", name, err)
		}
		f.fail()
		b.expectThere(l, "web@1 running")
	}
	f.fail("inspect")
	if err := l.Destroy(b.ctx, Options{Force: true}); err != nil {
		t.Error(err)
	}
	if there := b.there(l); len(there) > 0 {
		t.Errorf("there are still %v", there)
	}
}

// obliging is a guest whose agent says that it powers off, and which does when its power
// button is pressed.
// It tells asked what it is asked for.
func obliging(asked chan<- agentapi.Op) func(providers.Spec) memory.Program {
	program := func(ctx context.Context, g *memory.Guest) error {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		if _, err := g.Write([]byte(memory.Banner + "\n")); err != nil {
			return err
		}
		go func() {
			for {
				port, err := g.AcceptAgent()
				if err != nil {
					return
				}
				stop := context.AfterFunc(ctx, func() { port.Close() })
				_ = channel.Serve(ctx, port, func(c net.Conn) {
					defer c.Close()
					if _, err := agentapi.Accept(c); err == nil && agentapi.Answer(c, nil) == nil {
						_ = agentapi.Serve(c, func(r agentapi.Request) agentapi.Response {
							asked <- r.Op
							return agentapi.Response{Hello: &agentapi.Hello{Version: "test"}}
						})
					}
				})
				stop()
			}
		}()
		select {
		case <-g.PowerButton():
		case <-ctx.Done():
		}
		return nil
	}
	return func(providers.Spec) memory.Program { return program }
}

// Only a deadline that has passed is a reason to cut the power of a machine that shuts down.
func TestStopWhenWaitingFails(t *testing.T) {
	b, f := newFaulty(t)
	asked := make(chan agentapi.Op, 100)
	b.provider = memory.New(memory.Config{Program: obliging(asked)})
	f.Provider, b.watched = b.provider, b.provider
	l := b.open()
	b.up(l, b.want(machine("web")))
	// Its box had no agent; now it has, also for the next supervisor.
	state, err := l.read()
	if err != nil {
		t.Fatal(err)
	}
	create := state.Machines["web"].Create
	create.Agent = true
	for _, r := range []struct {
		t    ledger.Type
		data any
	}{{ledger.MachineCreate, create}, {ledger.MachineReady, ledger.Ready{}}} {
		if _, err := l.book.Append(ledger.Record{Type: r.t, Machine: "web", Generation: 1}, r.data); err != nil {
			t.Fatal(err)
		}
	}
	if err := supervise.Stop(b.ctx, b.Dirs, l.ID()); err != nil {
		t.Fatal(err)
	}
	b.expect(l, "web@1 ready")
	f.fail("wait")
	if err := l.Stop(b.ctx, StopOptions{Grace: time.Minute}); err != nil {
		t.Fatal(err)
	}
	if got := stops(t, l); !slices.Equal(got, []string{"web@1: stopped"}) || f.first() != "web@1 asked" {
		t.Errorf("the ledger says %q, the first was %q", got, f.first())
	}
	var ops []agentapi.Op
	for len(asked) > 0 {
		ops = append(ops, <-asked)
	}
	if !slices.Contains(ops, agentapi.OpPoweroff) {
		t.Errorf("the agent was asked for %q", ops)
	}
}

// A stop that fails leaves a machine that runs on, and the next up does not end it. Nothing
// is said to be powered off that is not.
func TestStopThatFails(t *testing.T) {
	for name, o := range map[string]StopOptions{
		"asked":  {Grace: time.Minute},
		"cut":    {},
		"forced": {Grace: time.Minute, Options: Options{Force: true}},
	} {
		t.Run(name, func(t *testing.T) {
			b, f := newFaulty(t)
			l := b.open()
			w := b.want(withVolume("web"))
			b.up(l, w)
			web := lab.Generation{Lab: l.ID(), Machine: "web", Number: 1}
			b.provider.Pause(web, name == "forced")
			f.fail("stop")
			var said []string
			events := func(e Event) {
				if strings.Contains(e.Text, "powered off") {
					said = append(said, e.Text)
				}
			}
			o.Events = events
			b.runsOn(web, l.Stop(b.ctx, o))
			if err := l.Destroy(b.ctx, Options{Force: true, Events: events}); !errors.Is(err, errFault) {
				t.Errorf("destroy: %v", err)
			}
			if len(said) > 0 {
				t.Errorf("it said %q", said)
			}
			f.fail()
			b.provider.Pause(web, false)
			b.expect(l, "web@1 ready")
			b.up(l, w)
			if f.first() != "" {
				t.Errorf("up did: %s", f.first())
			}
		})
	}
}

// Stop asks what a killed replacement left, too, if it writes to a volume.
func TestStopAsksLeftovers(t *testing.T) {
	b, f := newFaulty(t)
	l := b.open()
	b.up(l, b.want(replaced("web", lab.BlueGreen)))
	state, err := l.read()
	if err != nil {
		t.Fatal(err)
	}
	create := state.Machines["web"].Create
	create.Standby = true
	for _, r := range []struct {
		t    ledger.Type
		data any
	}{{ledger.MachineCreate, create}, {ledger.MachineReady, ledger.Ready{}}} {
		if _, err := l.book.Append(ledger.Record{Type: r.t, Machine: "web", Generation: 2}, r.data); err != nil {
			t.Fatal(err)
		}
	}
	next := lab.Generation{Lab: l.ID(), Machine: "web", Number: 2}
	err = b.provider.Create(b.ctx, providers.Spec{
		Generation: next, CPUs: 1, Memory: lab.MiB, Image: providers.Image{Arch: "amd64"},
		Volumes: []providers.Volume{{Name: "data", Path: "/volume"}},
	})
	if err == nil {
		err = b.provider.Start(b.ctx, next)
	}
	if err != nil {
		t.Fatal(err)
	}
	b.provider.Pause(next, true)
	b.runsOn(next, l.Stop(b.ctx, StopOptions{Grace: time.Minute}))
	b.provider.Pause(next, false)
	if err := l.Stop(b.ctx, StopOptions{Grace: time.Minute}); err != nil {
		t.Fatal(err)
	}
	b.expectThere(l, "web@1 stopped", "web@2 stopped")
	if m, err := f.Inspect(b.ctx, next); err != nil || m.Exit.Forced() {
		t.Errorf("%+v, %v", m.Exit, err)
	}
	if got := stops(t, l); !slices.Contains(got, "web@2: stopped") {
		t.Errorf("the ledger says %q", got)
	}
}

// A machine that writes to a volume is asked whether or not it ever was ready.
func TestVolumesOfTheNeverReady(t *testing.T) {
	t.Run("failed", func(t *testing.T) {
		b, _ := newFaulty(t)
		l := b.open()
		if _, err := l.Up(b.ctx, b.want(broken(withVolume("web"))), UpOptions{}); err == nil {
			t.Fatal("a broken machine became ready")
		}
		web := lab.Generation{Lab: l.ID(), Machine: "web", Number: 1}
		b.provider.Pause(web, true)
		b.runsOn(web, l.Destroy(b.ctx, Options{}))
		if err := l.Destroy(b.ctx, Options{Force: true}); err != nil {
			t.Error(err)
		}
	})
	t.Run("interrupted", func(t *testing.T) {
		b, f := newFaulty(t)
		l := b.open()
		ctx, cancel := context.WithCancel(b.ctx)
		defer cancel()
		slow := broken(withVolume("web"))
		slow.Ready[0].Timeout = time.Minute
		_, err := l.Up(ctx, b.want(slow), UpOptions{Options: Options{Events: func(e Event) {
			if e.Stage == StageCheck {
				cancel()
			}
		}}})
		if !errors.Is(err, context.Canceled) || f.first() != "web@1 asked" {
			t.Errorf("got %v, first %q", err, f.first())
		}
		if there := b.there(l); len(there) > 0 {
			t.Errorf("there are still %v", there)
		}
	})
}

// Destroy asks none if one cannot be asked; and it records what it asks for.
func TestDestroyAsksAllOrNone(t *testing.T) {
	b, f := newFaulty(t)
	l := b.open()
	db := withVolume("db")
	db.Volumes[0].Name = "other"
	b.up(l, b.want(db, withVolume("web")))
	web := lab.Generation{Lab: l.ID(), Machine: "web", Number: 1}
	b.provider.Pause(web, true)
	b.runsOn(web, l.Destroy(b.ctx, Options{}))
	if f.first() != "" || len(stops(t, l)) > 0 {
		t.Errorf("it did %q: %q", f.first(), stops(t, l))
	}
	b.provider.Pause(web, false)
	b.expect(l, "db@1 ready", "web@1 ready")
	var recorded []string
	if err := l.Destroy(b.ctx, Options{Events: func(e Event) {
		if e.Stage == StageDestroy && recorded == nil {
			recorded = stops(t, l)
		}
	}}); err != nil {
		t.Fatal(err)
	}
	slices.Sort(recorded)
	if !slices.Equal(recorded, []string{"db@1: stopped", "web@1: stopped"}) {
		t.Errorf("recorded %q", recorded)
	}
}
