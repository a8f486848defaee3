// SPDX-License-Identifier: Apache-2.0

package supervise

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/labfile/lab/internal/lab"
)

// errMoved says that a machine gave way while it was connected to.
var errMoved = errors.New("another generation took over")

// promote makes a standby the machine that is present, with the forwards wanted.
func (s *supervisor) promote(ctx context.Context, g lab.Generation, want []lab.Forward, drain time.Duration) ([]lab.Forward, error) {
	for {
		s.mu.Lock()
		old, next := s.machines[g.Machine], s.beside[g.Machine]
		s.mu.Unlock()
		if old != nil && old.spec.Generation == g {
			if err := old.started(ctx); err != nil {
				return nil, err
			}
			return old.forward(want)
		}
		if next == nil || next.spec.Generation != g {
			return nil, fmt.Errorf("promoting %s: %w", g, ErrNotPlugged)
		}
		if err := next.started(ctx); err != nil {
			return nil, err
		}
		bound, err := s.takeOver(old, next, want, drain)
		if !errors.Is(err, errMoved) {
			return bound, err
		}
	}
}

// takeOver puts next into the place of old, which may be nil. What can fail comes
// before anything changes. errMoved if the two are no longer what they were.
func (s *supervisor) takeOver(old, next *machine, want []lab.Forward, drain time.Duration) ([]lab.Forward, error) {
	g := next.spec.Generation
	var gt *gate
	if old != nil {
		gt = old.gateNow()
	}
	if gt != nil {
		gt.converge.Lock()
		if gt.ctx.Err() != nil || old.gateNow() != gt { // old has just ended
			gt.converge.Unlock()
			gt = nil
		}
	}
	inherited := gt != nil
	if !inherited {
		gt = newGate(s)
		gt.converge.Lock()
	}
	defer gt.converge.Unlock()
	forwards, fresh, gone, err := gt.prepare(next, want)
	if err == nil {
		err = s.swap(old, next, gt, forwards, drain)
	}
	if err != nil {
		for _, f := range fresh {
			f.f.Stop()
		}
		if !inherited {
			gt.cancel()
		}
		return nil, fmt.Errorf("promoting %s: %w", g, err)
	}
	for _, f := range gone {
		f.f.Retire()
	}
	s.log.Info("took over", "machine", g, "drain", drain)
	return gt.bound(), nil
}

// swap is the moment of the takeover.
func (s *supervisor) swap(old, next *machine, gt *gate, forwards []forward, drain time.Duration) error {
	name := next.spec.Generation.Machine
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case next.ctx.Err() != nil:
		return ErrNotPlugged
	case s.machines[name] != old || s.beside[name] != next:
		return errMoved
	case next.phase != PhaseStandby:
		return ErrStale
	}
	next.mu.Lock()
	p := next.port
	next.mu.Unlock()
	if p != nil {
		if err := p.Promote(); err != nil {
			return err
		}
	}
	delete(s.beside, name)
	if old != nil {
		old.phase, old.gaveWay = PhaseDraining, time.Now()
		old.drainedBy = old.gaveWay.Add(drain)
		old.mu.Lock()
		old.gate = nil
		old.mu.Unlock()
		s.beside[name] = old
	}
	next.phase = PhasePresent
	next.mu.Lock()
	next.gate = gt
	next.mu.Unlock()
	s.machines[name] = next
	gt.adopt(next, forwards)
	s.update()
	return nil
}

// withdraw takes a machine out of its role's name.
func (s *supervisor) withdraw(g lab.Generation) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	m := s.machines[g.Machine]
	if m == nil || m.spec.Generation != g {
		return fmt.Errorf("withdrawing %s: %w", g, ErrNotPlugged)
	}
	m.withdrawn = true
	s.update()
	return nil
}

// reach connects with the machine that a request asks for. If another generation takes
// the name over meanwhile, it is that one.
func (s *supervisor) reach(ctx context.Context, q request, connect func(*machine) (net.Conn, error)) (net.Conn, error) {
	for {
		m, err := s.asked(ctx, q)
		if err != nil {
			return nil, err
		}
		c, err := connect(m)
		if err == nil || ctx.Err() != nil || q.Name == "" {
			return c, err
		}
		s.mu.Lock()
		now := s.machines[q.Name]
		s.mu.Unlock()
		if now == m || now == nil {
			return nil, err
		}
	}
}

// connect dials a TCP port of the guest for a connection that counts. It does so only
// if still, asked when the connection counts already, agrees; may be nil.
func (m *machine) connect(ctx context.Context, port uint16, still func() bool) (net.Conn, error) {
	return m.counted(still, func() (net.Conn, error) { return m.dial(ctx, port) })
}

// talk is openAgent for a stream that counts.
func (m *machine) talk(ctx context.Context) (net.Conn, error) {
	return m.counted(nil, func() (net.Conn, error) { return m.openAgent(ctx) })
}

// counted makes a connection that counts as the machine's until it is closed, and ends
// with the machine.
func (m *machine) counted(still func() bool, dial func() (net.Conn, error)) (net.Conn, error) {
	m.open.Add(1)
	if still != nil && !still() {
		m.open.Add(-1)
		return nil, errMoved
	}
	m.touch()
	conn, err := dial()
	if err != nil {
		m.open.Add(-1)
		return nil, err
	}
	c := &countedConn{Conn: conn, give: sync.OnceFunc(func() {
		m.touch()
		m.open.Add(-1)
	})}
	c.untie = context.AfterFunc(m.ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	return c, nil
}

// touch remembers that the machine is in use.
func (m *machine) touch() { m.active.Store(time.Now().UnixNano()) }

// phaseNow returns the machine's phase.
func (m *machine) phaseNow() Phase {
	m.s.mu.Lock()
	defer m.s.mu.Unlock()
	return m.phase
}

// countedConn is a connection with a guest or its agent.
type countedConn struct {
	net.Conn
	untie func() bool
	give  func()
}

func (c *countedConn) Close() error {
	c.untie()
	defer c.give()
	return c.Conn.Close()
}

// CloseWrite tells the guest that nothing more comes.
func (c *countedConn) CloseWrite() error {
	if h, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return h.CloseWrite()
	}
	return errors.ErrUnsupported
}
