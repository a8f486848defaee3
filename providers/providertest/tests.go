// SPDX-License-Identifier: Apache-2.0

package providertest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/providers"
)

func testLifecycle(b *bench) {
	g := gen("web", 1)
	spec := b.spec(g)
	if b.Provider.Name() == "" || b.Provider.Name() != b.Other.Name() {
		b.Fatalf("Name: %q and %q", b.Provider.Name(), b.Other.Name())
	}
	b.ok("Create", b.Provider.Create(b.ctx(), spec))
	m := b.state(g, providers.StateStopped)
	if m.PID != 0 || !m.Since.IsZero() || m.Exit != (providers.Exit{}) || m.Image != b.Image.Digest {
		b.Fatalf("a fresh generation: %+v", m)
	}
	b.ok("Create again", b.Other.Create(b.ctx(), spec))

	before := time.Now()
	b.ok("Start", b.Provider.Start(b.ctx(), g))
	m = b.state(g, providers.StateRunning)
	if m.Accel == "" || m.Since.Before(before.Add(-time.Second)) || m.Since.After(time.Now().Add(time.Second)) {
		b.Fatalf("a running generation: %+v", m)
	}
	b.booted(g, 1)
	b.ok("Start again", b.Other.Start(b.ctx(), g))
	if again := b.inspect(g); again.PID != m.PID || !again.Since.Equal(m.Since) {
		b.Fatalf("Start of a running machine changed it: %+v, before %+v", again, m)
	}
	b.ok("Create of a running one", b.Provider.Create(b.ctx(), spec))

	b.ok("Stop", b.Other.Stop(b.ctx(), g, b.Patience))
	m = b.state(g, providers.StateStopped)
	if m.PID != 0 || m.Accel != "" || m.Exit.Reason != providers.ExitHost {
		b.Fatalf("a stopped generation: %+v", m)
	}
	b.ok("Stop again", b.Provider.Stop(b.ctx(), g, b.Patience))
	b.ok("Destroy", b.Provider.Destroy(b.ctx(), g))
	_, err := b.Provider.Inspect(b.ctx(), g)
	b.is("Inspect of what was destroyed", err, providers.ErrNotFound)
	b.ok("Destroy again", b.Other.Destroy(b.ctx(), g))
	if left := b.Leftovers(b.T); len(left) > 0 {
		b.Fatalf("left over: %q", left)
	}
}

func testAbsent(b *bench) {
	g := gen("nobody", 7)
	_, err := b.Provider.Inspect(b.ctx(), g)
	b.is("Inspect", err, providers.ErrNotFound)
	b.is("Start", b.Provider.Start(b.ctx(), g), providers.ErrNotFound)
	_, err = b.Provider.Wait(b.ctx(), g)
	b.is("Wait", err, providers.ErrNotFound)
	_, err = b.Provider.Console(b.ctx(), g)
	b.is("Console", err, providers.ErrNotFound)
	_, err = b.Provider.OpenLog(b.ctx(), g, providers.LogConsole)
	b.is("OpenLog", err, providers.ErrNotFound)
	if p, ok := b.Provider.(providers.Cabled); ok {
		_, err = p.DialNIC(b.ctx(), g)
		b.is("DialNIC", err, providers.ErrNotFound)
	}
	if p, ok := b.Provider.(providers.AgentDialer); ok {
		_, err = p.DialAgent(b.ctx(), g)
		b.is("DialAgent", err, providers.ErrNotFound)
	}
	if p, ok := b.Provider.(providers.PortDialer); ok {
		_, err = p.DialPort(b.ctx(), g, 80)
		b.is("DialPort", err, providers.ErrNotFound)
	}
	b.ok("Stop", b.Provider.Stop(b.ctx(), g, time.Second))
	b.ok("Destroy", b.Provider.Destroy(b.ctx(), g))
	b.wantList("")
	b.wantList(testLab)
}

