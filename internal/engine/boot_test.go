// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/labfile/lab/boxes"
	"github.com/labfile/lab/internal/guest/agentapi"
	"github.com/labfile/lab/internal/guest/guesttest"
	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/ledger"
	"github.com/labfile/lab/internal/plan"
	"github.com/labfile/lab/providers"
	"github.com/labfile/lab/providers/memory"
)

// diary is what was asked of guests, by generation.
type diary struct {
	mu   sync.Mutex
	seen map[string][]string
}

func (d *diary) note(g lab.Generation, what string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.seen[g.String()] = append(d.seen[g.String()], what)
}

// of returns what was asked of a generation since the last time.
func (d *diary) of(g string) []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	seen := d.seen[g]
	delete(d.seen, g)
	return seen
}

// withAgents gives the bench a box "agent" whose machines have an agent. Of a boot step they
// carry out its lines: "echo TEXT", "exit N", "hang" until the step is ended, "die" to power
// off, and anything else does nothing. What they are asked for is in the diary.
func (b *bench) withAgents() *diary {
	b.t.Helper()
	d := &diary{seen: map[string][]string{}}
	b.provider = memory.New(memory.Config{Program: func(spec providers.Spec) memory.Program {
		return func(ctx context.Context, g *memory.Guest) error {
			ctx, off := context.WithCancel(ctx)
			defer off()
			return (&guesttest.Guest{
				Banner:     memory.Banner,
				Introduced: func(id agentapi.Identity) { d.note(spec.Generation, "identity "+id.Hostname) },
				Run: func(ctx context.Context, c guesttest.Command) int {
					input, _ := io.ReadAll(c.Stdin)
					_, program, _ := strings.Cut(string(input), "\n\n") // behind the variables
					switch {
					case strings.Contains(c.Line, "/etc/environment"):
						d.note(spec.Generation, "proxies")
					case strings.Contains(c.Line, "volume data "):
						d.note(spec.Generation, "volumes")
					case strings.Contains(c.Line, "is-system-running"):
						d.note(spec.Generation, "settle")
					case len(program) == 0:
						d.note(spec.Generation, c.Line)
					default:
						d.note(spec.Generation, program)
						return carryOut(ctx, program, c.Output, off)
					}
					return 0
				},
			}).Serve(ctx, g)
		}
	}})
	b.watched, b.Providers["memory"] = b.provider, b.provider
	store, err := boxes.Open(b.Dirs.Boxes())
	if err != nil {
		b.t.Fatal(err)
	}
	_, err = store.Ingest(b.ctx, boxes.Ingredients{
		Config: boxes.Config{Architecture: "amd64", Agent: true}, Disk: filepath.Join(b.folder, "disk.raw"),
	}, "agent")
	if err != nil {
		b.t.Fatal(err)
	}
	b.boxes = []lab.Box{{Name: "agent", From: "agent"}}
	return d
}

func carryOut(ctx context.Context, program string, out io.Writer, off func()) int {
	for line := range strings.Lines(program) {
		switch word, rest, _ := strings.Cut(strings.TrimSpace(line), " "); word {
		case "echo":
			_, _ = io.WriteString(out, rest+"\n")
		case "exit":
			n, _ := strconv.Atoi(rest)
			return n
		case "hang":
			<-ctx.Done()
			return 143
		case "die":
			off()
			<-ctx.Done()
			return 143
		}
	}
	return 0
}

// booted is a machine with an agent that runs programs at its first boot.
func booted(name lab.Name, s lab.Strategy, programs ...string) lab.Machine {
	m := replaced(name, s)
	m.Box = "agent"
	for i, p := range programs {
		m.Boot = append(m.Boot, bootOf(lab.Provision{Shell: p, Place: fmt.Sprintf("Labfile:%d:9", i+7)}))
	}
	return m
}

func bootOf(p lab.Provision) lab.BootStep {
	p.Kind = lab.ProvisionShell
	return lab.BootStep{Provision: p, Timeout: time.Minute}
}

