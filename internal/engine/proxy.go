// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"cmp"
	"context"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/labfile/lab/internal/guest"
	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/ledger"
	"github.com/labfile/lab/internal/proxy"
	"github.com/labfile/lab/internal/supervise"
)

// proxies returns what the guests of a lab get of this host's proxy settings: nothing
// unless the Labfile says so. Machines are those that the ledger does not know yet.
//
// Errors: those of proxy.FromEnv and of Settings.Guest.
func (l *Lab) proxies(state ledger.State, machines []lab.Machine) (proxy.Guest, error) {
	if !state.Opened.InheritProxy || l.host.Getenv == nil {
		return proxy.Guest{}, nil
	}
	s, err := proxy.FromEnv(l.host.Getenv)
	if err != nil {
		return proxy.Guest{}, err
	}
	network := lab.NetworkOf(l.id)
	p := proxy.Lab{
		Gateway: lab.GatewayName + "." + lab.Domain, Domain: lab.Domain,
		Networks: []netip.Prefix{network.Subnet}, Taken: []uint16{lab.DNSPort},
	}
	name := func(n string) {
		if n != "" && !slices.Contains(p.Names, n) {
			p.Names = append(p.Names, n)
		}
	}
	for _, m := range machines {
		name(string(m.Name))
		name(m.Role)
	}
	for n, m := range state.Machines {
		if m.Phase == ledger.PhaseGone {
			continue
		}
		name(string(n))
		name(m.Create.Spec.Role)
		if d := m.Create.Direct; d.IsValid() && !slices.Contains(p.Networks, d.Masked()) {
			p.Networks = append(p.Networks, d.Masked())
		}
	}
	for _, e := range state.Opened.Expose {
		name(e.Name)
		p.Taken = append(p.Taken, e.Port)
	}
	return s.Guest(p)
}

// proxies is Lab.proxies for the guests of a session.
func (s *session) proxies() (proxy.Guest, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.Lab.proxies(s.state, s.machines)
}

// targetOf is Lab.targetOf, and what is run there gets the proxy settings.
func (s *session) targetOf(g lab.Generation, c ledger.Create, login string) (guest.Target, error) {
	t, err := s.Lab.targetOf(g, c, login)
	if err != nil {
		return t, err
	}
	s.mu.Lock()
	inherit := s.state.Opened.InheritProxy
	s.mu.Unlock()
	if p, err := s.proxies(); err == nil && inherit { // what needs them has looked before: see open
		t.Env, t.Unset = p.Env, proxy.Variables()
	}
	return t, nil
}

// enterable is Lab.target for a session that somebody opens: the proxies that this host has
// now are reached from the lab, and what is run in the session is told of them. Others that
// the guests were told of stay.
func (l *Lab) enterable(ctx context.Context, name lab.Name, c ledger.Create, login string) (guest.Target, error) {
	t, err := l.target(name, c, login)
	if err != nil {
		return t, err
	}
	state, err := l.read()
	if err != nil {
		return t, err
	}
	p, err := l.proxies(state, nil)
	if err != nil || !state.Opened.InheritProxy {
		return t, err
	}
	t.Env, t.Unset = p.Env, proxy.Variables()
	if len(p.Relays) == 0 {
		return t, nil
	}
	super, err := l.ensure(ctx)
	if err != nil {
		return t, err
	}
	defer super.Close()
	if err := super.Relay(ctx, p.Relays); err != nil {
		return t, fmt.Errorf("letting guests reach the proxies of this host: %w", err)
	}
	return t, nil
}

// exposeTo tells a supervisor what guests reach of this host: ports, as recorded, and
// proxies.
func (l *Lab) exposeTo(ctx context.Context, c *supervise.Client, state ledger.State) error {
	p, err := l.proxies(state, nil)
	if err != nil { // who needs them says so
		l.host.Log.Debug("reading the proxy settings", "err", err)
	}
	if err := c.Expose(ctx, state.Opened.Exposes(), p.Relays); err != nil {
		return fmt.Errorf("exposing ports of this host to the lab: %w", err)
	}
	return nil
}

// proxyTime bounds how long a guest with an agent may take to be told of proxies.
const proxyTime = time.Minute

// tellProxies writes the proxy settings into the guest, for what is no session of lab's, or takes
// away what it wrote before. The machine is as good without: what goes wrong is said, no more.
func (s *session) tellProxies(ctx context.Context, g lab.Generation, c ledger.Create) error {
	s.mu.Lock()
	ever := s.state.Proxied
	s.mu.Unlock()
	if !ever {
		return nil
	}
	target, err := s.targetOf(g, c, "")
	if err != nil {
		return err
	}
	env := target.Env
	target.Env, target.Unset = nil, nil
	patience := proxyTime
	if !c.Agent { // it may have no ssh server at all
		patience = cmp.Or(s.host.Patience, loginTime)
	}
	limit, cancel := context.WithTimeoutCause(ctx, patience, fmt.Errorf("nobody let lab in within %s", patience))
	defer cancel()
	client, err := guest.ConnectRoot(limit, target)
	if err == nil {
		defer client.Close()
		err = client.SetProxy(limit, env)
	}
	if err != nil && ctx.Err() == nil {
		s.emit(Event{
			Machine: g.Machine, Generation: g.Number, Stage: StageNote, Err: err,
			Text: fmt.Sprintf("its services and its own logins do not get the proxy settings: %v", err),
		})
		return nil
	}
	return err
}
