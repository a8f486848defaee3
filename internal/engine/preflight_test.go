// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/ledger"
	"github.com/labfile/lab/internal/network"
	"github.com/labfile/lab/internal/supervise"
	"github.com/labfile/lab/providers"
	"github.com/labfile/lab/providers/memory"
)

// hosted is a bench on a host of a gibibyte, whose provider refuses machines with 13
// processors.
func hosted(t *testing.T) *bench {
	b := newBench(t)
	b.provider = memory.New(memory.Config{
		Memory: providers.HostMemory{RAM: lab.GiB, Swap: lab.GiB / 2},
		Refuse: func(s providers.Spec) error {
			if s.CPUs == 13 {
				return fmt.Errorf("%w: 13 processors", providers.ErrIncapable)
			}
			return nil
		},
	})
	b.watched, b.Providers["memory"] = b.provider, b.provider
	return b
}

// takenPort is a host port that another program listens on.
func takenPort(t *testing.T) uint16 {
	t.Helper()
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	return uint16(ln.Addr().(*net.TCPAddr).Port)
}

// TestRefusedBirthStopsNothing has every way to replace a machine refuse what could not
// be born, before anything happens to the generation that there is.
func TestRefusedBirthStopsNothing(t *testing.T) {
	script := func(name string) lab.Provision {
		return lab.Provision{Kind: lab.ProvisionShell, Script: name, Place: "Labfile:9:9"}
	}
	for name, tt := range map[string]struct {
		change func(b *bench, m *lab.Machine)
		want   string
	}{
		"user data":        {func(_ *bench, m *lab.Machine) { m.UserData = "#cloud-config\na: [" }, "user data for cloud-init: line 2: did not find expected node content"},
		"no user data":     {func(_ *bench, m *lab.Machine) { m.UserData = "packages: [nginx]" }, "cloud-init does not know what this is"},
		"script":           {func(_ *bench, m *lab.Machine) { m.Provision = []lab.Provision{script("./none.sh")} }, "none.sh: no such file or directory"},
		"folder as script": {func(_ *bench, m *lab.Machine) { m.Provision = []lab.Provision{script(".")} }, ". is not a file"},
		"boot script":      {func(_ *bench, m *lab.Machine) { m.Boot = []lab.BootStep{{Provision: script("./none.sh")}} }, `Labfile:9:9: boot step "shell ./none.sh": open `},
		"no script":        {func(_ *bench, m *lab.Machine) { m.Boot = []lab.BootStep{{Provision: script(".")}} }, "is a folder, not a file"},
		"file": {func(_ *bench, m *lab.Machine) {
			m.Provision = []lab.Provision{{Kind: lab.ProvisionFile, From: "none", To: "/x"}}
		}, "none: no such file or directory"},
		"mount": {func(b *bench, m *lab.Machine) {
			m.Mounts = []lab.Mount{{From: filepath.Join(b.folder, "none"), To: "/x"}}
		}, "there is no folder"},
		"mount of a file": {func(b *bench, m *lab.Machine) {
			m.Mounts = []lab.Mount{{From: filepath.Join(b.folder, "disk.raw"), To: "/x"}}
		}, "is not a folder"},
		"port":           {func(_ *bench, m *lab.Machine) { m.Ports = []lab.Forward{{HostPort: takenPort(t), GuestPort: 80}} }, "is taken by another program"},
		"smaller volume": {func(_ *bench, m *lab.Machine) { m.Volumes = []lab.Volume{bare("data", lab.MiB)} }, "volume data has 2MiB and cannot shrink to 1MiB"},
		"volume in use":  {func(_ *bench, m *lab.Machine) { m.Volumes = append(m.Volumes, bare("other", lab.MiB)) }, "volume other is in use by other@1"},
		"memory":         {func(_ *bench, m *lab.Machine) { m.Memory = 2 * lab.GiB }, "it asks for 2GiB of memory, and the host has 1GiB and 0.5GiB of swap"},
		"disk":           {func(_ *bench, m *lab.Machine) { m.Disk = 512 }, "a disk of 512B is smaller than the 4KiB of its box"},
		"provider":       {func(_ *bench, m *lab.Machine) { m.CPUs = 13 }, "host not capable: 13 processors"},
	} {
		t.Run(name, func(t *testing.T) {
			b := hosted(t)
			l := b.open()
			db, other := machine("db"), machine("other")
			db.Volumes, other.Volumes = []lab.Volume{bare("data", 2*lab.MiB)}, []lab.Volume{bare("other", lab.MiB)}
			b.up(l, b.want(db, other))
			before, err := l.History()
			if err != nil {
				t.Fatal(err)
			}
			tt.change(b, &db)
			other.Volumes = nil
			w, only := b.want(db, other), UpOptions{Options: Options{Machines: []lab.Name{"db"}}}
			_, planned := l.Plan(b.ctx, w, only)
			_, up := l.Up(b.ctx, w, only)
			_, rebuilt := l.Rebuild(b.ctx, w, only)
			burnt := planned
			if name != "volume in use" { // burn lets the other machine have its new specification, without the volume
				_, burnt = l.Burn(b.ctx, w, BurnOptions{UpOptions: only})
			}
			for what, err := range map[string]error{"plan": planned, "up": up, "replace": rebuilt, "burn": burnt} {
				if err == nil || !strings.Contains(err.Error(), tt.want) {
					t.Errorf("%s: got %v, want %s", what, err, tt.want)
				}
			}
			after, err := l.History()
			if err != nil || len(after) != len(before) {
				t.Errorf("%d records became %d: %v", len(before), len(after), err)
			}
			for _, name := range []lab.Name{"db", "other"} {
				m, err := b.provider.Inspect(b.ctx, lab.Generation{Lab: l.ID(), Machine: name, Number: 1})
				if err != nil || m.State != providers.StateRunning {
					t.Errorf("%s: %+v, %v", name, m, err)
				}
			}
		})
	}
}

