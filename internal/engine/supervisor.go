// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/ledger"
	"github.com/labfile/lab/internal/network"
	"github.com/labfile/lab/internal/supervise"
	"github.com/labfile/lab/providers"
)

// supervisor returns the connection to the lab's supervisor, which is started
// if there is none.
func (s *session) supervisor(ctx context.Context) (*supervise.Client, error) {
	s.superOnce.Lock()
	defer s.superOnce.Unlock()
	if s.super != nil {
		return s.super, nil
	}
	c, err := s.ensure(ctx)
	if err != nil {
		return nil, err
	}
	if err := s.addRelays(ctx, c); err != nil {
		c.Close()
		return nil, err
	}
	s.super = c
	return c, nil
}

// ensure connects to the supervisor, starting one if needed. A new one knows
// nothing: every machine that runs is plugged in again.
func (l *Lab) ensure(ctx context.Context) (*supervise.Client, error) {
	if err := l.host.Dirs.Claim(l.id); err != nil {
		return nil, err
	}
	started := false
	c, err := supervise.Ensure(ctx, l.host.Dirs, l.id, func() error {
		started = true
		return l.host.Spawn(l.id)
	})
	if err != nil {
		return nil, fmt.Errorf("starting the lab's supervisor: %w", err)
	}
	if !started {
		return c, nil
	}
	if err := l.replug(ctx, c); err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

// expose tells the supervisor, if one runs, what guests reach of this host. It does so
// whether or not that has changed since before: lab may have been killed behind the record.
func (s *session) expose(ctx context.Context, before []ledger.Exposed) error {
	c, err := supervise.Dial(ctx, s.host.Dirs, s.id)
	if errors.Is(err, supervise.ErrNotRunning) {
		return nil // it is told when it starts
	}
	if err == nil {
		defer c.Close()
		if err = exposeTo(ctx, c, s.state); err == nil {
			err = s.addRelays(ctx, c)
		}
	}
	if len(before)+len(s.state.Opened.Expose)+len(s.relays) == 0 {
		return nil // what it cannot be told makes no difference
	}
	return err
}

// exposeTo tells a supervisor which ports of this host guests reach, as recorded.
func exposeTo(ctx context.Context, c *supervise.Client, state ledger.State) error {
	if err := c.Expose(ctx, state.Opened.Exposes()); err != nil {
		return fmt.Errorf("exposing ports of this host to the lab: %w", err)
	}
	return nil
}

// replug plugs every running machine into a new supervisor.
func (l *Lab) replug(ctx context.Context, c *supervise.Client) error {
	state, err := l.read()
	if err != nil {
		return err
	}
	p, err := l.host.Provider(state.Opened)
	if err != nil {
		return err
	}
	seen, err := observe(ctx, p, l.id)
	if err != nil {
		return err
	}
	if len(state.Opened.Expose) > 0 {
		if err := exposeTo(ctx, c, state); err != nil {
			return err
		}
	}
	var errs []error
	for _, m := range state.Machines {
		if !reachable(m, seen[m.Name]) || m.Phase == ledger.PhaseDestroying {
			continue
		}
		g := lab.Generation{Lab: l.id, Machine: m.Name, Number: m.Generation}
		mc := cable(g, m.Create.Spec.Machine(m.Name), m.Create)
		if m.Phase == ledger.PhaseReady {
			mc.Mounts = shared(m.Create.Spec.Machine(m.Name), m.Create)
		}
		_, err := plug(ctx, c, mc, m.Ports)
		var taken *network.PortError
		if errors.As(err, &taken) { // the machine is plugged in all the same, and "lab up" tells
			l.host.Log.Warn("a forwarded port was taken meanwhile", "machine", m.Name, "err", err)
			continue
		}
		if err != nil && !ended(ctx, p, g) {
			errs = append(errs, fmt.Errorf("plugging %s in again: %w", m.Name, err))
		}
	}
	return errors.Join(errs...)
}

// ended reports whether a generation that ran a moment ago does not run any more.
func ended(ctx context.Context, p providers.Provider, g lab.Generation) bool {
	m, err := p.Inspect(ctx, g)
	return errors.Is(err, providers.ErrNotFound) || err == nil && m.State == providers.StateStopped
}

// rebind asks for the host ports that were picked before, so that a new
// supervisor does not move them.
func rebind(want []lab.Forward, bound []ledger.Port) []lab.Forward {
	out := make([]lab.Forward, len(want))
	for i, f := range want {
		out[i] = f
		if f.HostPort == 0 && i < len(bound) && bound[i].Guest == f.GuestPort && bound[i].UDP == f.UDP {
			out[i].HostPort = bound[i].Host
		}
	}
	return out
}

func runs(m ledger.Machine, seen []providers.Machine) bool {
	for _, g := range seen {
		if g.Number == m.Generation && (g.State == providers.StateRunning || g.State == providers.StatePaused) {
			return true
		}
	}
	return false
}

// reachable reports whether a machine runs and its sockets are there.
func reachable(m ledger.Machine, seen []providers.Machine) bool {
	return runs(m, seen) && unreachable(m, seen) == ""
}

// unreachable says why a machine that runs cannot be reached; empty if it can.
func unreachable(m ledger.Machine, seen []providers.Machine) string {
	for _, g := range seen {
		if g.Number == m.Generation {
			return g.Unreachable
		}
	}
	return ""
}

// recover brings a dead supervisor back if machines run without one. It is
// called by everything that reads, so that a lab heals at the next command.
func (l *Lab) recover(ctx context.Context, state ledger.State, seen map[lab.Name][]providers.Machine) error {
	for name, m := range state.Machines {
		if !reachable(m, seen[name]) {
			continue
		}
		c, err := l.ensure(ctx)
		if err != nil {
			return err
		}
		defer c.Close()
		return l.heal(ctx, c, state, seen)
	}
	return nil
}

// heal plugs in what runs and the supervisor does not know: whoever started it
// may have been killed before it had told everything. While a command works on the
// lab, that is the command's business.
func (l *Lab) heal(ctx context.Context, c *supervise.Client, state ledger.State, seen map[lab.Name][]providers.Machine) error {
	st, err := c.Status(ctx)
	if err != nil || l.locked() {
		return err
	}
	for name, m := range state.Machines {
		if reachable(m, seen[name]) && !slices.ContainsFunc(st.Machines, func(p supervise.MachineStatus) bool {
			return p.Generation.Machine == name
		}) {
			return l.replug(ctx, c)
		}
	}
	return nil
}