func testStopped(b *bench) {
	g := gen("web", 1)
	b.ok("Create", b.Provider.Create(b.ctx(), b.spec(g)))
	_, err := b.Provider.Console(b.ctx(), g)
	b.is("Console", err, providers.ErrNotRunning)
	if p, ok := b.Provider.(providers.Cabled); ok {
		_, err = p.DialNIC(b.ctx(), g)
		b.is("DialNIC", err, providers.ErrNotRunning)
	}
	if p, ok := b.Provider.(providers.AgentDialer); ok {
		_, err = p.DialAgent(b.ctx(), g)
		b.is("DialAgent", err, providers.ErrNotRunning)
	}
	if p, ok := b.Provider.(providers.PortDialer); ok {
		_, err = p.DialPort(b.ctx(), g, 80)
		b.is("DialPort", err, providers.ErrNotRunning)
	}
	e, err := b.Provider.Wait(b.ctx(), g)
	b.ok("Wait", err)
	if e != (providers.Exit{}) {
		b.Fatalf("Wait for what never ran: %+v", e)
	}
	for _, l := range []providers.Log{providers.LogConsole, providers.LogHypervisor} {
		r, err := b.Provider.OpenLog(b.ctx(), g, l)
		if l == providers.LogHypervisor && errors.Is(err, providers.ErrIncapable) {
			continue
		}
		b.ok("OpenLog", err)
		text, err := io.ReadAll(r)
		b.ok("reading a log", err)
		if len(text) != 0 {
			b.Errorf("the %s log of what never ran: %q", l, text)
		}
		b.ok("closing a log", r.Close())
	}
	if _, err := b.Provider.OpenLog(b.ctx(), g, "diary"); err == nil {
		b.Error("OpenLog of an unknown log succeeded")
	}
}

func testRefused(b *bench) {
	checker, checks := b.Provider.(providers.SpecChecker)
	if checks {
		b.ok("CheckSpec", checker.CheckSpec(b.ctx(), b.spec(gen("web", 1))))
	}
	for _, c := range []struct {
		name   string
		change func(*providers.Spec)
		want   error // nil: any
	}{
		{"a disk smaller than the image", func(s *providers.Spec) { s.Disk = s.Image.Size - 512 }, nil},
		{"no processor", func(s *providers.Spec) { s.CPUs = 0 }, nil},
		{"no memory", func(s *providers.Spec) { s.Memory = 0 }, nil},
		{"a lab outside the directory", func(s *providers.Spec) { s.Lab = "../../x" }, nil},
		{"a machine outside the directory", func(s *providers.Spec) { s.Machine = ".." }, nil},
		{"no number", func(s *providers.Spec) { s.Number = 0 }, nil},
		{"a command line for no kernel", func(s *providers.Spec) { s.Image.Kernel, s.Append = "", "quiet" }, nil},
		{"a volume with a long name", func(s *providers.Spec) {
			s.Volumes = []providers.Volume{{Name: strings.Repeat("v", 21), Path: b.volume()}}
		}, nil},
		{"two volumes with one name", func(s *providers.Spec) {
			s.Volumes = []providers.Volume{{Name: "v", Path: b.volume()}, {Name: "v", Path: b.volume()}}
		}, nil},
		{"a volume somewhere", func(s *providers.Spec) { s.Volumes = []providers.Volume{{Name: "v", Path: "v.qcow2"}} }, nil},
		{"too many volumes", func(s *providers.Spec) {
			for i := range providers.MaxVolumes + 1 {
				s.Volumes = append(s.Volumes, providers.Volume{Name: fmt.Sprint("v", i), Path: b.volume()})
			}
		}, nil},
		{"a mount without a tag", func(s *providers.Spec) { s.Mounts = []providers.Mount{{Path: b.TempDir()}} }, nil},
		{"a mount of somewhere", func(s *providers.Spec) { s.Mounts = []providers.Mount{{Tag: "m", Path: "src"}} }, nil},
		{"a foreign processor", func(s *providers.Spec) { s.Image.Arch = "vax" }, providers.ErrIncapable},
	} {
		spec := b.spec(gen("web", 1))
		c.change(&spec)
		if checks {
			if err := checker.CheckSpec(b.ctx(), spec); err == nil || c.want != nil && !errors.Is(err, c.want) {
				b.Errorf("CheckSpec with %s: got error %v, want one such as %v", c.name, err, c.want)
			}
		}
		err := b.Provider.Create(b.ctx(), spec)
		if err == nil {
			b.Errorf("Create with %s succeeded", c.name)
		}
		if c.want != nil && !errors.Is(err, c.want) {
			b.Errorf("Create with %s: got error %v, want %v", c.name, err, c.want)
		}
	}
	b.wantList("")
}

