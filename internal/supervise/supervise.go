// SPDX-License-Identifier: Apache-2.0

// Package supervise is the one background process of a running lab, and how the
// command line talks to it. The supervisor owns the lab's switch, holds the other
// ends of its machines' cables and agent channels, listens for forwarded ports and
// notices when a machine ends. It keeps nothing on disk but the relays: a lab outlives it, and
// whoever starts the next one plugs the running machines in again.
package supervise

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/labfile/lab/internal/dirs"
	"github.com/labfile/lab/internal/guest/agentapi"
	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/network"
	"github.com/labfile/lab/internal/proxy"
	"github.com/labfile/lab/providers"
)

// EventKind says what happened to a machine.
type EventKind string

// The kinds of events.
const (
	EventExited EventKind = "exited" // the machine no longer runs
	EventCable  EventKind = "cable"  // its cable broke and was plugged in again
)

// Event is something that the supervisor noticed, for the lab's record.
type Event struct {
	Kind       EventKind
	Generation lab.Generation
	Exit       providers.Exit // EventExited
	Detail     string         // EventCable: why it broke
	At         time.Time
}

// Config is what a supervisor needs.
type Config struct {
	ID       lab.ID
	Dirs     dirs.Dirs
	Provider providers.Provider
	Version  string       // of this program; clients compare it with theirs
	Log      *slog.Logger // nil discards

	// Record keeps an event; several goroutines may call it at once. An error is
	// logged. Nil drops them.
	Record func(Event) error

	// Folder makes a machine without an agent mount a folder, and returns a connection
	// of which the host is to be the sftp server. dial connects to a port of the guest. A *agentapi.RefusedError
	// says why it never will. Nil if such machines mount none.
	Folder func(ctx context.Context, g lab.Generation, f agentapi.Folder, dial func(context.Context, uint16) (net.Conn, error)) (io.ReadWriteCloser, error)

	// Ready is called once the supervisor serves. May be nil.
	Ready func()

	// Grace is how long the supervisor waits for its first client. Zero means a
	// minute.
	Grace time.Duration
}

// startupWait is how long a new supervisor lets a question about a machine that it
// does not know wait for the machine to be plugged in: after a crash its successor
// is asked before it was told everything.
const startupWait = 3 * time.Second

// supervisor is the state of Run.
type supervisor struct {
	cfg   Config
	log   *slog.Logger
	since time.Time
	sw    *network.Switch // nil if the provider's machines have no cables

	ctx    context.Context // ends when the supervisor is to end
	cancel context.CancelCauseFunc
	wg     sync.WaitGroup

	mu       sync.Mutex
	machines map[lab.Name]*machine // those that are present
	beside   map[lab.Name]*machine // standbys, and those that are draining
	clients  int                   // connections that are open
	met      bool                  // there was a client
	changed  chan struct{}         // closed and replaced when machines changes
	exposed  []lab.Exposed         // ports of this host that the guests reach
	relays   []proxy.Relay         // that the guests were told of
}

// errIdle ends a supervisor that has no machines and no clients.
var errIdle = errors.New("no machine is plugged in any more")

// Run is the supervisor's main loop. It returns nil when no machine is plugged in
// any more and no client is connected, when it was told to end, or when ctx ended;
// ErrRunning if the lab has a supervisor already. Machines go on running.
func Run(ctx context.Context, cfg Config) error {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Grace == 0 {
		cfg.Grace = time.Minute
	}
	if err := os.MkdirAll(cfg.Dirs.RunLab(cfg.ID), 0o700); err != nil {
		return fmt.Errorf("starting the supervisor: %w", err)
	}
	l, err := claim(ctx, cfg)
	if err != nil {
		return fmt.Errorf("starting the supervisor of %s: %w", cfg.ID, err)
	}
	defer l.Close()
	s := &supervisor{
		cfg: cfg, log: cfg.Log, since: time.Now(),
		machines: make(map[lab.Name]*machine), beside: make(map[lab.Name]*machine), changed: make(chan struct{}),
	}
	s.ctx, s.cancel = context.WithCancelCause(ctx)
	defer s.cancel(nil)
	if _, ok := cfg.Provider.(providers.Cabled); ok {
		if s.sw, err = network.New(network.Config{Network: lab.NetworkOf(cfg.ID), Log: cfg.Log}); err != nil {
			return fmt.Errorf("starting the supervisor: %w", err)
		}
		defer s.sw.Close()
	}
	if s.relays, err = Relays(cfg.Dirs, cfg.ID); err != nil {
		s.log.Warn("guests reach no proxy before the next \"lab up\"", "err", err)
	}
	s.exposeNow()
	path := socketPath(cfg.Dirs, cfg.ID)
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) { // of a dead one
		return fmt.Errorf("starting the supervisor: %w", err)
	}
	ln, err := listen(path)
	if err != nil {
		return fmt.Errorf("starting the supervisor: %w", err)
	}
	return s.run(ln)
}

