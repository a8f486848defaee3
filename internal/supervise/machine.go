// SPDX-License-Identifier: Apache-2.0

package supervise

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/labfile/lab/internal/guest/channel"
	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/network"
	"github.com/labfile/lab/providers"
)

// machine is one running generation.
type machine struct {
	s    *supervisor
	spec Machine // its forwards are those of the first plug

	ctx    context.Context // ends when the machine is taken off
	cancel context.CancelFunc
	wg     sync.WaitGroup
	ready  chan struct{} // closed when start has returned
	err    error         // what start returned; valid once ready is closed

	phase     Phase     // guarded by s.mu
	withdrawn bool      // not to be found by its role's name; guarded by s.mu
	gaveWay   time.Time // when another generation took over; guarded by s.mu
	drainedBy time.Time // when the time to drain is over; guarded by s.mu

	open   atomic.Int64 // connections, and those that are being made
	active atomic.Int64 // nanoseconds since 1970; when it was last talked to through the supervisor

	mu      sync.Mutex // of what is below; never held while waiting
	port    *network.Port
	cable   Link
	agent   Link
	session *channel.Session
	changed chan struct{} // closed and replaced when session changes
	gate    *gate         // the forwards of a machine that is present
	mounts  []*mount
}

func newMachine(s *supervisor, spec Machine) *machine {
	m := &machine{
		s: s, spec: spec, cable: LinkNone, agent: LinkNone,
		ready: make(chan struct{}), changed: make(chan struct{}), phase: PhasePresent,
	}
	m.ctx, m.cancel = context.WithCancel(s.ctx)
	m.touch()
	if !spec.Standby {
		m.gate = newGate(s)
	}
	return m
}

// same reports whether spec describes this machine, leaving forwards aside.
func (m *machine) same(spec Machine) bool {
	return m.spec.Generation == spec.Generation && m.spec.Role == spec.Role && m.spec.Addr == spec.Addr && m.spec.Agent == spec.Agent
}

// start plugs in the cable and begins to look after the machine.
func (m *machine) start(ctx context.Context) error {
	if cabled, ok := m.s.cfg.Provider.(providers.Cabled); ok && m.s.sw != nil && m.spec.Addr.IsValid() {
		if err := m.plugIn(ctx, cabled); err != nil {
			return fmt.Errorf("plugging in %s: %w", m.spec.Generation, err)
		}
		m.wg.Go(func() { m.keepCable(cabled) })
	}
	if dialer, ok := m.s.cfg.Provider.(providers.AgentDialer); ok && m.spec.Agent {
		m.setSession(nil, LinkWaiting)
		m.wg.Go(func() { m.keepAgent(dialer) })
	}
	m.keepMounts(m.spec.Mounts, true)
	if trimmer, ok := m.s.cfg.Provider.(providers.LogTrimmer); ok {
		m.wg.Go(func() { m.trimLogs(trimmer) })
	}
	m.s.wg.Go(m.watch)
	return nil
}

// maxMachineLog bounds each log of a machine, and trimEvery says how often that is
// looked after: a guest may print without end.
const (
	maxMachineLog = 16 * lab.MiB
	trimEvery     = 30 * time.Second
)

// trimLogs keeps the machine's logs from filling the disk.
func (m *machine) trimLogs(trimmer providers.LogTrimmer) {
	for m.sleep(trimEvery) {
		if err := trimmer.TrimLogs(m.ctx, m.spec.Generation, maxMachineLog); err != nil && m.ctx.Err() == nil {
			m.s.log.Warn("trimming the logs of a machine", "machine", m.spec.Generation, "err", err)
		}
	}
}

// end takes everything off and returns when it is off. It may be called again.
func (m *machine) end() {
	m.mu.Lock() // see keepMounts
	m.cancel()
	m.mu.Unlock()
	for g := m.gateNow(); g != nil && !g.stop(m); g = m.gateNow() {
	}
	m.wg.Wait()
	m.mu.Lock()
	p := m.port
	m.mu.Unlock()
	if p != nil {
		p.Unplug()
	}
}