func testExits(b *bench) {
	for i, c := range []struct {
		name   string
		deaf   bool // the guest ignores the power button
		end    func(g lab.Generation)
		want   providers.ExitReason
		forced bool // Exit.Forced
	}{
		{name: "the guest powers off", end: func(g lab.Generation) { b.press(g, KeyOff) }, want: providers.ExitGuest},
		{name: "the guest panics", end: func(g lab.Generation) { b.press(g, KeyPanic) }, want: providers.ExitPanic},
		{name: "a polite stop", end: func(g lab.Generation) {
			b.ok("Stop", b.Provider.Stop(b.ctx(), g, b.Patience))
		}, want: providers.ExitHost},
		{name: "a stop that the guest ignores", deaf: true, end: func(g lab.Generation) {
			b.ok("Stop", b.Provider.Stop(b.ctx(), g, 200*time.Millisecond))
		}, want: providers.ExitHost, forced: true},
		{name: "a stop by force", end: func(g lab.Generation) {
			b.ok("Stop", b.Other.Stop(b.ctx(), g, 0))
		}, want: providers.ExitHost, forced: true},
		{name: "killed by somebody", end: func(g lab.Generation) { b.Kill(b.T, b.inspect(g)) }, want: providers.ExitSignaled},
	} {
		g := gen("web", i+1)
		spec := b.spec(g)
		if c.deaf {
			spec.Image = b.Deaf
		}
		b.up(spec)
		type answer struct {
			exit providers.Exit
			err  error
		}
		answers := make(chan answer)
		for _, p := range []providers.Provider{b.Provider, b.Provider, b.Other} {
			ctx := b.ctx()
			go func() {
				e, err := p.Wait(ctx, g)
				answers <- answer{e, err}
			}()
		}
		began := time.Now()
		c.end(g)
		for range 3 {
			a := <-answers
			if a.err != nil {
				b.Errorf("%s: Wait: %v", c.name, a.err)
			}
			if a.exit.Reason != c.want {
				b.Errorf("%s: Wait returned %+v, want %q", c.name, a.exit, c.want)
			}
			if a.exit.At.Before(began.Add(-time.Second)) || a.exit.At.After(time.Now().Add(time.Second)) {
				b.Errorf("%s: Wait returned %+v at %s", c.name, a.exit, time.Now())
			}
		}
		for _, p := range []providers.Provider{b.Provider, b.Other} {
			m, err := p.Inspect(b.ctx(), g)
			b.ok("Inspect", err)
			if m.State != providers.StateStopped || m.Exit.Reason != c.want || m.Exit.Forced() != c.forced {
				b.Errorf("%s: Inspect afterwards: %+v", c.name, m)
			}
		}
		// Whoever asks later gets the same answer at once.
		if e, err := b.Other.Wait(b.ctx(), g); err != nil || e.Reason != c.want {
			b.Errorf("%s: Wait afterwards: %+v, %v", c.name, e, err)
		}
		b.ok("Destroy", b.Provider.Destroy(b.ctx(), g))
	}
}

func testRestart(b *bench) {
	g := gen("web", 1)
	b.up(b.spec(g))
	b.press(g, KeyPanic)
	_, err := b.Provider.Wait(b.ctx(), g)
	b.ok("Wait", err)
	b.ok("Start", b.Other.Start(b.ctx(), g))
	m := b.state(g, providers.StateRunning)
	if m.Exit != (providers.Exit{}) {
		b.Errorf("a running machine has the exit %+v", m.Exit)
	}
	b.booted(g, 1)
	b.ok("Stop", b.Provider.Stop(b.ctx(), g, b.Patience))
	if m := b.state(g, providers.StateStopped); m.Exit.Reason != providers.ExitHost {
		b.Errorf("the exit of the second run: %+v", m.Exit)
	}
}

func testReset(b *bench) {
	g := gen("web", 1)
	b.up(b.spec(g))
	pid := b.inspect(g).PID
	b.press(g, KeyReset)
	b.booted(g, 2)
	if m := b.state(g, providers.StateRunning); m.PID != pid {
		b.Fatalf("a reset ended the hypervisor: pid %d, before %d", m.PID, pid)
	}
}

// crowd runs do several times at once, through both providers.
func (b *bench) crowd(doing string, do func(providers.Provider) error) {
	b.Helper()
	var wg sync.WaitGroup
	errs := make([]error, 6)
	for i := range errs {
		p := b.Provider
		if i%2 == 1 {
			p = b.Other
		}
		wg.Go(func() { errs[i] = do(p) })
	}
	wg.Wait()
	b.ok(doing, errors.Join(errs...))
}