// TestRefusedRollbackStopsNothing goes back to a generation that cannot be born any more.
func TestRefusedRollbackStopsNothing(t *testing.T) {
	b := hosted(t)
	l := b.open()
	first := machine("web")
	first.CPUs = 2
	b.up(l, b.want(first))
	second := machine("web")
	b.up(l, b.want(second))
	// The first one's processors are not to be had any more.
	b.Providers["memory"] = refuser{b.provider}
	defer func() { b.Providers["memory"] = b.provider }()
	_, err := l.Rollback(b.ctx, "web", 0, Options{})
	if !errors.Is(err, providers.ErrIncapable) || !strings.Contains(err.Error(), `machine "web": host not capable: no second processor`) {
		t.Errorf("got %v", err)
	}
	state, err := l.read()
	if m := state.Machines["web"]; err != nil || m.Generation != 2 || m.Phase != ledger.PhaseReady {
		t.Errorf("%+v, %v", m, err)
	}
	if m, err := b.provider.Inspect(b.ctx, lab.Generation{Lab: l.ID(), Machine: "web", Number: 2}); err != nil || m.State != providers.StateRunning {
		t.Errorf("%+v, %v", m, err)
	}
}

// TestRefusedRenewalStopsNothing replaces a machine that cannot be born again.
func TestRefusedRenewalStopsNothing(t *testing.T) {
	b := newBench(t)
	l := b.open()
	web := machine("web")
	web.CPUs = 2
	b.up(l, b.want(web))
	b.Providers["memory"] = refuser{b.provider}
	defer func() { b.Providers["memory"] = b.provider }()
	if _, err := l.Renew(b.ctx, "it is old", Options{}); !errors.Is(err, providers.ErrIncapable) {
		t.Errorf("got %v", err)
	}
	b.Providers["memory"] = b.provider
	b.expect(l, "web@1 ready")
}

// refuser is a provider that has one processor.
type refuser struct{ *memory.Provider }

func (r refuser) CheckSpec(ctx context.Context, s providers.Spec) error {
	if s.CPUs > 1 {
		return fmt.Errorf("%w: no second processor", providers.ErrIncapable)
	}
	return r.Provider.CheckSpec(ctx, s)
}

