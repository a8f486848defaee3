// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/labfile/lab/boxes"
	"github.com/labfile/lab/boxes/source"
	"github.com/labfile/lab/internal/dirs"
	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/ledger"
	"github.com/labfile/lab/internal/network"
	"github.com/labfile/lab/internal/plan"
	"github.com/labfile/lab/internal/supervise"
	"github.com/labfile/lab/providers"
	"github.com/labfile/lab/providers/memory"
)

// bench is a host of its own, with machines in memory and supervisors in this
// process, and a folder with a Labfile and a disk.
type bench struct {
	*Host
	t        testing.TB
	provider *memory.Provider
	watched  providers.Provider // the same, as supervisors see it
	folder   string
	boxes    []lab.Box // that Labfiles have besides "base"
	wg       sync.WaitGroup
	ctx      context.Context
}

func newBench(t testing.TB) *bench {
	t.Helper()
	root, err := os.MkdirTemp("", "lab-e-") // short: sockets live below it
	if err != nil {
		t.Fatal(err)
	}
	b := &bench{t: t, provider: memory.New(memory.Config{}), folder: t.TempDir(), ctx: t.Context()}
	d := dirs.Dirs{Data: filepath.Join(root, "data"), Run: filepath.Join(root, "run"), Cache: filepath.Join(root, "cache")}
	store, err := boxes.Open(d.Boxes())
	if err != nil {
		t.Fatal(err)
	}
	b.watched = b.provider
	b.Host = &Host{
		Dirs: d, Providers: map[string]providers.Provider{"memory": b.provider},
		Boxes: &source.Resolver{Store: store, Cache: d.Downloads()},
		Log:   slog.New(slog.DiscardHandler),

		Patience: time.Millisecond, // no guest here has an ssh server
	}
	b.Host.Spawn = b.spawn
	b.disk("disk.raw", 1)
	t.Cleanup(func() {
		b.wg.Wait()
		os.RemoveAll(root)
	})
	return b
}

// disk writes a raw disk whose content depends on seed.
func (b *bench) disk(name string, seed byte) {
	b.t.Helper()
	if err := os.WriteFile(filepath.Join(b.folder, name), []byte(strings.Repeat(string(rune('a'+seed)), 4096)), 0o600); err != nil {
		b.t.Fatal(err)
	}
}

func (b *bench) spawn(id lab.ID) error {
	ready, ended := make(chan struct{}), make(chan error, 1)
	b.wg.Add(1)
	go func() {
		defer b.wg.Done()
		book := ledger.Open(b.Dirs.Ledger(id))
		ended <- supervise.Run(context.Background(), supervise.Config{
			ID: id, Dirs: b.Dirs, Provider: b.watched, Ready: func() { close(ready) },
			Record: func(e supervise.Event) error {
				_, err := book.Append(ledger.Record{
					Type: ledger.MachineExited, Machine: e.Generation.Machine, Generation: e.Generation.Number,
				}, ledger.Exited{Reason: string(e.Exit.Reason), Detail: e.Exit.Detail})
				return err
			},
		})
	}()
	select {
	case <-ready:
		return nil
	case err := <-ended:
		return err
	}
}

// machine is one that is ready when it has printed its banner.
func machine(name lab.Name, deps ...lab.Name) lab.Machine {
	return lab.Machine{
		Name: name, Role: string(name), Box: "base", CPUs: 1, Memory: 64 * lab.MiB, DependsOn: deps,
		Ready: []lab.Check{{Kind: lab.CheckConsole, Pattern: memory.Banner, Timeout: time.Minute, Interval: 10 * time.Millisecond}},
	}
}

func (b *bench) want(ms ...lab.Machine) *lab.Lab {
	return &lab.Lab{
		Name: "shop", Provider: "memory", File: filepath.Join(b.folder, "Labfile"), Machines: ms,
		Boxes: append([]lab.Box{{Name: "base", From: "./disk.raw"}}, b.boxes...),
	}
}