// started waits until the machine is plugged in.
func (m *machine) started(ctx context.Context) error {
	select {
	case <-m.ready:
		return m.err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// watch waits for the machine's end, records it and takes it off the network.
func (m *machine) watch() {
	for {
		exit, err := m.s.cfg.Provider.Wait(m.ctx, m.spec.Generation)
		if m.ctx.Err() != nil {
			return
		}
		if err == nil || errors.Is(err, providers.ErrNotFound) {
			m.s.log.Info("machine ended", "machine", m.spec.Generation, "reason", exit.Reason, "detail", exit.Detail)
			m.s.record(Event{Kind: EventExited, Generation: m.spec.Generation, Exit: exit})
			m.s.drop(m)
			return
		}
		m.s.log.Error("watching a machine", "machine", m.spec.Generation, "err", err)
		if !m.sleep(time.Second) {
			return
		}
	}
}

// sleep waits, and reports whether the machine is still plugged in.
func (m *machine) sleep(d time.Duration) bool {
	select {
	case <-m.ctx.Done():
		return false
	case <-time.After(d):
		return true
	}
}

// plugIn connects the machine with the switch.
func (m *machine) plugIn(ctx context.Context, cabled providers.Cabled) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(m.ctx, cancel)()
	conn, err := cabled.DialNIC(ctx, m.spec.Generation)
	if err != nil {
		return err
	}
	m.mu.Lock()
	p := m.port
	m.mu.Unlock()
	switch {
	case p != nil:
		p, err = p.Replug(m.ctx, conn)
	case m.spec.Standby:
		p, err = m.s.sw.PlugStandby(m.ctx, m.spec.Generation.Machine, m.spec.Addr, conn)
	default:
		p, err = m.s.sw.Plug(m.ctx, m.spec.Generation.Machine, m.spec.Addr, conn)
	}
	if err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.port, m.cable = p, LinkConnected
	return nil
}

// keepCable plugs the cable in again whenever it breaks while the machine runs.
func (m *machine) keepCable(cabled providers.Cabled) {
	for {
		<-m.port.Done() // only this goroutine replaces it
		if m.ctx.Err() != nil {
			return
		}
		m.mu.Lock()
		m.cable = LinkWaiting
		why := m.port.Err()
		m.mu.Unlock()
		if !m.again("the cable", func() error { return m.plugIn(m.ctx, cabled) }) {
			return
		}
		detail := why.Error()
		if errors.Is(why, io.EOF) {
			detail = "the machine's end was closed"
		}
		m.s.log.Warn("cable broke and was plugged in again", "machine", m.spec.Generation, "reason", detail)
		m.s.record(Event{Kind: EventCable, Generation: m.spec.Generation, Detail: detail})
	}
}

// again tries until it succeeds, and more and more rarely. It reports false if the
// machine no longer runs or was taken off.
func (m *machine) again(what string, try func() error) bool {
	for wait := 100 * time.Millisecond; m.sleep(wait); wait = min(2*wait, 5*time.Second) {
		err := try()
		switch {
		case err == nil:
			return true
		case errors.Is(err, providers.ErrNotRunning), errors.Is(err, providers.ErrNotFound):
			return false // watch is about to learn of it
		}
		m.s.log.Debug("connecting "+what, "machine", m.spec.Generation, "err", err)
	}
	return false
}

// agentPause keeps a hostile agent from having the host meet it without end.
const agentPause = 20 * time.Millisecond

// keepAgent holds a session with the machine's agent, for as long as it runs. The
// agent may answer late, when the guest has booted, and again after a reboot.
func (m *machine) keepAgent(dialer providers.AgentDialer) {
	defer m.setSession(nil, LinkNone)
	for m.ctx.Err() == nil {
		sess, err := m.meetAgent(dialer)
		if err != nil && !m.again("the agent", func() (err error) {
			sess, err = m.meetAgent(dialer)
			return err
		}) {
			return
		}
		m.setSession(sess, LinkConnected)
		m.wg.Go(func() { m.keepClock(sess) })
		select {
		case <-sess.Done():
			m.s.log.Debug("agent is gone", "machine", m.spec.Generation, "reason", sess.Err())
		case <-m.ctx.Done():
		}
		_ = sess.Close()
		m.setSession(nil, LinkWaiting)
		m.sleep(agentPause)
	}
}

func (m *machine) meetAgent(dialer providers.AgentDialer) (*channel.Session, error) {
	conn, err := dialer.DialAgent(m.ctx, m.spec.Generation)
	if err != nil {
		return nil, err
	}
	return channel.Client(m.ctx, conn)
}

func (m *machine) setSession(sess *channel.Session, l Link) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.session, m.agent = sess, l
	close(m.changed)
	m.changed = make(chan struct{})
}