// script writes a script into the Labfile's folder.
func (b *bench) script(name, text string) {
	b.t.Helper()
	if err := os.WriteFile(filepath.Join(b.folder, name), []byte(text), 0o600); err != nil {
		b.t.Fatal(err)
	}
}

func (b *bench) records(l *Lab, types ...ledger.Type) []ledger.Record {
	b.t.Helper()
	all, err := l.History()
	if err != nil {
		b.t.Fatal(err)
	}
	var some []ledger.Record
	for _, r := range all {
		for _, t := range types {
			if r.Type == t {
				some = append(some, r)
			}
		}
	}
	return some
}

func TestBootStepsRunOnceAndInOrder(t *testing.T) {
	b := newBench(t)
	d := b.withAgents()
	l := b.open()
	b.script("join.sh", "join\n")
	db := booted("db", lab.StopFirst)
	db.Ready = []lab.Check{{Kind: lab.CheckExec, Command: "is-ready", Timeout: time.Minute, Interval: time.Second}}
	web := booted("web", lab.StopFirst, "first\n")
	web.DependsOn, web.Ready = []lab.Name{"db"}, db.Ready
	web.Boot = append(web.Boot, bootOf(lab.Provision{Script: "join.sh", Args: []string{"db"}}))
	web.Volumes = []lab.Volume{{Name: "data", Size: 8 * lab.MiB, FS: "ext4", Mount: "/data"}}
	w := b.want(web, db)
	var told []string
	if _, err := l.Up(b.ctx, w, UpOptions{Options: Options{Events: func(e Event) {
		if e.Stage == StageBootStep {
			told = append(told, fmt.Sprintf("%s %s %v", e.Machine, e.Text, e.Took > 0))
		}
	}}}); err != nil {
		t.Fatal(err)
	}
	b.expect(l, "db@1 ready", "web@1 ready")
	if diff := cmp.Diff([]string{"identity web", "volumes", "settle", "first\n", "join\n", "is-ready"}, d.of("web@1")); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff([]string{"identity db", "is-ready"}, d.of("db@1")); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff([]string{
		"web waiting until the guest has booted false",
		"web boot step 1 of 2: shell first … false", "web ran boot step 1 of 2: shell first … true",
		"web boot step 2 of 2: shell join.sh false", "web ran boot step 2 of 2: shell join.sh true",
	}, told); diff != "" {
		t.Error(diff)
	}
	var order []string
	for _, r := range b.records(l, ledger.MachineCreate, ledger.MachineBooted, ledger.MachineReady) {
		order = append(order, fmt.Sprintf("%s %s", r.Machine, r.Type))
	}
	if diff := cmp.Diff([]string{
		"db machine.create", "db machine.ready", "web machine.create", "web machine.booted", "web machine.ready",
	}, order); diff != "" {
		t.Error(diff)
	}
	g, err := l.Generation("web", 0)
	if err != nil || g.Boot == nil || g.Boot.Steps != 2 || g.Boot.Digest != lab.BootDigest(g.Spec.Machine("web").Boot) || len(g.Spec.Boot) != 2 {
		t.Errorf("it shows %+v of the boot steps, %v", g.Boot, err)
	}

	// Neither another boot of the same generation runs them, nor what does nothing.
	for _, again := range []func() error{
		func() error { return errors.Join(l.Stop(b.ctx, StopOptions{}), l.Start(b.ctx, Options{})) },
		func() error {
			return errors.Join(b.provider.Stop(b.ctx, lab.Generation{Lab: l.ID(), Machine: "web", Number: 1}, 0), upErr(l.Up(b.ctx, w, UpOptions{})))
		},
	} {
		if err := again(); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff([]string{"identity web", "volumes", "is-ready"}, d.of("web@1")); diff != "" {
			t.Error(diff)
		}
	}
	if p := b.up(l, w); p.Changes() {
		t.Errorf("another up would change something: %+v", p)
	}
	if seen := d.of("web@1"); len(seen) > 0 {
		t.Errorf("it was asked for %v", seen)
	}
	if n := len(b.records(l, ledger.MachineBooted)); n != 1 {
		t.Errorf("there are %d records of boot steps", n)
	}

	b.rebuild(l, w)
	if diff := cmp.Diff([]string{"identity web", "volumes", "settle", "first\n", "join\n", "is-ready"}, d.of("web@2")); diff != "" {
		t.Error(diff)
	}
}