// open returns the lab, which is destroyed when the test ends.
func (b *bench) open() *Lab {
	l := b.Lab(lab.NewID("shop", filepath.Join(b.folder, "Labfile")))
	b.t.Cleanup(func() {
		if err := l.Destroy(context.Background(), Options{}); err != nil && !errors.Is(err, ErrNoLab) {
			b.t.Error(err)
		}
	})
	return l
}

func (b *bench) up(l *Lab, w *lab.Lab) plan.Plan {
	b.t.Helper()
	p, err := l.Up(b.ctx, w, UpOptions{})
	if err != nil {
		b.t.Fatal(err)
	}
	return p
}

// states says of every machine "name@generation state".
func (b *bench) states(l *Lab) []string {
	b.t.Helper()
	st, err := l.Status(b.ctx)
	if err != nil {
		b.t.Fatal(err)
	}
	var got []string
	for _, m := range st.Machines {
		s := fmt.Sprintf("%s@%d %s", m.Name, m.Generation, m.State)
		if m.Reason != "" {
			s += ": " + m.Reason
		}
		got = append(got, s)
	}
	return got
}

func (b *bench) expect(l *Lab, want ...string) {
	b.t.Helper()
	if diff := cmp.Diff(want, b.states(l)); diff != "" {
		b.t.Error(diff)
	}
}

func actions(p plan.Plan) []string {
	var got []string
	for _, s := range p.Steps {
		got = append(got, string(s.Action)+" "+string(s.Machine))
	}
	return got
}

func TestUpConverges(t *testing.T) {
	b := newBench(t)
	l := b.open()
	w := b.want(machine("web", "db"), machine("db"))
	if diff := cmp.Diff([]string{"create db", "create web"}, actions(b.up(l, w))); diff != "" {
		t.Error(diff)
	}
	b.expect(l, "db@1 ready", "web@1 ready")
	records, err := l.History()
	if err != nil {
		t.Fatal(err)
	}
	if p := b.up(l, w); p.Changes() {
		t.Errorf("a second up would change something: %v", p)
	}
	if again, _ := l.History(); len(again) != len(records) {
		t.Errorf("a second up recorded something: %v", again[len(records):])
	}
	// What web depends on was ready before web was intended.
	var order []string
	for _, r := range records {
		if r.Type == ledger.MachineReady || r.Type == ledger.MachineCreate {
			order = append(order, string(r.Type)+" "+string(r.Machine))
		}
	}
	if diff := cmp.Diff([]string{"machine.create db", "machine.ready db", "machine.create web", "machine.ready web"}, order); diff != "" {
		t.Error(diff)
	}
}

func TestChangesReplaceOrApplyInPlace(t *testing.T) {
	b := newBench(t)
	l := b.open()
	db := machine("db")
	b.up(l, b.want(db))
	before, _ := l.Status(b.ctx)

	db.Ports = []lab.Forward{{GuestPort: 80}}
	p := b.up(l, b.want(db))
	if p.Steps[0].Action != plan.Keep || !slices.Equal(p.Steps[0].Changes, []string{"port 0:80 added"}) {
		t.Errorf("a new port gave %+v", p.Steps[0])
	}
	st, _ := l.Status(b.ctx)
	if len(st.Machines[0].Ports) != 1 || st.Machines[0].Ports[0].Guest != 80 || st.Machines[0].Ports[0].Host == 0 {
		t.Errorf("ports are %v", st.Machines[0].Ports)
	}
	if p := b.up(l, b.want(db)); p.Changes() {
		t.Errorf("applied in place, and still to do: %+v", p)
	}

	db.Memory *= 2
	b.up(l, b.want(db))
	b.expect(l, "db@2 ready")
	if st, _ := l.Status(b.ctx); st.Machines[0].Address != before.Machines[0].Address {
		t.Errorf("the address went from %s to %s", before.Machines[0].Address, st.Machines[0].Address)
	}
	if all, _ := b.provider.List(b.ctx, l.ID()); len(all) != 1 {
		t.Errorf("the old generation is still there: %v", all)
	}

	b.up(l, b.want(machine("web")))
	b.expect(l, "web@1 ready")
}