// openAgent opens a stream to the agent, as soon as there is one.
func (m *machine) openAgent(ctx context.Context) (net.Conn, error) {
	if _, ok := m.s.cfg.Provider.(providers.AgentDialer); !ok || !m.spec.Agent {
		return nil, fmt.Errorf("machine %q: %w", m.spec.Generation.Machine, ErrNoAgent)
	}
	for {
		m.mu.Lock()
		sess, changed := m.session, m.changed
		m.mu.Unlock()
		if sess != nil {
			c, err := sess.Open(ctx)
			if err == nil {
				return c, nil
			}
			if ctx.Err() != nil {
				return nil, err
			}
			// The session has just ended: wait for the next one.
		}
		select {
		case <-changed:
		case <-m.ctx.Done():
			return nil, fmt.Errorf("machine %q: %w", m.spec.Generation.Machine, ErrNotPlugged)
		case <-ctx.Done():
			return nil, fmt.Errorf("waiting for the agent of machine %q: %w", m.spec.Generation.Machine, context.Cause(ctx))
		}
	}
}

// dial connects to a TCP port of the guest.
func (m *machine) dial(ctx context.Context, port uint16) (net.Conn, error) {
	if m.s.sw != nil {
		m.mu.Lock()
		p := m.port
		m.mu.Unlock()
		if p == nil {
			return nil, fmt.Errorf("dialing %s: %w", m.spec.Generation, network.ErrUnplugged)
		}
		return m.s.sw.DialPort(ctx, p, port)
	}
	if d, ok := m.s.cfg.Provider.(providers.PortDialer); ok {
		return d.DialPort(ctx, m.spec.Generation, port)
	}
	return nil, fmt.Errorf("machine %q: provider %s has no network", m.spec.Generation.Machine, m.s.cfg.Provider.Name())
}

// dialUDP makes a flow to a UDP port of the guest.
func (m *machine) dialUDP(ctx context.Context, port uint16) (net.Conn, error) {
	m.mu.Lock()
	p := m.port
	m.mu.Unlock()
	if m.s.sw == nil || p == nil {
		return nil, fmt.Errorf("dialing %s: %w", m.spec.Generation, network.ErrUnplugged)
	}
	return m.counted(nil, func() (net.Conn, error) { return m.s.sw.DialUDP(ctx, p, port) })
}

// forward makes the machine's forwards those that are wanted, and returns them in
// that order. Those that stay are not interrupted.
func (m *machine) forward(want []lab.Forward) ([]lab.Forward, error) {
	g := m.gateNow()
	if g == nil {
		return nil, fmt.Errorf("forwarding to %s: %w", m.spec.Generation, ErrStale) // another one took over meanwhile
	}
	g.converge.Lock()
	defer g.converge.Unlock()
	if m.gateNow() != g {
		return nil, fmt.Errorf("forwarding to %s: %w", m.spec.Generation, ErrStale)
	}
	next, _, gone, err := g.prepare(m, want)
	g.adopt(m, next)
	for _, f := range gone {
		f.f.Stop()
	}
	if err != nil {
		return nil, fmt.Errorf("forwarding to machine %q: %w", m.spec.Generation.Machine, err)
	}
	return g.bound(), nil
}

// status tells how the machine is doing. Called with s.mu held.
func (m *machine) status() MachineStatus {
	m.mu.Lock()
	defer m.mu.Unlock()
	st := MachineStatus{
		Generation: m.spec.Generation, Role: m.spec.Role, Addr: m.spec.Addr,
		Cable: m.cable, Agent: m.agent, Forwards: []lab.Forward{},
	}
	if m.gate != nil {
		st.Forwards = append(st.Forwards, m.gate.bound()...)
	}
	st.Phase, st.Withdrawn, st.Open = m.phase, m.withdrawn, int(m.open.Load())
	st.LastActive = time.Unix(0, m.active.Load())
	if m.port != nil {
		st.Counters = m.port.Counters()
		st.Open += m.port.Connections()
		if t := m.port.LastActive(); t.After(st.LastActive) {
			st.LastActive = t
		}
	}
	return st
}