func upErr(_ plan.Plan, err error) error { return err }

func TestChangedBootStepsReplace(t *testing.T) {
	b := newBench(t)
	d := b.withAgents()
	l := b.open()
	b.script("join.sh", "join one\n")
	web := booted("web", lab.StopFirst)
	b.up(l, b.want(web))
	_ = d.of("web@1")

	boot := func(steps ...lab.BootStep) *lab.Lab {
		m := web
		m.Boot = steps
		return b.want(m)
	}
	timed := func(b lab.BootStep) lab.BootStep { b.Timeout = time.Hour; return b }
	join := bootOf(lab.Provision{Script: "./join.sh", Args: []string{"db"}})
	for _, tt := range []struct {
		name   string
		change func()
		want   *lab.Lab
		action plan.Action
		why    []string
		ran    []string
	}{
		{"as it was", nil, boot(), plan.Keep, nil, nil},
		{"the first steps", nil, boot(join), plan.Replace, []string{"boot changed: step 1 added: shell ./join.sh"}, []string{"join one\n"}},
		{"the same", nil, boot(join), plan.Keep, nil, nil},
		{"another time limit", nil, boot(timed(join)), plan.Keep, []string{"timeouts of boot steps changed"}, nil},
		{
			"the script", func() { b.script("join.sh", "join two\n") }, boot(join), plan.Replace,
			[]string{"boot changed: step 1: file ./join.sh"},
			[]string{"join two\n"},
		},
		{
			"an argument", nil, boot(bootOf(lab.Provision{Script: "./join.sh", Args: []string{"cache"}})), plan.Replace,
			[]string{"boot changed: step 1: shell ./join.sh"},
			[]string{"join two\n"},
		},
		{
			"a program instead", nil, boot(bootOf(lab.Provision{Shell: "true"})), plan.Replace,
			[]string{"boot changed: step 1: shell ./join.sh -> shell true"},
			[]string{"true"},
		},
		{
			"none", func() { b.script("join.sh", "join three\n") }, boot(), plan.Replace,
			[]string{"boot changed: step 1 removed: shell true"},
			nil,
		},
	} {
		if tt.change != nil {
			tt.change()
		}
		p := b.up(l, tt.want)
		step := p.Steps[0]
		why := step.Reasons
		if tt.action == plan.Keep {
			why = step.Changes
		}
		if diff := cmp.Diff(tt.why, why); diff != "" || step.Action != tt.action {
			t.Errorf("%s: %s %s", tt.name, step.Action, diff)
		}
		state, err := l.read()
		if err != nil {
			t.Fatal(err)
		}
		seen := d.of(fmt.Sprintf("web@%d", state.Machines["web"].Generation))
		var all []string
		if tt.action == plan.Replace {
			all = append(all, "identity web")
			if len(tt.ran) > 0 {
				all = append(append(all, "settle"), tt.ran...)
			}
		}
		if diff := cmp.Diff(all, seen); diff != "" {
			t.Errorf("%s: %s", tt.name, diff)
		}
	}

	// What a generation was born with is run again when it is gone back to, whatever became
	// of the script.
	for generation, ran := range map[int]string{2: "join one\n", 3: "join two\n"} {
		if err := os.Remove(filepath.Join(b.folder, "join.sh")); err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
		if _, err := l.Rollback(b.ctx, "web", generation, Options{}); err != nil {
			t.Fatal(err)
		}
		if _, err := l.Renew(b.ctx, "it is old", Options{}); err != nil {
			t.Fatal(err)
		}
		state, _ := l.read()
		for n := state.Machines["web"].Generation; n > state.Machines["web"].Generation-2; n-- {
			if seen := d.of(fmt.Sprintf("web@%d", n)); len(seen) != 3 || seen[2] != ran {
				t.Errorf("back to generation %d, generation %d ran %q", generation, n, seen)
			}
		}
	}
	// Without the script, nothing is stopped.
	if err := os.RemoveAll(b.Dirs.Boot(l.ID())); err != nil {
		t.Fatal(err)
	}
	before := b.there(l)
	_, err := l.Rollback(b.ctx, "web", 2, Options{})
	if err == nil || !strings.Contains(err.Error(), `boot step "shell ./join.sh": open `) {
		t.Errorf("got %v", err)
	}
	b.script("join.sh", "join four\n")
	_, err = l.Renew(b.ctx, "it is old", Options{})
	expectHint(t, err, "the script is not the one that generation ", "put the former script back")
	b.expectThere(l, before...)
}