// A lab that was brought up by --provider stays there when a later command says nothing
// of it, and does not move when it is told to.
func TestProviderIsRemembered(t *testing.T) {
	b := newBench(t)
	l := b.open()
	w := b.want(machine("db"))
	b.up(l, w)
	w.Provider = ""
	if p := b.up(l, w); p.Changes() {
		t.Errorf("there is still something to do: %+v", p)
	}
	b.Providers["qemu"] = memory.New(memory.Config{})
	w.Provider = "qemu"
	if _, err := l.Plan(b.ctx, w, UpOptions{}); err == nil || !strings.Contains(err.Error(), `runs on provider "memory" and cannot move to "qemu": destroy it first`) {
		t.Errorf("got error %v", err)
	}
}

// New readiness checks need no replacement, but the machine must pass them.
func TestNewReadyChecksAreCarriedOut(t *testing.T) {
	b := newBench(t)
	l := b.open()
	db, web := machine("db"), machine("web", "db")
	b.up(l, b.want(db, web))
	good := db.Ready
	db.Ready = []lab.Check{{Kind: lab.CheckConsole, Pattern: "never printed", Timeout: 200 * time.Millisecond, Interval: 10 * time.Millisecond}}
	for range 2 { // what was not applied is not forgotten
		p, err := l.Up(b.ctx, b.want(db, web), UpOptions{})
		var up *UpError
		if !errors.As(err, &up) || len(up.Failed) != 1 || up.Failed[0].Machine != "db" ||
			!strings.Contains(err.Error(), "it runs as before, but does not pass the Labfile's new checks: check console") {
			t.Fatalf("got error %v", err)
		}
		if len(up.Skipped) > 0 { // web has nothing to fear of that
			t.Errorf("not tried: %v", up.Skipped)
		}
		if !slices.Equal(p.Steps[0].Changes, []string{"ready checks changed"}) {
			t.Errorf("the plan was %+v", p.Steps[0])
		}
		b.expect(l, "db@1 ready", "web@1 ready")
	}
	db.Ready = append(slices.Clone(good), good[0])
	b.up(l, b.want(db, web))
	if p := b.up(l, b.want(db, web)); p.Changes() {
		t.Errorf("there is still something to do: %+v", p)
	}
	b.expect(l, "db@1 ready", "web@1 ready")
}

func TestFailureIsKeptAndReplacedNextTime(t *testing.T) {
	b := newBench(t)
	l := b.open()
	db, web := machine("db"), machine("web", "db")
	good := db.Ready
	db.Ready = []lab.Check{{Kind: lab.CheckConsole, Pattern: "never printed", Timeout: 200 * time.Millisecond, Interval: 10 * time.Millisecond}}
	_, err := l.Up(b.ctx, b.want(db, web), UpOptions{})
	var up *UpError
	if !errors.As(err, &up) || len(up.Failed) != 1 || up.Failed[0].Machine != "db" || !up.Failed[0].Kept {
		t.Fatalf("got error %v", err)
	}
	if diff := cmp.Diff([]lab.Name{"web"}, up.Skipped); diff != "" {
		t.Error(diff)
	}
	st, _ := l.Status(b.ctx)
	if st.Machines[0].State != StateFailed || st.Machines[0].Running == nil {
		t.Errorf("the machine that failed is %+v", st.Machines[0])
	}
	db.Ready = good
	b.up(l, b.want(db, web))
	b.expect(l, "db@2 ready", "web@1 ready")
}