func testConcurrent(b *bench) {
	g := gen("web", 1)
	ctx := b.ctx()
	b.crowd("Create", func(p providers.Provider) error { return p.Create(ctx, b.spec(g)) })
	b.crowd("Start", func(p providers.Provider) error { return p.Start(ctx, g) })
	b.booted(g, 1)
	pid := b.state(g, providers.StateRunning).PID
	b.crowd("Inspect and List", func(p providers.Provider) error {
		m, err := p.Inspect(ctx, g)
		if err == nil && (m.State != providers.StateRunning || m.PID != pid) {
			err = fmt.Errorf("inspected %+v", m)
		}
		_, listErr := p.List(ctx, "")
		return errors.Join(err, listErr)
	})
	b.crowd("Stop", func(p providers.Provider) error { return p.Stop(ctx, g, b.Patience) })
	b.state(g, providers.StateStopped)
	b.crowd("Start and Stop", func(p providers.Provider) error {
		return errors.Join(p.Start(ctx, g), p.Stop(ctx, g, 0))
	})
	b.ok("Stop", b.Provider.Stop(ctx, g, 0))
	b.crowd("Create and Destroy", func(p providers.Provider) error {
		return errors.Join(p.Create(ctx, b.spec(g)), p.Destroy(ctx, g))
	})
	b.ok("Create", b.Provider.Create(ctx, b.spec(g)))
	b.ok("Start", b.Provider.Start(ctx, g))
	b.crowd("Destroy", func(p providers.Provider) error { return p.Destroy(ctx, g) })
	b.wantList("")
}

func testHalfMade(b *bench) {
	one, two := gen("web", 1), gen("web", 2)
	for _, g := range []lab.Generation{one, two} {
		b.ok("Create", b.Provider.Create(b.ctx(), b.spec(g)))
		b.Halve(b.T, g)
		m := b.state(g, providers.StateBroken)
		if m.Reason == "" {
			b.Error("a broken generation has no reason")
		}
		b.is("Start", b.Provider.Start(b.ctx(), g), providers.ErrNotFound)
	}
	b.wantList(testLab, string(testLab)+"/web@1 broken", string(testLab)+"/web@2 broken")
	b.up(b.spec(one)) // Create finishes it
	b.ok("Destroy", b.Provider.Destroy(b.ctx(), two))
	b.wantList(testLab, string(testLab)+"/web@1 running")
	b.ok("Stop", b.Provider.Stop(b.ctx(), one, 0))
	b.HalveDestroy(b.T, one)
	b.wantList("", string(testLab)+"/web@1 broken")
	b.ok("Destroy", b.Provider.Destroy(b.ctx(), one))
	b.wantList("")
}

func testList(b *bench) {
	other := lab.ID("aside-00000002")
	for _, g := range []lab.Generation{
		gen("web", 10), gen("web", 9), gen("db", 1), {Lab: other, Machine: "web", Number: 1},
	} {
		b.ok("Create", b.Provider.Create(b.ctx(), b.spec(g)))
	}
	b.ok("Start", b.Provider.Start(b.ctx(), gen("db", 1)))
	mine := []string{
		string(testLab) + "/db@1 running", string(testLab) + "/web@9 stopped", string(testLab) + "/web@10 stopped",
	}
	b.wantList(testLab, mine...)
	b.wantList(other, string(other)+"/web@1 stopped")
	b.wantList("", slices.Concat([]string{string(other) + "/web@1 stopped"}, mine)...)
	b.wantList("absent-00000003")
	b.ok("Destroy", b.Provider.Destroy(b.ctx(), gen("web", 9)))
	b.wantList(testLab, mine[0], mine[2])
}

func testFrozen(b *bench) {
	g := gen("web", 1)
	b.up(b.spec(g))
	m := b.inspect(g)
	b.Freeze(b.T, m)
	// It stays frozen, so that an answer shows that nothing waited for its hypervisor.
	b.state(g, providers.StatePaused)
	b.wantList("", string(testLab)+"/web@1 paused")
	b.is("Stop", b.Provider.Stop(b.ctx(), g, b.Patience), providers.ErrUnasked)
	b.state(g, providers.StatePaused)
	b.ok("Stop by force", b.Provider.Stop(b.ctx(), g, 0))
	if m := b.state(g, providers.StateStopped); !m.Exit.Forced() {
		b.Errorf("the exit of a frozen machine that was stopped: %+v", m.Exit)
	}
}

