// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/labfile/lab/internal/guest"
	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/ledger"
	"github.com/labfile/lab/internal/plan"
	"github.com/labfile/lab/internal/proxy"
	"github.com/labfile/lab/internal/supervise"
)

// proxies returns what the guests of a lab get of this host's proxy settings: nothing
// unless the Labfile says so. Machines are those that the ledger does not know yet. Known
// are the relays that guests were told of: none of their ports is used for another proxy.
//
// Errors: those of proxy.FromEnv and of Settings.Guest.
func (l *Lab) proxies(state ledger.State, machines []lab.Machine, known []proxy.Relay) (proxy.Guest, error) {
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
	for {
		g, err := s.Guest(p)
		if err != nil {
			return g, err
		}
		before := len(p.Taken)
		for _, r := range g.Relays {
			if r.Name != p.Gateway { // it keeps its port
				continue
			}
			if slices.ContainsFunc(known, func(k proxy.Relay) bool { return k.Port == r.Port && !slices.Equal(k.To, r.To) }) && !slices.Contains(p.Taken, r.Port) {
				p.Taken = append(p.Taken, r.Port)
			}
		}
		if len(p.Taken) == before {
			return g, nil
		}
	}
}

// told returns the relays that the guests of the lab were told of.
func (l *Lab) told() []proxy.Relay {
	relays, err := supervise.Relays(l.host.Dirs, l.id)
	if err != nil { // the next "up" writes them anew
		l.host.Log.Debug("reading the relays", "err", err)
	}
	return relays
}

// proxies is Lab.proxies for the guests of a session.
func (s *session) proxies() (proxy.Guest, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var known []proxy.Relay
	if !s.renumber {
		known = s.told()
	}
	state := s.state
	state.Opened.InheritProxy = s.inherits()
	return s.Lab.proxies(state, s.machines, known)
}

// inherits reports whether the guests of this session get the host's proxy settings: as
// recorded, or in a bake as its Labfile says. Called with s.mu held.
func (s *session) inherits() bool {
	if s.baking != nil {
		return s.baking.InheritProxy
	}
	return s.state.Opened.InheritProxy
}

// whole reports whether the plan is about every machine that runs.
func (s *session) whole(p plan.Plan) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for name, m := range s.state.Machines {
		if runs(m, s.observed[name]) && !slices.ContainsFunc(p.Steps, func(step plan.Step) bool { return step.Machine == name }) {
			return false
		}
	}
	return true
}

// addRelays lets guests reach the proxies that this session tells them of.
func (s *session) addRelays(ctx context.Context, c *supervise.Client) error {
	if len(s.relays) == 0 {
		return nil
	}
	if err := c.AddRelays(ctx, s.relays); err != nil {
		return fmt.Errorf("letting guests reach the proxies of this host: %w", err)
	}
	return nil
}

// endRelays ends the relays that no guest knows any more, once every guest was told of those
// of this session.
func (s *session) endRelays(ctx context.Context) error {
	s.mu.Lock()
	done := s.renumber && !s.untold && s.state.Proxied
	s.mu.Unlock()
	if !done {
		return nil
	}
	super, err := s.supervisor(ctx)
	if err == nil {
		err = super.ReplaceRelays(ctx, s.relays)
	}
	var old *supervise.OldError
	if err == nil || len(s.relays) == 0 && errors.As(err, &old) { // it has none
		return nil
	}
	return fmt.Errorf("closing the way to earlier proxies of this host: %w", err)
}

// targetOf is Lab.targetOf, and what is run there gets the proxy settings.
func (s *session) targetOf(g lab.Generation, c ledger.Create) (guest.Target, error) {
	t, err := s.Lab.targetOf(g, c)
	if err != nil {
		return t, err
	}
	s.mu.Lock()
	inherit := s.inherits()
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
	p, err := l.proxies(state, nil, l.told())
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
	if err := super.AddRelays(ctx, p.Relays); err != nil {
		return t, fmt.Errorf("letting guests reach the proxies of this host: %w", err)
	}
	return t, nil
}

// proxyTime bounds how long a guest with an agent may take to be told of proxies.
const proxyTime = time.Minute

// tellProxies writes the proxy settings into the guest, for programs outside of lab's sessions, or
// takes away what it wrote before. The machine works without them, so a failure is only told.
func (s *session) tellProxies(ctx context.Context, g lab.Generation, c ledger.Create) error {
	p, err := s.proxies()
	if err != nil {
		return err
	}
	m, _ := s.machine(g.Machine).Of(g.Number)
	if len(p.Env) == 0 && !m.Proxied {
		return nil
	}
	target, err := s.Lab.targetOf(g, c)
	if err != nil {
		return err
	}
	patience := proxyTime
	if !c.Agent { // it may have no ssh server at all
		patience = cmp.Or(s.host.Patience, loginTime)
	}
	limit, cancel := context.WithTimeoutCause(ctx, patience, fmt.Errorf("it did not let lab in within %s", patience))
	defer cancel()
	client, err := guest.ConnectRoot(limit, target)
	if err == nil {
		defer client.Close()
		if err := s.recordProxied(g, true); err != nil { // first, since lab may be killed
			return err
		}
		if err = client.SetProxy(limit, p.Env); err == nil {
			return s.recordProxied(g, len(p.Env) > 0)
		}
	}
	if ctx.Err() != nil {
		return err
	}
	text := "its services and its own logins do not get the proxy settings"
	if m.Proxied {
		text = "its services and its own logins keep the proxy settings that they have"
		s.mu.Lock()
		s.untold = true
		s.mu.Unlock()
	}
	s.emit(Event{
		Machine: g.Machine, Generation: g.Number, Stage: StageNote, Err: err,
		Text: fmt.Sprintf("%s: %v; \"lab up\" tries again", text, err),
	})
	return nil
}

// recordProxied records whether a generation has proxy settings, unless that is known.
func (s *session) recordProxied(g lab.Generation, has bool) error {
	now, _ := s.machine(g.Machine).Of(g.Number)
	if now.Proxied == has {
		return nil
	}
	return s.record(ledger.MachineProxied, g, ledger.Proxied{Written: has})
}