func TestInterruptionLeavesNothing(t *testing.T) {
	for _, stage := range []Stage{StageBox, StageCreate, StageBoot, StageCheck, StageReady} {
		t.Run(string(stage), func(t *testing.T) {
			b := newBench(t)
			l := b.open()
			ctx, cancel := context.WithCancel(b.ctx)
			defer cancel()
			_, err := l.Up(ctx, b.want(machine("db"), machine("web", "db")), UpOptions{Options: Options{Events: func(e Event) {
				if e.Stage == stage {
					cancel()
				}
			}}})
			if !errors.Is(err, context.Canceled) {
				t.Fatalf("got error %v", err)
			}
			if all, _ := b.provider.List(b.ctx, ""); len(all) != 0 {
				t.Errorf("machines are left: %v", all)
			}
			b.wg.Wait() // the supervisor ends by itself
			for _, dir := range []string{b.Dirs.Lab(l.ID()), b.Dirs.RunLab(l.ID())} {
				if _, err := os.Stat(dir); err == nil {
					t.Errorf("%s is left", dir)
				}
			}
			b.up(l, b.want(machine("db")))
			b.expect(l, "db@1 ready")
		})
	}
}

// What a killed lab leaves: an intent without an outcome, and perhaps a machine.
func TestKilledCommandIsFinishedByTheNext(t *testing.T) {
	for _, half := range []string{"intent only", "created", "half made", "running"} {
		t.Run(half, func(t *testing.T) {
			b := newBench(t)
			l := b.open()
			w := b.want(machine("db"))
			b.up(l, w)
			g := lab.Generation{Lab: l.ID(), Machine: "db", Number: 1}
			spec := providers.Spec{
				Generation: lab.Generation{Lab: l.ID(), Machine: "db", Number: 2}, CPUs: 1, Memory: lab.MiB,
				MAC: "52:54:00:00:00:01", Image: providers.Image{Arch: "amd64"},
			}
			if err := b.provider.Destroy(b.ctx, g); err != nil {
				t.Fatal(err)
			}
			state, _ := l.read()
			if _, err := l.book.Append(ledger.Record{Type: ledger.MachineCreate, Machine: "db", Generation: 2}, state.Machines["db"].Create); err != nil {
				t.Fatal(err)
			}
			if half != "intent only" {
				if err := b.provider.Create(b.ctx, spec); err != nil {
					t.Fatal(err)
				}
			}
			switch half {
			case "half made":
				b.provider.Break(spec.Generation, "no disk")
			case "running":
				if err := b.provider.Start(b.ctx, spec.Generation); err != nil {
					t.Fatal(err)
				}
			}
			if got := b.states(l)[0]; !strings.HasPrefix(got, "db@2 broken: ") {
				t.Errorf("after the kill status says %s", got)
			}
			b.up(l, w)
			b.expect(l, "db@3 ready")
			if all, _ := b.provider.List(b.ctx, ""); len(all) != 1 {
				t.Errorf("machines are left: %v", all)
			}
		})
	}
}

func TestKilledMachineIsSeenAndStarted(t *testing.T) {
	b := newBench(t)
	l := b.open()
	w := b.want(machine("db"), machine("web"))
	b.up(l, w)
	b.provider.Kill(lab.Generation{Lab: l.ID(), Machine: "db", Number: 1})
	deadline := time.Now().Add(time.Minute)
	for b.states(l)[0] != "db@1 exited: its process was killed from outside (killed)" {
		if time.Now().After(deadline) {
			t.Fatalf("status says %v", b.states(l))
		}
		time.Sleep(5 * time.Millisecond)
	}
	p := b.up(l, w)
	if diff := cmp.Diff([]string{"start db", "keep web"}, actions(p)); diff != "" {
		t.Error(diff)
	}
	b.expect(l, "db@1 ready", "web@1 ready")
}

// TestPaused says of a machine that is halted that it is, and lets it go on.
func TestPaused(t *testing.T) {
	b := newBench(t)
	l := b.open()
	w := b.want(machine("db"))
	b.up(l, w)
	b.provider.Pause(lab.Generation{Lab: l.ID(), Machine: "db", Number: 1}, true)
	var paused *PausedError
	if _, err := l.Connect(b.ctx, "db", ""); !errors.As(err, &paused) || !errors.Is(err, providers.ErrNotRunning) || err.Error() != `db is paused` {
		t.Errorf("connecting gave %v", err)
	}
	var said []string
	o := UpOptions{Options: Options{Events: func(e Event) {
		if e.Stage == StageBoot {
			said = append(said, e.Text)
		}
	}}}
	if _, err := l.Up(b.ctx, w, o); err != nil {
		t.Fatal(err)
	}
	if !cmp.Equal(said, []string{"letting it go on"}) {
		t.Errorf("up said %q", said)
	}
	b.expect(l, "db@1 ready")
}