// TestPortsOfTheLabItself are no reason to refuse anything.
func TestPortsOfTheLabItself(t *testing.T) {
	b := newBench(t)
	l := b.open()
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	port := uint16(ln.Addr().(*net.TCPAddr).Port)
	ln.Close()
	web := machine("web")
	web.Ports = []lab.Forward{{HostPort: port, GuestPort: 80}}
	b.up(l, b.want(web))
	if _, err := l.Rebuild(b.ctx, b.want(web), UpOptions{}); err != nil {
		t.Error(err)
	}
	b.expect(l, "web@2 ready")

	// Those of a machine that is stopped are anybody's.
	if err := l.Stop(b.ctx, StopOptions{}); err != nil {
		t.Fatal(err)
	}
	if ln, err = net.Listen("tcp4", fmt.Sprintf("127.0.0.1:%d", port)); err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	var busy *network.PortError
	if _, err := l.Plan(b.ctx, b.want(web), UpOptions{}); !errors.As(err, &busy) || busy.Port != port {
		t.Errorf("got %v", err)
	}
}

// freePort is a host port that nobody listens on.
func freePort(t *testing.T) uint16 {
	t.Helper()
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	return uint16(ln.Addr().(*net.TCPAddr).Port)
}

// A machine that failed its ready check keeps its port, which the next attempt gets.
func TestPortOfAMachineThatFailed(t *testing.T) {
	b := newBench(t)
	l := b.open()
	web := machine("web")
	web.Ports = []lab.Forward{{HostPort: freePort(t), GuestPort: 80}, {HostPort: freePort(t), GuestPort: 53, UDP: true}}
	if _, err := l.Up(b.ctx, b.want(broken(web)), UpOptions{}); err == nil {
		t.Fatal("a broken machine became ready")
	}
	b.expectPlugged(l, "web@1 present")
	b.up(l, b.want(web))
	b.expect(l, "web@2 ready")
}

// The supervisor listens on a machine's ports while the machine still boots.
func TestPortOfAMachineThatBoots(t *testing.T) {
	b := newBench(t)
	l := b.open()
	web := machine("web")
	web.Ports = []lab.Forward{{HostPort: freePort(t), GuestPort: 80}}
	w := b.want(web)
	var planned error
	looked := false
	_, err := l.Up(b.ctx, w, UpOptions{Options: Options{Events: func(e Event) {
		if e.Stage == StageCheck && !looked {
			looked = true
			_, planned = l.Plan(b.ctx, w, UpOptions{})
		}
	}}})
	if err != nil || planned != nil || !looked {
		t.Errorf("up: %v, plan: %v, looked: %v", err, planned, looked)
	}
}

// A command was killed after it had a port listened on, and before it recorded that.
func TestPortThatIsNotRecorded(t *testing.T) {
	b := newBench(t)
	l := b.open()
	web := machine("web")
	b.up(l, b.want(web))
	state, err := l.read()
	if err != nil {
		t.Fatal(err)
	}
	super, err := supervise.Dial(b.ctx, b.Dirs, l.ID())
	if err != nil {
		t.Fatal(err)
	}
	defer super.Close()
	web.Ports = []lab.Forward{{HostPort: freePort(t), GuestPort: 80}}
	g := lab.Generation{Lab: l.ID(), Machine: "web", Number: 1}
	if _, err := super.Plug(b.ctx, cable(g, web, state.Machines["web"].Create)); err != nil {
		t.Fatal(err)
	}
	b.up(l, b.want(web))
	b.expect(l, "web@1 ready")
}

// TestMemoryTogether is told of, and refused only where it is hopeless.
func TestMemoryTogether(t *testing.T) {
	for name, tt := range map[string]struct {
		host providers.HostMemory
		each lab.Bytes
		want string // the note
	}{
		"enough":    {providers.HostMemory{RAM: lab.GiB}, 512 * lab.MiB, ""},
		"not known": {providers.HostMemory{}, lab.GiB, ""},
		"too much":  {providers.HostMemory{RAM: lab.GiB}, 768 * lab.MiB, "the machines ask for 1536MiB of memory together, and the host has 1GiB: it may swap, or end some of them"},
		"promised":  {providers.HostMemory{RAM: lab.GiB, Unbounded: true}, 2 * lab.GiB, "the machines ask for 4GiB of memory together, and the host has 1GiB: it may swap, or end some of them"},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t)
			b.provider = memory.New(memory.Config{Memory: tt.host})
			b.watched, b.Providers["memory"] = b.provider, b.provider
			l := b.open()
			db, web := machine("db"), machine("web")
			db.Memory, web.Memory = tt.each, tt.each
			var notes []string
			o := UpOptions{Options: Options{Events: func(e Event) {
				if e.Stage == StageNote {
					notes = append(notes, e.Text)
				}
			}}}
			if _, err := l.Plan(b.ctx, b.want(db, web), o); err != nil {
				t.Fatal(err)
			}
			if got := strings.Join(notes, "\n"); got != tt.want {
				t.Errorf("notes %q, want %q", got, tt.want)
			}
		})
	}
}