// claim takes the lock that makes this process the lab's supervisor. A client that
// looks at the lock holds it for a moment, so one failure means nothing.
func claim(ctx context.Context, cfg Config) (*os.File, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, time.Second, ErrRunning)
	defer cancel()
	return lock(ctx, lockPath(cfg.Dirs, cfg.ID))
}

// run serves until the end.
func (s *supervisor) run(ln net.Listener) error {
	context.AfterFunc(s.ctx, func() { ln.Close() })
	grace := time.AfterFunc(s.cfg.Grace, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.met = true
		s.endIfIdle()
	})
	defer grace.Stop()
	s.log.Info("supervisor started", "lab", s.cfg.ID, "version", s.cfg.Version, "pid", os.Getpid())
	if s.cfg.Ready != nil {
		s.cfg.Ready()
	}
	var err error
	for {
		c, aerr := ln.Accept()
		if s.ctx.Err() != nil {
			if aerr == nil {
				c.Close()
			}
			break
		}
		if aerr != nil {
			err = fmt.Errorf("listening to clients: %w", aerr)
			s.cancel(err)
			break
		}
		s.mu.Lock()
		s.clients++
		s.met = true
		s.mu.Unlock()
		s.wg.Go(func() { s.converse(c) })
	}
	ln.Close()
	s.mu.Lock()
	left := s.sorted()
	s.mu.Unlock()
	for _, m := range left {
		m.end()
	}
	s.wg.Wait()
	s.log.Info("supervisor ended", "reason", context.Cause(s.ctx))
	return err
}

// endIfIdle ends the supervisor if nobody needs it. Called with s.mu held.
func (s *supervisor) endIfIdle() {
	if s.met && s.clients == 0 && len(s.machines)+len(s.beside) == 0 {
		s.cancel(errIdle)
	}
}

// converse serves one connection.
func (s *supervisor) converse(c net.Conn) {
	defer func() {
		c.Close()
		s.mu.Lock()
		defer s.mu.Unlock()
		s.clients--
		s.endIfIdle()
	}()
	defer context.AfterFunc(s.ctx, func() { _ = c.SetDeadline(time.Unix(1, 0)) })()
	serve(s, c)
}

// update tells those who wait that the set of machines changed. Called with s.mu
// held.
func (s *supervisor) update() {
	close(s.changed)
	s.changed = make(chan struct{})
	if s.sw != nil {
		s.sw.SetNames(s.names(), s.direct())
	}
	s.endIfIdle()
}

// names are what the guests can look up: each machine, each role of replicas, and what
// leads to this host.
func (s *supervisor) names() map[string][]netip.Addr {
	names := s.namesOfHost()
	for _, m := range s.sorted() {
		if m.phase == PhasePresent && m.spec.Addr.Is4() && !m.spec.Hidden {
			names[string(m.spec.Generation.Machine)] = []netip.Addr{m.spec.Addr}
		}
	}
	for _, m := range s.sorted() {
		role := m.spec.Role
		if m.phase != PhasePresent || m.withdrawn || m.spec.Hidden {
			continue
		}
		if _, taken := s.machines[lab.Name(role)]; role != "" && !taken && m.spec.Addr.Is4() {
			names[role] = append(names[role], m.spec.Addr)
		}
	}
	return names
}

// direct are the addresses that machines have where they run, by those at the switch.
func (s *supervisor) direct() map[netip.Addr]netip.Prefix {
	all := make(map[netip.Addr]netip.Prefix)
	for _, m := range s.sorted() {
		if m.phase == PhasePresent && m.spec.Addr.Is4() && m.spec.Direct.IsValid() {
			all[m.spec.Addr] = m.spec.Direct
		}
	}
	return all
}

// sorted returns the machines by name and generation. Called with s.mu held.
func (s *supervisor) sorted() []*machine {
	ms := slices.Concat(slices.Collect(maps.Values(s.machines)), slices.Collect(maps.Values(s.beside)))
	slices.SortFunc(ms, func(a, b *machine) int {
		return cmp.Or(
			strings.Compare(string(a.spec.Generation.Machine), string(b.spec.Generation.Machine)),
			cmp.Compare(a.spec.Generation.Number, b.spec.Generation.Number))
	})
	return ms
}

// asked returns the machine that a request names: the present one, or a generation.
func (s *supervisor) asked(ctx context.Context, q request) (*machine, error) {
	if g := q.Generation; q.Name == "" && g != nil {
		return s.find(ctx, g.String(), func() *machine { return s.generation(*g) })
	}
	return s.find(ctx, fmt.Sprintf("machine %q", q.Name), func() *machine { return s.machines[q.Name] })
}