// A guest that stands still does not notice its power button.
func testPaused(b *bench) {
	g := gen("web", 1)
	b.up(b.spec(g))
	b.Pause(b.T, b.inspect(g))
	b.state(g, providers.StatePaused)
	b.is("Stop", b.Provider.Stop(b.ctx(), g, b.Patience), providers.ErrUnasked)
	b.state(g, providers.StatePaused)
	b.ok("Start", b.Provider.Start(b.ctx(), g)) // lets it go on
	b.state(g, providers.StateRunning)
	b.ok("Stop", b.Provider.Stop(b.ctx(), g, b.Patience))
	if m := b.state(g, providers.StateStopped); m.Exit.Forced() {
		b.Errorf("it was not asked after it had been paused: %+v", m.Exit)
	}
	b.ok("Start", b.Provider.Start(b.ctx(), g))
	b.Pause(b.T, b.inspect(g))
	b.ok("Stop by force", b.Provider.Stop(b.ctx(), g, 0))
	if m := b.state(g, providers.StateStopped); !m.Exit.Forced() {
		b.Errorf("the exit of a paused machine that was stopped by force: %+v", m.Exit)
	}
}

// A machine whose sockets are gone runs on, says so, and still hears its power button.
func testIsolated(b *bench) {
	if b.Isolate == nil {
		return
	}
	g := gen("web", 1)
	b.up(b.spec(g))
	if m := b.inspect(g); m.Unreachable != "" {
		b.Errorf("it cannot be reached from the beginning: %s", m.Unreachable)
	}
	b.Isolate(b.T, b.inspect(g))
	if m := b.state(g, providers.StateRunning); m.Unreachable == "" {
		b.Errorf("it can be reached without sockets: %+v", m)
	}
	b.ok("Stop", b.Provider.Stop(b.ctx(), g, b.Patience))
	if m := b.state(g, providers.StateStopped); m.Exit.Reason != providers.ExitHost || m.Exit.Forced() || m.Unreachable != "" {
		b.Errorf("after it was stopped: %+v", m)
	}
	b.ok("Start", b.Provider.Start(b.ctx(), g))
	if m := b.state(g, providers.StateRunning); m.Unreachable != "" {
		b.Errorf("it cannot be reached after another start: %s", m.Unreachable)
	}
}

func testContexts(b *bench) {
	g := gen("web", 1)
	ended, cancel := context.WithCancel(context.Background())
	cancel()
	b.is("Create", b.Provider.Create(ended, b.spec(g)), context.Canceled)
	b.wantList("")
	b.ok("Create", b.Provider.Create(b.ctx(), b.spec(g)))
	b.is("Start", b.Provider.Start(ended, g), context.Canceled)
	b.state(g, providers.StateStopped)
	b.up(b.spec(g))
	_, err := b.Provider.Inspect(ended, g)
	b.is("Inspect", err, context.Canceled)
	_, err = b.Provider.List(ended, testLab)
	b.is("List", err, context.Canceled)
	_, err = b.Provider.Check(ended)
	b.is("Check", err, context.Canceled)
	_, err = b.Provider.Console(ended, g)
	b.is("Console", err, context.Canceled)
	b.is("Stop", b.Provider.Stop(ended, g, b.Patience), context.Canceled)
	b.is("Destroy", b.Provider.Destroy(ended, g), context.Canceled)

	// A wait, and a stop that the guest ignores, end with their context.
	short, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
	defer cancel()
	_, err = b.Provider.Wait(short, g)
	b.is("Wait", err, context.DeadlineExceeded)
	deaf := b.spec(gen("deaf", 1))
	deaf.Image = b.Deaf
	b.up(deaf)
	short, cancel = context.WithTimeout(context.Background(), 300*time.Millisecond)
	defer cancel()
	b.is("Stop", b.Provider.Stop(short, deaf.Generation, b.Patience), context.DeadlineExceeded)
	b.state(deaf.Generation, providers.StateRunning)
	b.state(g, providers.StateRunning)
}

func testDestroyRunning(b *bench) {
	g := gen("web", 1)
	b.up(b.spec(g))
	ctx := b.ctx()
	exit := make(chan providers.Exit, 1)
	go func() {
		e, err := b.Other.Wait(ctx, g)
		if errors.Is(err, providers.ErrNotFound) {
			e, err = providers.Exit{Reason: providers.ExitHost}, nil // it came too late to see it run
		}
		if err != nil {
			b.Errorf("Wait: %v", err)
		}
		exit <- e
	}()
	c, err := b.Provider.Console(ctx, g)
	b.ok("Console", err)
	defer c.Close()
	b.ok("Destroy", b.Provider.Destroy(ctx, g))
	if e := <-exit; e.Reason != providers.ExitHost {
		b.Errorf("Wait for what was destroyed: %+v", e)
	}
	if _, err := c.Read(make([]byte, 1)); err == nil {
		b.Error("the console of a destroyed machine can still be read")
	}
	b.wantList("")
}