func TestStopStartRebuild(t *testing.T) {
	b := newBench(t)
	l := b.open()
	w := b.want(machine("web", "db"), machine("db"))
	b.up(l, w)
	if err := l.Stop(b.ctx, StopOptions{Options: Options{Machines: []lab.Name{"db"}}, Grace: time.Minute}); err != nil {
		t.Fatal(err)
	}
	b.expect(l, "db@1 stopped", "web@1 ready")
	if _, err := l.Connect(b.ctx, "db", ""); !errors.Is(err, providers.ErrNotRunning) || err.Error() != `db is stopped` {
		t.Errorf("connecting gave %v", err)
	}
	if err := l.Stop(b.ctx, StopOptions{}); err != nil {
		t.Fatal(err)
	}
	var ready []lab.Name
	if err := l.Start(b.ctx, Options{Events: func(e Event) {
		if e.Stage == StageReady {
			ready = append(ready, e.Machine)
		}
	}}); err != nil {
		t.Fatal(err)
	}
	b.expect(l, "db@1 ready", "web@1 ready")
	if diff := cmp.Diff([]lab.Name{"db", "web"}, ready); diff != "" {
		t.Error("not started in the order of dependencies:", diff)
	}
	if _, err := l.Rebuild(b.ctx, w, UpOptions{Options: Options{Machines: []lab.Name{"web"}}}); err != nil {
		t.Fatal(err)
	}
	b.expect(l, "db@1 ready", "web@2 ready")
	var missing *NoMachineError
	if err := l.Stop(b.ctx, StopOptions{Options: Options{Machines: []lab.Name{"wbe"}}}); !errors.As(err, &missing) || !slices.Equal(missing.Known, []lab.Name{"db", "web"}) {
		t.Errorf("stopping an unknown machine gave %v", err)
	}
}

func TestDestroy(t *testing.T) {
	for _, loss := range []string{"nothing", "ledger", "damaged ledger", "runtime directory"} {
		t.Run(loss, func(t *testing.T) {
			b := newBench(t)
			l := b.open()
			b.up(l, b.want(machine("db"), machine("web")))
			switch loss {
			case "ledger":
				os.Remove(b.Dirs.Ledger(l.ID()))
				// The provider of a lab without a record is the default one.
				b.Providers[DefaultProvider] = b.provider
			case "damaged ledger":
				if err := os.WriteFile(b.Dirs.Ledger(l.ID()), []byte("hello\n"), 0o600); err != nil {
					t.Fatal(err)
				}
				b.Providers[DefaultProvider] = b.provider
			case "runtime directory":
				if err := l.Stop(b.ctx, StopOptions{}); err != nil {
					t.Fatal(err)
				}
				b.wg.Wait()
				os.RemoveAll(b.Dirs.Run)
			}
			if err := l.Destroy(b.ctx, Options{}); err != nil {
				t.Fatal(err)
			}
			b.wg.Wait()
			if all, _ := b.provider.List(b.ctx, ""); len(all) != 0 {
				t.Errorf("machines are left: %v", all)
			}
			for _, dir := range []string{b.Dirs.Lab(l.ID()), b.Dirs.RunLab(l.ID())} {
				if _, err := os.Stat(dir); err == nil {
					t.Errorf("%s is left", dir)
				}
			}
			if err := l.Destroy(b.ctx, Options{}); !errors.Is(err, ErrNoLab) {
				t.Errorf("destroying again gave %v", err)
			}
		})
	}
}

