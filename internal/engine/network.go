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
	var errs []error
	for i := range settled.Machines {
		m := &settled.Machines[i]
		agent := images[m.Name].Agent
		switch {
		case m.Network == lab.NetworkAuto && none == nil && agent:
			m.Network = lab.NetworkIsolated
		case m.Network == lab.NetworkAuto:
			m.Network = lab.NetworkSwitch
		case m.Network != lab.NetworkSwitch && none != nil:
			return nil, fmt.Errorf("network: %s: %w", m.Network, none)
		case m.Network != lab.NetworkSwitch && !agent:
			errs = append(errs, fmt.Errorf("machine %q: network: %s needs a box with lab-agent, which gives the guest its second address; box %s has none", m.Name, m.Network, m.Box))
		}
	}
	return &settled, errors.Join(errs...)
}

// connect makes the networks that the plan's new generations are born into: a host that
// cannot make one says so once, before there are any.
func (s *session) connect(ctx context.Context, want *lab.Lab, p plan.Plan) error {
	made := map[lab.NetworkKind]bool{lab.NetworkSwitch: true}
	for _, step := range p.Steps {
		m, ok := want.Machine(step.Machine)
		if !ok || made[m.Network] || step.Action != plan.Create && step.Action != plan.Replace {
			continue
		}
		made[m.Network] = true
		if _, err := s.network(ctx, m.Network); err != nil {
			return &networkError{err}
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

// removeNetworks removes the networks of a lab that has no machines any more.
func (s *session) removeNetworks(ctx context.Context) error {
	if n, ok := s.provider.(providers.Networker); ok {
		return n.RemoveNetworks(ctx, s.id)
	}
	return nil
}
