// SPDX-License-Identifier: Apache-2.0

// Package memory runs machines inside the calling process: each is a goroutine
// that executes a Program, with a console, a network cable, an agent's port and
// TCP ports. It serves tests and dry runs, and keeps the whole contract.
package memory

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/providers"
)

// Config is what a Provider is made with.
type Config struct {
	// Program says what a machine runs; nil runs Echo on all.
	Program func(providers.Spec) Program
	// Findings are what Check returns.
	Findings []providers.Finding
	// Dir is where the overlays that Freeze and Snapshot make are; empty makes a
	// temporary directory that goes with the last machine that was frozen.
	Dir string
	// Memory is what HostMemory returns; zero if that is not known.
	Memory providers.HostMemory
	// Room is what HostRoom returns; zero if that is not known.
	Room providers.HostRoom
	// Refuse is what Create also refuses; nil for nothing.
	Refuse func(providers.Spec) error
}

// Provider is a host with its machines. They end with the process.
type Provider struct {
	cfg Config

	mu       sync.Mutex
	machines map[lab.Generation]*machine
	temp     string // stands for Config.Dir; empty if there is none
}

var (
	_ providers.Provider    = (*Provider)(nil)
	_ providers.Cabled      = (*Provider)(nil)
	_ providers.AgentDialer = (*Provider)(nil)
	_ providers.PortDialer  = (*Provider)(nil)
	_ providers.Freezer     = (*Provider)(nil)

	_ providers.SpecChecker   = (*Provider)(nil)
	_ providers.MemoryCounter = (*Provider)(nil)
	_ providers.RoomCounter   = (*Provider)(nil)
)

// New returns a host without machines.
func New(cfg Config) *Provider {
	if cfg.Program == nil {
		cfg.Program = func(providers.Spec) Program { return Echo }
	}
	return &Provider{cfg: cfg, machines: map[lab.Generation]*machine{}}
}

var errIsolated = errors.New("its sockets are gone")

// machine is one generation. Its fields are guarded by Provider.mu.
type machine struct {
	spec    providers.Spec
	broken  string // why it is half made; empty if it is whole
	running *Guest // nil if it does not run
	exit    providers.Exit
	console *log
	busy    sync.Mutex // held by the console's user
	disk    disk
}

// Name returns "memory".
func (p *Provider) Name() string { return "memory" }

// Check returns the configured findings.
func (p *Provider) Check(ctx context.Context) ([]providers.Finding, error) {
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("checking the host: %w", err)
	}
	return slices.Clone(p.cfg.Findings), nil
}