// generation returns a generation that is plugged in, or nil. Called with s.mu held.
func (s *supervisor) generation(g lab.Generation) *machine {
	for _, m := range []*machine{s.machines[g.Machine], s.beside[g.Machine]} {
		if m != nil && m.spec.Generation == g {
			return m
		}
	}
	return nil
}

// find returns a machine that is plugged in. It calls look with s.mu held.
func (s *supervisor) find(ctx context.Context, what string, look func() *machine) (*machine, error) {
	patience := time.NewTimer(time.Until(s.since.Add(startupWait)))
	defer patience.Stop()
	for {
		s.mu.Lock()
		m, changed := look(), s.changed
		s.mu.Unlock()
		late := patience.C
		if m != nil {
			select {
			case <-m.ready:
			case <-ctx.Done():
				return nil, context.Cause(ctx)
			}
			if m.err == nil {
				return m, nil
			}
			late = nil // it did not start, and is about to be forgotten
		}
		select {
		case <-changed:
		case <-late:
			return nil, fmt.Errorf("%s: %w", what, ErrNotPlugged)
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// plug makes the machine what spec says and returns its forwards.
func (s *supervisor) plug(ctx context.Context, spec Machine) ([]lab.Forward, error) {
	g := spec.Generation
	if g.Lab != s.cfg.ID || g.Number < 1 || !lab.ValidLabel(string(g.Machine)) {
		return nil, fmt.Errorf("plugging in %s: not a generation of lab %q", g, s.cfg.ID)
	}
	s.mu.Lock()
	if s.ctx.Err() != nil {
		s.mu.Unlock()
		return nil, ErrNotRunning
	}
	old, beside := s.machines[g.Machine], s.beside[g.Machine]
	if old != nil && old.spec.Generation.Number > g.Number {
		s.mu.Unlock()
		return nil, fmt.Errorf("plugging in %s: %w: %s", g, ErrStale, old.spec.Generation)
	}
	if old != nil && old.same(spec) {
		old.withdrawn = false
		s.update()
		s.mu.Unlock()
		if err := old.started(ctx); err != nil {
			return nil, err
		}
		return old.forward(spec.Forwards)
	}
	var ended []*machine
	m := newMachine(s, spec)
	switch {
	case spec.Standby && beside != nil && beside.same(spec) && beside.phase == PhaseStandby:
		s.mu.Unlock()
		return nil, beside.started(ctx)
	case spec.Standby && beside != nil:
		s.mu.Unlock()
		m.cancel()
		return nil, fmt.Errorf("plugging in %s: %w: %s", g, ErrBeside, beside.spec.Generation)
	case spec.Standby && old != nil && old.spec.Generation == g:
		s.mu.Unlock()
		m.cancel()
		return nil, fmt.Errorf("plugging in %s: it is present already, and differs", g)
	case spec.Standby:
		m.phase = PhaseStandby
		s.beside[g.Machine] = m
	default:
		if beside != nil && (beside.spec.Generation == g || beside.phase == PhaseStandby && beside.spec.Generation.Number < g.Number) {
			delete(s.beside, g.Machine)
			ended = append(ended, beside)
		}
		if old != nil {
			ended = append(ended, old)
		}
		s.machines[g.Machine] = m
	}
	s.update()
	s.mu.Unlock()
	for _, old := range ended {
		old.end()
	}
	if m.err = m.start(ctx); m.err != nil {
		close(m.ready)
		s.drop(m)
		return nil, m.err
	}
	close(m.ready)
	s.log.Info("plugged in", "machine", g, "phase", m.phaseNow(), "addr", spec.Addr)
	if spec.Standby {
		return nil, nil
	}
	return m.forward(spec.Forwards)
}

// unplug takes a generation off the network, if it is there.
func (s *supervisor) unplug(g lab.Generation) {
	s.mu.Lock()
	m := s.generation(g)
	s.mu.Unlock()
	if m != nil {
		s.drop(m)
	}
}

// drop ends a machine's links and forgets it, unless another one has taken its
// place already.
func (s *supervisor) drop(m *machine) {
	m.end()
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, among := range []map[lab.Name]*machine{s.machines, s.beside} {
		if among[m.spec.Generation.Machine] == m {
			delete(among, m.spec.Generation.Machine)
			s.update()
			s.log.Info("unplugged", "machine", m.spec.Generation)
		}
	}
}

func (s *supervisor) record(e Event) {
	e.At = time.Now()
	if s.cfg.Record == nil {
		return
	}
	if err := s.cfg.Record(e); err != nil {
		s.log.Error("recording an event", "kind", e.Kind, "machine", e.Generation, "err", err)
	}
}

func (s *supervisor) status() *Status {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := &Status{Version: s.cfg.Version, PID: os.Getpid(), Since: s.since, Machines: []MachineStatus{}}
	for _, m := range s.sorted() {
		st.Machines = append(st.Machines, m.status())
	}
	return st
}
