// SPDX-License-Identifier: Apache-2.0

// Package providertest is the conformance suite that every provider passes: the
// contract of package providers, put to the proof on real machines.
package providertest

import (
	"bytes"
	"context"
	"errors"
	"io"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/providers"
)

// Host is one host under test, with nothing on it. Image must boot to a guest
// that behaves as BootDisk's does; Deaf to one that ignores the power button.
type Host struct {
	Provider providers.Provider
	Other    providers.Provider // a second provider over the same host, as another process has it

	Image, Deaf providers.Image
	Memory      lab.Bytes // enough for the guest

	// Kill ends a machine's hypervisor behind the provider's back.
	Kill func(t *testing.T, m providers.Machine)
	// Freeze makes a machine's hypervisor deaf and dumb without ending it.
	Freeze func(t *testing.T, m providers.Machine)
	// Pause halts a machine's processors behind the provider's back, by way of the
	// hypervisor, and returns once they stand still.
	Pause func(t *testing.T, m providers.Machine)
	// Isolate removes a running machine's sockets. It is nil if machines have none on
	// this host.
	Isolate func(t *testing.T, m providers.Machine)
	// Halve leaves of a created, stopped generation what a Create that was
	// killed half-way would have left.
	Halve func(t *testing.T, g lab.Generation)
	// HalveDestroy leaves of it what a Destroy that was killed half-way would.
	HalveDestroy func(t *testing.T, g lab.Generation)
	// ReadDisk returns the disk that the layers make. It is needed if the provider
	// is a providers.DiskReader, and works while machines run.
	ReadDisk func(t *testing.T, layers []providers.Layer) []byte
	// Leftovers names every process, file and socket that belongs to machines.
	Leftovers func(t *testing.T) []string

	// Patience bounds any single step: a boot, a shutdown.
	Patience time.Duration
}

// Run puts the provider of the hosts that newHost makes to the proof.
func Run(t *testing.T, newHost func(t *testing.T) Host) {
	for _, c := range []struct {
		name string
		test func(*bench)
	}{
		{"Lifecycle", testLifecycle},
		{"Absent", testAbsent},
		{"Stopped", testStopped},
		{"Refused", testRefused},
		{"Exits", testExits},
		{"Restart", testRestart},
		{"Reset", testReset},
		{"Console", testConsole},
		{"Logs", testLogs},
		{"Cables", testCables},
		{"Concurrent", testConcurrent},
		{"HalfMade", testHalfMade},
		{"List", testList},
		{"Frozen", testFrozen},
		{"Paused", testPaused},
		{"Isolated", testIsolated},
		{"Contexts", testContexts},
		{"DestroyRunning", testDestroyRunning},
		{"Standby", testStandby},
		{"Volumes", testVolumes},
		{"VolumeFiles", testVolumeFiles},
		{"Mounts", testMounts},
		{"Birth", testBirth},
		{"Snapshots", testSnapshots},
		{"OpenDisk", testOpenDisk},
		{"OpenDiskOfStopped", testOpenDiskOfStopped},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := newHost(t)
			if h.Patience == 0 {
				h.Patience = time.Minute
			}
			b := &bench{T: t, Host: h, keyboards: map[lab.Generation]*keyboard{}}
			t.Cleanup(b.clear)
			c.test(b)
		})
	}
}

// bench is one test's host and the test itself.
type bench struct {
	*testing.T
	Host

	keyboards map[lab.Generation]*keyboard
}

// keyboard is a console that stays open, for keys to be pressed.
type keyboard struct {
	console io.ReadWriteCloser
	gone    chan struct{} // closed when the machine has ended
}

const testLab lab.ID = "conform-00000001"

func gen(name lab.Name, number int) lab.Generation {
	return lab.Generation{Lab: testLab, Machine: name, Number: number}
}

// ctx bounds one step.
func (b *bench) ctx() context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), b.Patience)
	b.Cleanup(cancel)
	return ctx
}

func (b *bench) ok(doing string, err error) {
	b.Helper()
	if err != nil {
		b.Fatalf("%s: %v", doing, err)
	}
}

func (b *bench) is(doing string, err, want error) {
	b.Helper()
	if !errors.Is(err, want) {
		b.Fatalf("%s: got error %v, want %v", doing, err, want)
	}
}