func TestFailedBootStep(t *testing.T) {
	b := newBench(t)
	b.withAgents()
	l := b.open()
	w := b.want(booted("web", lab.StopFirst, "echo fine\n", "echo told\nexit 3\n"))
	_, err := l.Up(b.ctx, w, UpOptions{})
	var (
		failed *MachineError
		step   *StepError
	)
	if !errors.As(err, &failed) || failed.Stage != StageBootStep || !failed.Kept || !errors.As(err, &step) {
		t.Fatalf("got %v", err)
	}
	if diff := cmp.Diff([]string{"told"}, step.Output); diff != "" || step.Step != 2 || step.Of != 2 || step.Code != 3 || step.Place != "Labfile:8:9" {
		t.Errorf("%+v: %s", step, diff)
	}
	if want := "web: Labfile:8:9: boot step 2 of 2 (shell echo told …): exit code 3"; failed.Error() != want {
		t.Errorf("got %q, want %q", failed, want)
	}
	rs := b.records(l, ledger.MachineFailed, ledger.MachineBooted)
	if len(rs) != 1 || rs[0].Type != ledger.MachineFailed {
		t.Fatalf("the records are %+v", rs)
	}
	state, err := l.read()
	if err != nil {
		t.Fatal(err)
	}
	want := ledger.Failed{
		Stage: "boot-step", Error: "Labfile:8:9: boot step 2 of 2 (shell echo told …): exit code 3",
		Boot: &ledger.BootFailed{Step: 2, Of: 2, Text: "shell echo told …", Place: "Labfile:8:9", Code: 3},
	}
	if diff := cmp.Diff(want, state.Machines["web"].Failed); diff != "" {
		t.Error(diff)
	}
	b.expectThere(l, "web@1 running")

	// Whatever happens to it, it never counts as ready: the next one is made in its place.
	for _, by := range []func() error{
		func() error { return nil },
		func() error { return l.Stop(b.ctx, StopOptions{}) },
		func() error { return l.Stop(b.ctx, StopOptions{Options: Options{Force: true}}) },
		func() error {
			// It is said to run again, as by an earlier lab.
			g := lab.Generation{Lab: l.ID(), Machine: "web", Number: 4}
			_, err := l.book.Append(ledger.Record{Type: ledger.MachineStart, Machine: "web", Generation: g.Number}, nil)
			return err
		},
	} {
		if err := by(); err != nil {
			t.Fatal(err)
		}
		p, err := l.Plan(b.ctx, w, UpOptions{})
		if err != nil || p.Steps[0].Action != plan.Replace {
			t.Errorf("the plan is %+v, %v", p.Steps, err)
		}
		if err := l.Start(b.ctx, Options{}); err == nil || !strings.Contains(err.Error(), `it cannot be started, only replaced by "lab up"`) {
			t.Errorf("start: %v", err)
		}
		if _, err := l.Up(b.ctx, w, UpOptions{}); !errors.As(err, &step) || step.Code != 3 {
			t.Errorf("up: %v", err)
		}
	}
	b.expectThere(l, "web@5 running")
	b.up(l, b.want(booted("web", lab.StopFirst, "echo fine\n")))
	b.expectThere(l, "web@6 running")
	b.expect(l, "web@6 ready")
}