func TestOneWinner(t *testing.T) {
	b := newBench(t)
	l := b.open()
	w := b.want(machine("db"))
	var second error
	once := sync.OnceFunc(func() { _, second = b.Lab(l.ID()).Up(b.ctx, w, UpOptions{}) })
	_, err := l.Up(b.ctx, w, UpOptions{Options: Options{Command: "lab up", Events: func(Event) { once() }}})
	if err != nil {
		t.Fatal(err)
	}
	var locked *LockedError
	if !errors.As(second, &locked) || locked.PID != os.Getpid() || locked.Command != "lab up" {
		t.Errorf("the second up got %v", second)
	}
	if l.locked() {
		t.Error("the lock outlived the command")
	}
}

func TestLockFile(t *testing.T) {
	b := newBench(t)
	l := b.open()
	w := b.want(machine("db"))
	if _, err := l.Up(b.ctx, w, UpOptions{Locked: true}); !errors.Is(err, ErrStaleLock) {
		t.Errorf("--locked without a lock file gave %v", err)
	}
	b.up(l, w)
	if _, err := l.Up(b.ctx, w, UpOptions{Locked: true}); err != nil {
		t.Errorf("--locked with a lock file gave %v", err)
	}
	// The disk moves under the Labfile: the pin holds.
	b.disk("disk.raw", 2)
	if p := b.up(l, w); p.Changes() {
		t.Errorf("a box moved without being asked: %+v", p)
	}
	cs, err := l.PinBoxes(b.ctx, w, true, Options{})
	if err != nil || len(cs) != 1 || cs[0].Old == cs[0].New {
		t.Fatalf("updating the pins gave %v, %v", cs, err)
	}
	if diff := cmp.Diff([]string{"replace db"}, actions(b.up(l, w))); diff != "" {
		t.Error(diff)
	}
}

func TestGC(t *testing.T) {
	b := newBench(t)
	l := b.open()
	b.up(l, b.want(machine("db")))
	stray := lab.Generation{Lab: l.ID(), Machine: "ghost", Number: 1}
	if err := b.provider.Create(b.ctx, providers.Spec{Generation: stray, CPUs: 1, Memory: 1, Image: providers.Image{Arch: "amd64"}}); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(b.Dirs.RunLab("gone-00000000"), 0o700); err != nil {
		t.Fatal(err)
	}
	for _, dry := range []bool{true, false} {
		found, err := b.GC(b.ctx, dry)
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, g := range found {
			got = append(got, g.Kind+" "+g.Why)
		}
		if diff := cmp.Diff([]string{"machine the ledger does not know it", "runtime its lab is gone"}, got); diff != "" {
			t.Errorf("dry run %v: %s", dry, diff)
		}
	}
	if found, _ := b.GC(b.ctx, false); len(found) != 0 {
		t.Errorf("garbage is left: %v", found)
	}
	b.expect(l, "db@1 ready")
}

func TestListAndFindByDir(t *testing.T) {
	b := newBench(t)
	l := b.open()
	b.up(l, b.want(machine("db")))
	list, err := b.List(b.ctx)
	if err != nil {
		t.Fatal(err)
	}
	want := []Summary{{
		ID: l.ID(), Name: "shop", Labfile: filepath.Join(b.folder, "Labfile"), LabfileGone: true,
		Provider: "memory", Machines: 1, Running: 1, Ready: 1,
	}}
	if diff := cmp.Diff(want, list); diff != "" {
		t.Error(diff)
	}
	ids, err := b.FindByDir(b.folder)
	if diff := cmp.Diff([]lab.ID{l.ID()}, ids); diff != "" || err != nil {
		t.Error(diff, err)
	}
}

func TestRolesStandForTheirReplicas(t *testing.T) {
	b := newBench(t)
	l := b.open()
	one, two := machine("web-1"), machine("web-2")
	one.Role, two.Role = "web", "web"
	w := b.want(machine("db"), one, two)
	if _, err := l.Up(b.ctx, w, UpOptions{Options: Options{Machines: []lab.Name{"web"}}}); err != nil {
		t.Fatal(err)
	}
	b.expect(l, "web-1@1 ready", "web-2@1 ready")
	if err := l.Stop(b.ctx, StopOptions{Options: Options{Machines: []lab.Name{"web", "web-1"}}}); err != nil {
		t.Fatal(err)
	}
	b.expect(l, "web-1@1 stopped", "web-2@1 stopped")
	names, err := l.Expand([]lab.Name{"web-2", "web"})
	if diff := cmp.Diff([]lab.Name{"web-2", "web-1"}, names); diff != "" || err != nil {
		t.Error(diff, err)
	}
}

