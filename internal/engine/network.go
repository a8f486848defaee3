// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/ledger"
	"github.com/labfile/lab/internal/plan"
	"github.com/labfile/lab/providers"
)

// networked decides what connects the machines where the Labfile leaves that open, and
// checks before anything is changed what can be known of what it asks for. What it
// returns is want with every machine's network settled.
func (s *session) networked(ctx context.Context, want *lab.Lab, images map[lab.Name]Image) (*lab.Lab, error) {
	if !slices.ContainsFunc(want.Machines, func(m lab.Machine) bool { return m.Network != lab.NetworkSwitch }) {
		return want, nil
	}
	none := fmt.Errorf("%w: %s has the lab's own switch only", providers.ErrNoNetworks, s.where())
	if n, ok := s.provider.(providers.Networker); ok {
		if none = n.Networks(ctx); none != nil && !errors.Is(none, providers.ErrNoNetworks) {
			return nil, none
		}
	}
	settled := *want
	settled.Machines = slices.Clone(want.Machines)
	s.auto = map[lab.Name]bool{}
	var errs []error
	for i := range settled.Machines {
		m := &settled.Machines[i]
		agent := images[m.Name].Agent
		switch {
		case m.Network == lab.NetworkAuto:
			s.auto[m.Name] = true
			m.Network = s.best(m.Name, agent, none == nil)
		case m.Network != lab.NetworkSwitch && none != nil:
			return nil, fmt.Errorf("network: %s: %w", m.Network, none)
		case m.Network != lab.NetworkSwitch && !agent:
			errs = append(errs, fmt.Errorf("machine %q: network: %s needs a box with lab-agent, which gives the guest its second address; box %s has none", m.Name, m.Network, m.Box))
		}
	}
	return &settled, errors.Join(errs...)
}

// best settles the network of a machine that may have any: what it has, since nothing shall be
// replaced because its host has become able or unable, or else the best that there is.
func (s *session) best(name lab.Name, agent, able bool) lab.NetworkKind {
	if !agent {
		return lab.NetworkSwitch
	}
	if m := s.machine(name); m.Generation != 0 && m.Phase != ledger.PhaseGone && m.Create.Spec.Network != lab.NetworkNAT {
		return m.Create.Spec.Network
	}
	if able {
		return lab.NetworkIsolated
	}
	return lab.NetworkSwitch
}

// connect makes the networks that the plan's new generations are born into: a host that
// cannot make one says so once, before there are any. Those whose Labfile leaves open what
// connects them have the switch then. want is what networked returned.
func (s *session) connect(ctx context.Context, want *lab.Lab, p plan.Plan) error {
	tried := map[lab.NetworkKind]error{lab.NetworkSwitch: nil}
	for _, step := range p.Steps {
		i := slices.IndexFunc(want.Machines, func(m lab.Machine) bool { return m.Name == step.Machine })
		if i < 0 || step.Action != plan.Create && step.Action != plan.Replace {
			continue
		}
		m := &want.Machines[i]
		err, ok := tried[m.Network]
		if !ok {
			_, err = s.network(ctx, m.Network)
			tried[m.Network] = err
		}
		switch {
		case err == nil:
		case ctx.Err() != nil || !s.auto[m.Name]:
			return &networkError{err}
		default:
			s.emit(Event{Machine: m.Name, Stage: StageCreate, Text: "at the lab's switch only: " + err.Error()})
			m.Network = lab.NetworkSwitch
		}
	}
	return nil
}

// networkError says that a host makes no network although it seemed that it could.
type networkError struct{ err error }

func (e *networkError) Error() string { return e.err.Error() }

func (e *networkError) Unwrap() error { return e.err }

// Hint is the next step.
func (*networkError) Hint() string {
	return "\"lab doctor\" checks what that host lacks; \"network: switch\" in the Labfile does without"
}

// network makes the lab's network of the kind, if need be.
func (s *session) network(ctx context.Context, kind lab.NetworkKind) (lab.Network, error) {
	n, ok := s.provider.(providers.Networker)
	if !ok {
		return lab.Network{}, fmt.Errorf("%w: %s has the lab's own switch only", providers.ErrNoNetworks, s.where())
	}
	return n.Network(ctx, s.id, kind)
}

// direct returns one of the addresses that a machine can have in the network of that kind,
// which is made if need be; it is not valid for a machine that is at the switch only.
// address is the one there.
func (s *session) direct(ctx context.Context, kind lab.NetworkKind, address netip.Addr, slot int) (netip.Prefix, error) {
	if kind == lab.NetworkSwitch {
		return netip.Prefix{}, nil
	}
	n, err := s.network(ctx, kind)
	if err != nil {
		return netip.Prefix{}, err
	}
	return netip.PrefixFrom(n.Direct(address, slot), n.Subnet.Bits()), nil
}

// slot chooses which of its addresses in a network a machine's next generation has: the
// present one's, so that whoever looked that up need not do so again, unless the two are
// to run beside each other.
func slot(m ledger.Machine, beside bool) int {
	of := func(m ledger.Machine) int {
		if !m.Create.Direct.IsValid() {
			return 0
		}
		return lab.DirectSlot(m.Create.Direct.Addr())
	}
	if present := of(m); present != 0 && !beside {
		return present
	}
	taken := map[int]bool{of(m): true}
	others := m.Past
	if m.Standby != nil {
		others = append(slices.Clone(others), *m.Standby)
	}
	for _, other := range others {
		if !other.Retired { // what is retired does not run again
			taken[of(other)] = true
		}
	}
	for n := 1; n <= lab.DirectSlots; n++ {
		if !taken[n] {
			return n
		}
	}
	return lab.DirectSlots // no machine has as many generations at once
}

// removeNetworks removes the networks of a lab that has no machines any more. A daemon that
// does not say whether it has any is nobody's trouble unless some machine was in one.
func (s *session) removeNetworks(ctx context.Context) error {
	n, ok := s.provider.(providers.Networker)
	if !ok {
		return nil
	}
	err := n.RemoveNetworks(ctx, s.id)
	if err == nil || ctx.Err() != nil {
		return err
	}
	for _, m := range s.state.Machines {
		if m.Create.Direct.IsValid() {
			return err
		}
	}
	s.host.Log.Debug("removing networks", "lab", s.id, "error", err)
	return nil
}