func (b *bench) spec(g lab.Generation) providers.Spec {
	return providers.Spec{
		Generation: g, Image: b.Image, CPUs: 1, Memory: b.Memory,
		MAC: "52:54:00:40:00:0a", Agent: true,
	}
}

// up creates, starts and boots a generation.
func (b *bench) up(spec providers.Spec) {
	b.Helper()
	b.ok("Create", b.Provider.Create(b.ctx(), spec))
	b.ok("Start", b.Provider.Start(b.ctx(), spec.Generation))
	b.booted(spec.Generation, 1)
}

// booted waits until the console has shown the banner n times.
func (b *bench) booted(g lab.Generation, n int) {
	b.Helper()
	b.follow(g, func(log []byte) bool { return bytes.Count(log, []byte(Banner)) >= n })
}

// follow reads the console log, from its beginning, until it is as wanted.
func (b *bench) follow(g lab.Generation, wanted func([]byte) bool) {
	b.Helper()
	r, err := b.Other.OpenLog(b.ctx(), g, providers.LogConsole)
	b.ok("OpenLog", err)
	defer r.Close()
	var log []byte
	buf := make([]byte, 4096)
	b.until("the console shows what is awaited", func() bool {
		for {
			n, err := r.Read(buf)
			log = append(log, buf[:n]...)
			if errors.Is(err, io.EOF) {
				return wanted(log)
			}
			b.ok("reading the console log", err)
		}
	}, func() string { return "console: " + string(log) })
}

// until asks again and again until the answer is yes.
func (b *bench) until(what string, yes func() bool, state func() string) {
	b.Helper()
	deadline := time.Now().Add(b.Patience)
	for !yes() {
		if time.Now().After(deadline) {
			b.Fatalf("not within %s: %s; %s", b.Patience, what, state())
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// press types a key at the console, which it keeps open: some need a while to notice
// that there is somebody.
func (b *bench) press(g lab.Generation, key string) {
	b.Helper()
	k := b.keyboards[g]
	if k != nil {
		select {
		case <-k.gone: // of an earlier run
			k.console.Close()
			k = nil
		default:
		}
	}
	if k == nil {
		c, err := b.Provider.Console(b.ctx(), g)
		b.ok("Console", err)
		k = &keyboard{c, make(chan struct{})}
		b.keyboards[g] = k
		go func() {
			defer close(k.gone)
			io.Copy(io.Discard, c) // an error is an end, too
		}()
		b.Cleanup(func() { k.console.Close() })
	}
	_, err := io.WriteString(k.console, key)
	b.ok("typing at the console", err)
}

func (b *bench) inspect(g lab.Generation) providers.Machine {
	b.Helper()
	m, err := b.Provider.Inspect(b.ctx(), g)
	b.ok("Inspect", err)
	if m.Generation != g {
		b.Fatalf("Inspect of %v returned %v", g, m.Generation)
	}
	return m
}

func (b *bench) state(g lab.Generation, want providers.State) providers.Machine {
	b.Helper()
	m := b.inspect(g)
	if m.State != want {
		b.Fatalf("%v is %s, want %s (%s)", g, m.State, want, m.Reason)
	}
	return m
}

func (b *bench) list(id lab.ID) []string {
	b.Helper()
	ms, err := b.Other.List(b.ctx(), id)
	b.ok("List", err)
	var got []string
	for _, m := range ms {
		got = append(got, string(m.Lab)+"/"+m.Generation.String()+" "+string(m.State))
	}
	return got
}

func (b *bench) wantList(id lab.ID, want ...string) {
	b.Helper()
	if got := b.list(id); !slices.Equal(got, want) {
		b.Fatalf("List(%q):\n got %q\nwant %q", id, got, want)
	}
}

// clear destroys everything and then looks for leftovers.
func (b *bench) clear() {
	ms, err := b.Provider.List(context.Background(), "")
	if err != nil {
		b.Errorf("List: %v", err)
	}
	for _, m := range ms {
		ctx, cancel := context.WithTimeout(context.Background(), b.Patience)
		if err := b.Provider.Destroy(ctx, m.Generation); err != nil {
			b.Errorf("Destroy: %v", err)
		}
		cancel()
	}
	if left := b.Leftovers(b.T); len(left) > 0 {
		b.Errorf("left over:\n%s", strings.Join(left, "\n"))
	}
}