// Create keeps the spec. A half-made generation becomes whole.
func (p *Provider) Create(ctx context.Context, spec providers.Spec) error {
	err := cmp.Or(ctx.Err(), p.CheckSpec(ctx, spec))
	if err != nil {
		return fmt.Errorf("creating machine %q: %w", spec.Generation, err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if m := p.machines[spec.Generation]; m != nil && m.broken == "" {
		return nil
	}
	p.machines[spec.Generation] = &machine{spec: spec, console: &log{}}
	return nil
}

// CheckSpec says what Create would refuse.
func (p *Provider) CheckSpec(_ context.Context, spec providers.Spec) error {
	if err := checkSpec(spec); err != nil {
		return err
	}
	if p.cfg.Refuse != nil {
		return p.cfg.Refuse(spec)
	}
	return nil
}

// HostMemory returns the configured memory.
func (p *Provider) HostMemory(context.Context) (providers.HostMemory, error) {
	return p.cfg.Memory, nil
}

// HostRoom returns the configured room.
func (p *Provider) HostRoom(context.Context) (providers.HostRoom, error) { return p.cfg.Room, nil }

func checkSpec(s providers.Spec) error {
	switch {
	case !lab.ValidLabel(string(s.Lab)) || len(s.Lab) > lab.MaxID:
		return fmt.Errorf("%q is not the id of a lab", s.Lab)
	case !lab.ValidLabel(string(s.Machine)):
		return fmt.Errorf("%q is not the name of a machine", s.Machine)
	case s.Number < 1:
		return fmt.Errorf("%d is not the number of a generation", s.Number)
	case s.Image.Arch != "amd64" && s.Image.Arch != "arm64":
		return fmt.Errorf("%w: images for %q are not supported", providers.ErrIncapable, s.Image.Arch)
	case s.Disk != 0 && s.Disk < s.Image.Size:
		return fmt.Errorf("disk of %s is smaller than the image's %s", s.Disk, s.Image.Size)
	case s.CPUs < 1:
		return fmt.Errorf("%d is not a number of processors", s.CPUs)
	case s.Memory < 1:
		return fmt.Errorf("%s of memory are too little", s.Memory)
	case s.Append != "" && s.Image.Kernel == "":
		return fmt.Errorf("%q cannot go to the kernel's command line: the image boots by itself", s.Append)
	}
	return checkStorage(s)
}

// Break leaves of a stopped generation what an interrupted Create or Destroy
// leaves: its place, with the reason. Tests use it.
func (p *Provider) Break(g lab.Generation, reason string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if m := p.machines[g]; m != nil {
		m.broken = reason
	}
}

// Kill ends a running machine the way a signal from a stranger ends a hypervisor.
// Tests use it.
func (p *Provider) Kill(g lab.Generation) {
	p.mu.Lock()
	m := p.machines[g]
	p.mu.Unlock()
	if m != nil {
		p.force(m, providers.Exit{Reason: providers.ExitSignaled, Detail: "killed"})
	}
}

// Pause halts or resumes a running machine's processors as far as Inspect tells;
// its program goes on, but hears nothing of the power button. Tests use it.
func (p *Provider) Pause(g lab.Generation, paused bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if m := p.machines[g]; m != nil && m.running != nil {
		m.running.paused = paused
	}
}

// Isolate makes a running machine unreachable, or reachable again, as if its sockets
// were gone: it still hears its power button. Tests use it.
func (p *Provider) Isolate(g lab.Generation, isolated bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if m := p.machines[g]; m != nil && m.running != nil {
		m.running.isolated = isolated
	}
}

// get returns a whole generation.
func (p *Provider) get(ctx context.Context, g lab.Generation) (*machine, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	m := p.machines[g]
	if m == nil || m.broken != "" {
		return nil, providers.ErrNotFound
	}
	return m, nil
}

// guest returns what runs on a generation.
func (p *Provider) guest(ctx context.Context, g lab.Generation) (*machine, *Guest, error) {
	m, err := p.get(ctx, g)
	if err != nil {
		return nil, nil, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if m.running == nil {
		return nil, nil, providers.ErrNotRunning
	}
	return m, m.running, nil
}

// reach returns what runs on a generation that is not isolated.
func (p *Provider) reach(ctx context.Context, g lab.Generation) (*machine, *Guest, error) {
	m, guest, err := p.guest(ctx, g)
	if err != nil {
		return nil, nil, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if guest.isolated {
		return nil, nil, errIsolated
	}
	return m, guest, nil
}

// Start runs the generation's program.
func (p *Provider) Start(ctx context.Context, g lab.Generation) error {
	m, err := p.get(ctx, g)
	if err != nil {
		return fmt.Errorf("starting machine %q: %w", g, err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if m.running != nil {
		m.running.paused = false
		return nil
	}
	if err := p.volumeInUse(m); err != nil {
		return fmt.Errorf("starting machine %q: %w", g, err)
	}
	m.console = &log{}
	m.exit = providers.Exit{}
	guest := newGuest(m.spec, m.console)
	guest.wrote = func(n lab.Bytes) {
		p.mu.Lock()
		defer p.mu.Unlock()
		m.disk.write(n)
	}
	m.running = guest
	program := p.cfg.Program(m.spec)
	go func() {
		err := program(guest.ctx, guest)
		exit := providers.Exit{Reason: providers.ExitGuest, Detail: "powered off"}
		switch {
		case guest.pressed():
			exit.Reason = providers.ExitHost
		case err != nil:
			exit = providers.Exit{Reason: providers.ExitPanic, Detail: err.Error()}
		}
		p.end(m, guest, exit)
	}()
	return nil
}

// end makes a machine stopped, unless it already is: the first reason counts.
func (p *Provider) end(m *machine, guest *Guest, exit providers.Exit) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if m.running != guest {
		return
	}
	exit.At = time.Now()
	m.running, m.exit, guest.exit = nil, exit, exit
	guest.shut()
}

// force ends a machine at once, if it runs. Its program is told by its context.
func (p *Provider) force(m *machine, exit providers.Exit) {
	p.mu.Lock()
	guest := m.running
	p.mu.Unlock()
	if guest != nil {
		p.end(m, guest, exit)
	}
}

// Stop presses the power button, waits for the program to return, and then ends
// the machine by force. ErrUnasked if the machine is paused.
func (p *Provider) Stop(ctx context.Context, g lab.Generation, grace time.Duration) error {
	m, guest, err := p.guest(ctx, g)
	if errors.Is(err, providers.ErrNotFound) || errors.Is(err, providers.ErrNotRunning) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("stopping machine %q: %w", g, err)
	}
	p.mu.Lock()
	paused := guest.paused
	p.mu.Unlock()
	if grace > 0 && paused {
		return fmt.Errorf("stopping machine %q: %w: it is paused", g, providers.ErrUnasked)
	}
	if grace > 0 {
		guest.press()
		t := time.NewTimer(grace)
		defer t.Stop()
		select {
		case <-guest.gone:
			return nil
		case <-t.C:
		case <-ctx.Done():
			return fmt.Errorf("stopping machine %q: %w", g, ctx.Err())
		}
	}
	p.end(m, guest, providers.Exit{Reason: providers.ExitHost, Detail: providers.DetailForced})
	return nil
}

// Destroy forgets the generation.
func (p *Provider) Destroy(ctx context.Context, g lab.Generation) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("destroying machine %q: %w", g, err)
	}
	p.mu.Lock()
	m := p.machines[g]
	delete(p.machines, g)
	p.mu.Unlock()
	if m == nil {
		return nil
	}
	p.force(m, providers.Exit{Reason: providers.ExitHost, Detail: "destroyed"})
	if err := p.removeDisk(m); err != nil {
		return fmt.Errorf("destroying machine %q: %w", g, err)
	}
	return nil
}

// Inspect returns what is known of the generation.
func (p *Provider) Inspect(ctx context.Context, g lab.Generation) (providers.Machine, error) {
	err := ctx.Err()
	p.mu.Lock()
	defer p.mu.Unlock()
	m := p.machines[g]
	if err == nil && m == nil {
		err = providers.ErrNotFound
	}
	if err != nil {
		return providers.Machine{}, fmt.Errorf("inspecting machine %q: %w", g, err)
	}
	return m.facts(), nil
}

func (m *machine) facts() providers.Machine {
	f := providers.Machine{
		Generation: m.spec.Generation, State: providers.StateStopped, Image: m.spec.Image.Digest,
		Disk: m.disk.taken, Written: m.disk.written, Volumes: slices.Clone(m.spec.Volumes),
	}
	switch {
	case m.broken != "":
		f.State, f.Image, f.Volumes, f.Reason = providers.StateBroken, "", nil, m.broken
	case m.running != nil:
		f.State, f.PID, f.Since, f.Accel = providers.StateRunning, os.Getpid(), m.running.since, "memory"
		if m.running.paused {
			f.State = providers.StatePaused
		}
		if m.running.isolated {
			f.Unreachable = errIsolated.Error()
		}
	default:
		f.Exit = m.exit
	}
	return f
}

// List returns the generations of one lab, or of all.
func (p *Provider) List(ctx context.Context, id lab.ID) ([]providers.Machine, error) {
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("listing machines: %w", err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	var found []providers.Machine
	for g, m := range p.machines {
		if id == "" || g.Lab == id {
			found = append(found, m.facts())
		}
	}
	slices.SortFunc(found, func(a, b providers.Machine) int {
		return cmp.Or(cmp.Compare(a.Lab, b.Lab), cmp.Compare(a.Machine, b.Machine), cmp.Compare(a.Number, b.Number))
	})
	return found, nil
}

// Wait returns once the generation's program has ended.
func (p *Provider) Wait(ctx context.Context, g lab.Generation) (providers.Exit, error) {
	p.mu.Lock()
	m := p.machines[g]
	var guest *Guest
	var exit providers.Exit
	if m != nil {
		guest, exit = m.running, m.exit
	}
	p.mu.Unlock()
	switch {
	case m == nil:
		return exit, fmt.Errorf("waiting for machine %q: %w", g, providers.ErrNotFound)
	case guest == nil:
		return exit, nil
	}
	select {
	case <-guest.gone:
		return guest.exit, nil
	case <-ctx.Done():
		return exit, fmt.Errorf("waiting for machine %q: %w", g, ctx.Err())
	}
}

// Console opens the guest's console. A second user is refused.
func (p *Provider) Console(ctx context.Context, g lab.Generation) (io.ReadWriteCloser, error) {
	m, guest, err := p.reach(ctx, g)
	if err == nil && !m.busy.TryLock() {
		err = errors.New("somebody else is using it")
	}
	if err != nil {
		return nil, fmt.Errorf("opening the console of machine %q: %w", g, err)
	}
	return &consoleUser{guest: guest, at: m.console.size(), free: sync.OnceFunc(m.busy.Unlock)}, nil
}

// OpenLog opens the console's log; the hypervisor's is always empty.
func (p *Provider) OpenLog(ctx context.Context, g lab.Generation, l providers.Log) (io.ReadCloser, error) {
	err := ctx.Err()
	p.mu.Lock()
	m := p.machines[g]
	p.mu.Unlock()
	switch {
	case err != nil:
	case m == nil:
		err = providers.ErrNotFound
	case l == providers.LogHypervisor:
		return &logReader{log: &log{}}, nil
	case l == providers.LogConsole:
		p.mu.Lock()
		defer p.mu.Unlock()
		return &logReader{log: m.console}, nil
	default:
		err = errors.New("there is no such log")
	}
	return nil, fmt.Errorf("opening the %s log of machine %q: %w", l, g, err)
}

// DialNIC plugs the machine's cable in; the guest gets the other end from
// Guest.AcceptNIC.
func (p *Provider) DialNIC(ctx context.Context, g lab.Generation) (net.Conn, error) {
	_, guest, err := p.reach(ctx, g)
	if err == nil && guest.Spec.MAC == "" {
		err = errors.New("it has no network card")
	}
	if err != nil {
		return nil, fmt.Errorf("plugging in machine %q: %w", g, err)
	}
	return guest.nic.dial(ctx, guest)
}

// DialAgent opens the agent's port; the guest gets the other end from
// Guest.AcceptAgent.
func (p *Provider) DialAgent(ctx context.Context, g lab.Generation) (net.Conn, error) {
	_, guest, err := p.reach(ctx, g)
	if err == nil && !guest.Spec.Agent {
		err = errors.New("it has no port for the agent")
	}
	if err != nil {
		return nil, fmt.Errorf("dialing the agent of machine %q: %w", g, err)
	}
	return guest.agent.dial(ctx, guest)
}

// DialPort connects to a port that the guest listens on.
func (p *Provider) DialPort(ctx context.Context, g lab.Generation, port uint16) (net.Conn, error) {
	_, guest, err := p.reach(ctx, g)
	if err != nil {
		return nil, fmt.Errorf("dialing port %d of machine %q: %w", port, g, err)
	}
	l := guest.listener(port)
	if l == nil {
		return nil, fmt.Errorf("dialing port %d of machine %q: connection refused", port, g)
	}
	return l.dial(ctx, guest)
}