func TestWhatDoesNotFitItsBoxIsRefusedBeforeAnythingHappens(t *testing.T) {
	b := newBench(t)
	l := b.open()
	m := machine("db")
	m.Disk = 512
	_, err := l.Up(b.ctx, b.want(m), UpOptions{})
	want := `machine "db": a disk of 512B is smaller than the 4KiB of its box; ask for more, or leave it out`
	if err == nil || err.Error() != want {
		t.Errorf("got error %v", err)
	}
	if _, err := l.History(); !errors.Is(err, ErrNoLab) {
		t.Errorf("a lab came of it: %v", err)
	}
}

// Disks outlive a stop, so a machine that lived and did not come up again, for
// whatever reason, is not replaced unless somebody asks for that.
func TestFailureToStartAgainCostsNoDisk(t *testing.T) {
	b := newBench(t)
	l := b.open()
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	port := uint16(ln.Addr().(*net.TCPAddr).Port)
	ln.Close()
	db := machine("db")
	db.Ports = []lab.Forward{{HostPort: port, GuestPort: 5432}}
	b.up(l, b.want(db))
	if err := l.Stop(b.ctx, StopOptions{}); err != nil {
		t.Fatal(err)
	}
	var taken *network.PortError
	listened := false
	err = l.Start(b.ctx, Options{Events: func(e Event) { // before that, start would refuse
		if e.Stage == StageBoot && !listened {
			listened = true
			if ln, err = net.Listen("tcp4", fmt.Sprintf("127.0.0.1:%d", port)); err != nil {
				t.Error(err)
			}
		}
	}})
	if !errors.As(err, &taken) {
		t.Fatalf("starting with the port taken gave %v", err)
	}
	if st, _ := l.Status(b.ctx); st.Machines[0].State != StateFailed {
		t.Errorf("the machine that did not start is %+v", st.Machines[0])
	}
	ln.Close()
	if err := l.Stop(b.ctx, StopOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := l.Start(b.ctx, Options{}); err != nil {
		t.Fatal(err)
	}
	b.expect(l, "db@1 ready")

	if err := l.Stop(b.ctx, StopOptions{}); err != nil {
		t.Fatal(err)
	}
	if ln, err = net.Listen("tcp4", fmt.Sprintf("127.0.0.1:%d", port)); err != nil {
		t.Fatal(err)
	}
	if _, err := l.Up(b.ctx, b.want(db), UpOptions{}); !errors.As(err, &taken) {
		t.Fatalf("up with the port taken gave %v", err)
	}
	ln.Close()
	if diff := cmp.Diff([]string{"start db"}, actions(b.up(l, b.want(db)))); diff != "" {
		t.Error(diff)
	}
	b.expect(l, "db@1 ready")
}

func TestRefusedUpLeavesNothing(t *testing.T) {
	b := newBench(t)
	l := b.open()
	refused := errors.New("no, thanks")
	_, err := l.Up(b.ctx, b.want(machine("db")), UpOptions{Options: Options{Confirm: func(plan.Plan) error { return refused }}})
	if !errors.Is(err, refused) {
		t.Fatalf("got error %v", err)
	}
	if err := l.Stop(b.ctx, StopOptions{}); err == nil {
		t.Fatal("what was never up was stopped")
	}
	for _, dir := range []string{b.Dirs.Lab(l.ID()), b.Dirs.RunLab(l.ID())} {
		if _, err := os.Stat(dir); err == nil {
			t.Errorf("%s is left", dir)
		}
	}
}

// Who starts a new supervisor may be killed before it has told it everything.
func TestHalfToldSupervisorIsToldTheRest(t *testing.T) {
	b := newBench(t)
	l := b.open()
	b.up(l, b.want(machine("db"), machine("web")))
	c, err := supervise.Dial(b.ctx, b.Dirs, l.ID())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	forget := func() {
		if err := c.Unplug(b.ctx, lab.Generation{Lab: l.ID(), Machine: "db", Number: 1}); err != nil {
			t.Fatal(err)
		}
	}
	forget()
	b.expect(l, "db@1 ready", "web@1 ready")
	if st, err := c.Status(b.ctx); err != nil || len(st.Machines) != 2 {
		t.Errorf("after a status the supervisor knows %v, %v", st.Machines, err)
	}
	forget()
	ctx, cancel := context.WithTimeout(b.ctx, 5*time.Second) // nobody answers, but more than 3 s pass until it is clear that somebody could
	defer cancel()
	if _, err := l.DialPort(ctx, "db", 7); !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
	if st, err := c.Status(b.ctx); err != nil || len(st.Machines) != 2 {
		t.Errorf("after a dial the supervisor knows %v, %v", st.Machines, err)
	}
}

// A host port that one machine gives up is free for another within the same up.
func TestPortsChangeHands(t *testing.T) {
	b := newBench(t)
	l := b.open()
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ports := []lab.Forward{{HostPort: uint16(ln.Addr().(*net.TCPAddr).Port), GuestPort: 80}}
	ln.Close()
	for i := range 6 {
		m := machine(lab.Name(fmt.Sprintf("web%d", i)))
		m.Ports = ports
		b.up(l, b.want(m))
	}
	b.expect(l, "web5@1 ready")
}

func TestInterruptedRebuildLosesNothing(t *testing.T) {
	for _, stage := range []Stage{StageStop, StageCreate, StageBoot, StageCheck} {
		t.Run(string(stage), func(t *testing.T) {
			b := newBench(t)
			l := b.open()
			w := b.want(machine("db"))
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
			all, err := b.provider.List(b.ctx, l.ID())
			if err != nil || len(all) != 1 || all[0].Number != 1 {
				t.Fatalf("there are %v, %v", all, err)
			}
			if diff := cmp.Diff(1, len(b.up(l, w).Steps[0].Reasons)); stage != StageStop && diff != "" {
				t.Error(diff)
			}
			b.expect(l, "db@1 ready")
			if _, err := l.Rebuild(b.ctx, w, UpOptions{}); err != nil {
				t.Fatal(err)
			}
			want := "db@3 ready" // a number is never used twice
			if stage == StageStop {
				want = "db@2 ready"
			}
			b.expect(l, want)
			if all, _ := b.provider.List(b.ctx, l.ID()); len(all) != 1 {
				t.Errorf("there are %v", all)
			}
		})
	}
}

func TestPickedPortsStay(t *testing.T) {
	b := newBench(t)
	l := b.open()
	m := machine("db")
	m.Ports = []lab.Forward{{GuestPort: 80}}
	w := b.want(m)
	port := func() uint16 {
		st, err := l.Status(b.ctx)
		if err != nil {
			t.Fatal(err)
		}
		return st.Machines[0].Ports[0].Host
	}
	b.up(l, w)
	first := port()
	if err := errors.Join(l.Stop(b.ctx, StopOptions{}), l.Start(b.ctx, Options{})); err != nil {
		t.Fatal(err)
	}
	if port() != first {
		t.Errorf("a restart moved port %d to %d", first, port())
	}
	if _, err := l.Rebuild(b.ctx, w, UpOptions{}); err != nil {
		t.Fatal(err)
	}
	if port() != first {
		t.Errorf("a rebuild moved port %d to %d", first, port())
	}
	// Somebody takes it while the machine is down: another one will do.
	if err := l.Stop(b.ctx, StopOptions{}); err != nil {
		t.Fatal(err)
	}
	taken, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", first))
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	if err := l.Start(b.ctx, Options{}); err != nil {
		t.Fatal(err)
	}
	if port() == first {
		t.Error("a taken port was given")
	}
}