// A replacement whose boot steps fail takes over from nothing.
func TestFailedBootStepOfReplacement(t *testing.T) {
	for _, s := range []lab.Strategy{lab.StopFirst, lab.BlueGreen} {
		for _, on := range []lab.OnFailure{lab.KeepFailed, lab.DiscardFailed} {
			t.Run(fmt.Sprintf("%s, %s", s, on), func(t *testing.T) {
				b := newBench(t)
				d := b.withAgents()
				l := b.open()
				web := func(program string) *lab.Lab {
					m := booted("web", s, program)
					m.Replace.OnFailure = on
					return b.want(m)
				}
				b.up(l, web("echo one\n"))
				_ = d.of("web@1")
				_, err := l.Up(b.ctx, web("exit 4\n"), UpOptions{})
				var step *StepError
				if !errors.As(err, &step) || step.Code != 4 {
					t.Fatalf("got %v", err)
				}
				b.expect(l, "web@1 ready")
				want := []string{"web@1 running", "web@2 stopped"}
				if on == lab.DiscardFailed {
					want = want[:1]
				}
				b.expectThere(l, want...)
				if again := d.of("web@1"); len(again) > 0 && s == lab.BlueGreen || len(again) > 1 {
					t.Errorf("of the one before was asked %q", again)
				}
				b.up(l, web("echo three\n"))
				b.expect(l, "web@3 ready")
			})
		}
	}
}

func TestEndedBootSteps(t *testing.T) {
	hang := booted("web", lab.StopFirst, "echo begun\nhang\n")
	t.Run("interrupted", func(t *testing.T) {
		b := newBench(t)
		b.withAgents()
		l := b.open()
		ctx, cancel := context.WithCancel(b.ctx)
		defer cancel()
		_, err := l.Up(ctx, b.want(hang), UpOptions{Options: Options{Events: func(e Event) {
			if e.Text == "begun" {
				cancel()
			}
		}}})
		if !errors.Is(err, context.Canceled) {
			t.Errorf("got %v", err)
		}
		if left := b.there(l); len(left) > 0 {
			t.Errorf("left behind: %v", left)
		}
	})
	t.Run("too long", func(t *testing.T) {
		b := newBench(t)
		b.withAgents()
		l := b.open()
		m := hang
		m.Boot = []lab.BootStep{m.Boot[0]}
		m.Boot[0].Timeout = 100 * time.Millisecond
		_, err := l.Up(b.ctx, b.want(m), UpOptions{})
		var step *StepError
		if !errors.As(err, &step) || step.Err.Error() != "it did not end within 100ms" || !cmp.Equal(step.Output, []string{"begun"}) {
			t.Errorf("got %v", err)
		}
	})
	t.Run("with the machine", func(t *testing.T) {
		b := newBench(t)
		b.withAgents()
		l := b.open()
		_, err := l.Up(b.ctx, b.want(booted("web", lab.StopFirst, "echo begun\ndie\n")), UpOptions{})
		want := "Labfile:7:9: boot step 1 of 1 (shell echo begun …): the machine ended before it was ready: it shut itself down"
		var (
			failed *MachineError
			step   *StepError
		)
		if !errors.As(err, &failed) || !strings.Contains(err.Error(), want) || failed.Enterable || !errors.As(err, &step) || !cmp.Equal(step.Output, []string{"begun"}) {
			t.Errorf("got %v, %+v, want %s", err, step, want)
		}
		state, err := l.read()
		if err != nil {
			t.Fatal(err)
		}
		told := &ledger.BootFailed{Step: 1, Of: 1, Text: "shell echo begun …", Place: "Labfile:7:9"}
		if diff := cmp.Diff(told, state.Machines["web"].Failed.Boot); diff != "" {
			t.Error(diff)
		}
	})
}
