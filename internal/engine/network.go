// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"errors"
	"fmt"
	"net/netip"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/providers"
)

// networked checks before anything is changed what can be known of a network besides the
// lab's switch.
func (s *session) networked(want *lab.Lab, images map[lab.Name]Image) error {
	if want.Network == lab.NetworkSwitch {
		return nil
	}
	n, ok := s.provider.(providers.Networker)
	if !ok {
		return fmt.Errorf("network: %s: %w: %s has the lab's own switch only", want.Network, providers.ErrIncapable, s.where())
	}
	if err := n.Networks(); err != nil {
		return fmt.Errorf("network: %s: %w", want.Network, err)
	}
	var errs []error
	for _, m := range want.Machines {
		if img, ok := images[m.Name]; ok && !img.Agent {
			errs = append(errs, fmt.Errorf("machine %q: network: %s needs a box with lab-agent, which gives the guest its second address; box %s has none", m.Name, want.Network, m.Box))
		}
	}
	return errors.Join(errs...)
}

// direct returns the address that a generation has in the network of that kind, which is
// made if need be; it is not valid for a machine that is at the switch only.
func (s *session) direct(ctx context.Context, g lab.Generation, kind lab.NetworkKind, address netip.Addr) (netip.Prefix, error) {
	if kind == lab.NetworkSwitch {
		return netip.Prefix{}, nil
	}
	p, ok := s.provider.(providers.Networker)
	if !ok {
		return netip.Prefix{}, fmt.Errorf("%w: %s has the lab's own switch only", providers.ErrIncapable, s.where())
	}
	n, err := p.Network(ctx, s.id, kind)
	if err != nil {
		return netip.Prefix{}, err
	}
	return netip.PrefixFrom(n.Direct(address, g.Number), n.Subnet.Bits()), nil
}

// removeNetworks removes the networks of a lab that has no machines any more.
func (s *session) removeNetworks(ctx context.Context) error {
	if n, ok := s.provider.(providers.Networker); ok {
		return n.RemoveNetworks(ctx, s.id)
	}
	return nil
}