// cramped is a provider with little room for the files of machines.
type cramped struct {
	*memory.Provider
	free lab.Bytes
	err  error
}

func (c *cramped) HostRoom(context.Context) (providers.HostRoom, error) {
	return providers.HostRoom{At: "/srv/labs", Free: c.free}, c.err
}

// What plainly does not fit on the host's disk is refused before anything happens, and what
// needs no room is not.
func TestRoomOfTheHost(t *testing.T) {
	b := newBench(t)
	disk := &cramped{Provider: b.provider, free: 2*birthRoom - 1}
	b.Providers["memory"] = disk
	l := b.open()
	w := b.want(machine("db"), machine("web"))
	want := "1MiB of disk are free in /srv/labs, and the machines need 1800KiB at least"
	if _, err := l.Up(b.ctx, w, UpOptions{}); !errors.Is(err, syscall.ENOSPC) || err.Error() != want {
		t.Errorf("up: got %v, want %s", err, want)
	}
	if l.book.Exists() {
		t.Error("something was made")
	}
	disk.free = 2 * birthRoom
	b.up(l, w)
	disk.free = 0
	b.up(l, w) // nothing to do
	if _, err := l.Rebuild(b.ctx, w, UpOptions{}); err == nil || err.Error() != "0B of disk are free in /srv/labs, and the machines need 1800KiB at least" {
		t.Errorf("replace: got %v", err)
	}
	b.expect(l, "db@1 ready", "web@1 ready")
	if err := l.Stop(b.ctx, StopOptions{}); err != nil {
		t.Fatal(err)
	}
	disk.free = startRoom // for one of two
	if err := l.Start(b.ctx, Options{}); err == nil || err.Error() != "256KiB of disk are free in /srv/labs, and the machines need 512KiB at least" {
		t.Errorf("start: got %v", err)
	}
	b.expect(l, "db@1 stopped", "web@1 stopped")
	if err := l.Start(b.ctx, Options{Machines: []lab.Name{"db"}}); err != nil {
		t.Error(err)
	}
	disk.err = fmt.Errorf("%w: no pool", providers.ErrIncapable)
	if err := l.Start(b.ctx, Options{Machines: []lab.Name{"web"}}); !errors.Is(err, providers.ErrIncapable) {
		t.Errorf("start without a place: got %v", err)
	}
	b.expect(l, "db@1 ready", "web@1 stopped")
}

// TestRefusedStart has start find out beforehand what up would.
func TestRefusedStart(t *testing.T) {
	b := hosted(t)
	l := b.open()
	db, web := machine("db"), machine("web")
	db.Ports = []lab.Forward{{HostPort: freePort(t), GuestPort: 80}}
	b.up(l, b.want(db, web))
	if err := l.Stop(b.ctx, StopOptions{}); err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp4", fmt.Sprintf("127.0.0.1:%d", db.Ports[0].HostPort))
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	before, _ := l.History()
	if err := l.Start(b.ctx, Options{}); err == nil || !strings.Contains(err.Error(), "is taken by another program") {
		t.Errorf("got %v", err)
	}
	if after, _ := l.History(); len(after) != len(before) {
		t.Errorf("%d records became %d", len(before), len(after))
	}
	if err := l.Start(b.ctx, Options{Machines: []lab.Name{"web"}}); err != nil { // another one's port
		t.Error(err)
	}
	b.expect(l, "db@1 stopped", "web@1 ready")
	if err := ln.Close(); err != nil {
		t.Fatal(err)
	}
	if err := l.Start(b.ctx, Options{}); err != nil {
		t.Error(err)
	}
	b.expect(l, "db@1 ready", "web@1 ready")
}
