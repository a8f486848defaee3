// SPDX-License-Identifier: Apache-2.0

package supervise

import (
	"context"
	"errors"
	"net"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/network"
)

// gate is the ports of the host that lead to a machine. It passes from a generation to
// the next one with its listeners open: only where new connections go changes.
type gate struct {
	s      *supervisor
	ctx    context.Context // ends with the last machine that has it
	cancel context.CancelFunc

	converge sync.Mutex // one change at a time
	mu       sync.Mutex // of what is below; never held while waiting
	forwards []forward
}

// forward is a port of the host that leads to a machine.
type forward struct {
	want lab.Forward // as asked for: the host port may be 0
	f    *network.Forward
	to   *atomic.Pointer[route]
}

// route is where a forward's new connections go.
type route struct {
	m    *machine
	port uint16
}

func newGate(s *supervisor) *gate {
	g := &gate{s: s}
	g.ctx, g.cancel = context.WithCancel(s.ctx)
	return g
}

// gateNow returns the machine's gate: nil unless it is present.
func (m *machine) gateNow() *gate {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.gate
}

// prepare listens on what is wanted for m and not listened on yet. It returns the
// forwards that there shall be, those among them that are new, and those of today that
// are not wanted any more. Nothing changes for those that stay. If some cannot be had
// they are left out, and err says which. Called with g.converge held.
func (g *gate) prepare(m *machine, want []lab.Forward) (next, fresh, gone []forward, err error) {
	g.mu.Lock()
	old := slices.Clone(g.forwards)
	g.mu.Unlock()
	next = make([]forward, len(want))
	keep := func(i int, fits func(forward) bool) {
		if j := slices.IndexFunc(old, fits); j >= 0 && next[i].f == nil {
			next[i].f, next[i].to = old[j].f, old[j].to
			old = slices.Delete(old, j, j+1)
		}
	}
	for i, w := range want { // those that name a host port first: nothing else will do for them
		next[i].want = w
		if w.HostPort != 0 {
			keep(i, func(f forward) bool { return f.f.HostPort() == w.HostPort && f.want.UDP == w.UDP })
		}
	}
	for i, w := range want {
		if w.HostPort == 0 {
			keep(i, func(f forward) bool { return f.want.GuestPort == w.GuestPort && f.want.UDP == w.UDP })
		}
	}
	var errs []error
	for i, f := range next {
		if f.f != nil || g.ctx.Err() != nil {
			continue
		}
		to := new(atomic.Pointer[route])
		to.Store(&route{m, f.want.GuestPort})
		listen, carry := network.Listen, follow
		if f.want.UDP {
			listen, carry = network.ListenUDP, followUDP
		}
		l, err := listen(g.ctx, f.want.HostPort, func(ctx context.Context) (net.Conn, error) { return carry(ctx, to) })
		if err != nil {
			errs = append(errs, err)
			continue
		}
		next[i].f, next[i].to = l, to
		fresh = append(fresh, next[i])
	}
	next = slices.DeleteFunc(next, func(f forward) bool { return f.f == nil })
	return next, fresh, old, errors.Join(errs...)
}

// adopt makes the forwards lead to m.
func (g *gate) adopt(m *machine, next []forward) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, f := range next {
		before := f.to.Swap(&route{m, f.want.GuestPort})
		if before.m != m || before.port != f.want.GuestPort {
			f.f.Renew()
		}
	}
	g.forwards = next
}

// bound returns the forwards with the host ports that are listened on.
func (g *gate) bound() []lab.Forward {
	g.mu.Lock()
	defer g.mu.Unlock()
	bound := make([]lab.Forward, len(g.forwards))
	for i, f := range g.forwards {
		bound[i] = lab.Forward{HostPort: f.f.HostPort(), GuestPort: f.want.GuestPort, UDP: f.want.UDP}
	}
	return bound
}

// stop ends the forwards of m for good. It reports false if they are no longer m's.
func (g *gate) stop(m *machine) bool {
	g.converge.Lock()
	defer g.converge.Unlock()
	if m.gateNow() != g {
		return false
	}
	g.cancel()
	g.mu.Lock()
	forwards := g.forwards
	g.forwards = nil
	g.mu.Unlock()
	for _, f := range forwards {
		f.f.Stop()
	}
	return true
}

// followUDP is follow for a flow of packets: a takeover ends it.
func followUDP(ctx context.Context, to *atomic.Pointer[route]) (net.Conn, error) {
	r := to.Load()
	return r.m.dialUDP(ctx, r.port)
}

// follow connects to where a forward leads. A takeover meanwhile is not the client's
// misfortune: it is connected with the successor.
func follow(ctx context.Context, to *atomic.Pointer[route]) (net.Conn, error) {
	for {
		r := to.Load()
		c, err := r.m.connect(ctx, r.port, func() bool { return to.Load() == r })
		if err == nil || ctx.Err() != nil || to.Load() == r {
			return c, err
		}
	}
}
