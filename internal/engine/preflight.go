// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/labfile/lab/internal/guest"
	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/ledger"
	"github.com/labfile/lab/internal/network"
	"github.com/labfile/lab/internal/plan"
	"github.com/labfile/lab/internal/supervise"
	"github.com/labfile/lab/internal/volume"
	"github.com/labfile/lab/providers"
)

// preflight finds out, before anything is changed, whatever would refuse a birth or a
// start of the plan: a machine is not stopped for one that cannot be born. Whatever a
// birth checks by itself, and what can be known without it, is checked here, too. All
// that is wrong is in the error.
func (s *session) preflight(ctx context.Context, want *lab.Lab, p plan.Plan, images map[lab.Name]Image) error {
	unfit := fits(want, images)
	errs := []error{unfit, s.storable(want)}
	own := sync.OnceValue(func() map[ledger.Port]bool { return s.ownPorts(ctx) })
	for _, step := range p.Steps {
		m, ok := want.Machine(step.Machine)
		if !ok || step.Action == plan.Destroy {
			continue
		}
		refuse := func(err error) {
			if err != nil {
				errs = append(errs, fmt.Errorf("machine %q: %w", m.Name, err))
			}
		}
		if unfit == nil && (step.Action == plan.Create || step.Action == plan.Replace) {
			refuse(s.bearable(ctx, want, step, m, images[m.Name]))
		}
		refuse(s.addressable(m, p))
		if step.Action != plan.Keep || len(step.Changes) > 0 {
			for _, f := range m.Ports {
				if f.HostPort != 0 {
					refuse(forwardable(ctx, f, own()))
				}
			}
		}
		if step.Action != plan.Keep {
			for _, v := range m.Volumes {
				refuse(s.attachable(ctx, m, v, p))
			}
		}
	}
	errs = append(errs, s.affordable(ctx, want, p), s.roomy(ctx, p))
	return errors.Join(errs...)
}

// bearable says what the provider, or cloud-init, would refuse of a machine that is to be
// born.
func (s *session) bearable(ctx context.Context, want *lab.Lab, step plan.Step, m lab.Machine, img Image) error {
	if err := guest.CheckUserData(m.UserData); err != nil {
		return err
	}
	if err := s.runnable(want, m); err != nil {
		return err
	}
	c, ok := s.provider.(providers.SpecChecker)
	if !ok {
		return nil
	}
	return c.CheckSpec(ctx, providers.Spec{
		Generation: lab.Generation{Lab: s.id, Machine: m.Name, Number: step.Next},
		Image:      img.Image, CPUs: m.CPUs, Memory: m.Memory, Disk: m.Disk, Agent: img.Agent,
		Append: early(img, m), Network: m.Network,
	})
}

// addressable says why a machine cannot have the address that the Labfile gives it.
func (s *session) addressable(m lab.Machine, p plan.Plan) error {
	if m.Address == 0 {
		return nil
	}
	addr := lab.NetworkOf(s.id).Host(byte(m.Address))
	if now := s.machine(m.Name); now.Phase != "" && now.Phase != ledger.PhaseGone && now.Create.Address != addr {
		return fmt.Errorf("it has the address %s for as long as it lives; \"lab destroy %s\" ends it, and the next one has %s", now.Create.Address, m.Name, addr)
	}
	for name, other := range s.state.Machines {
		if name == m.Name || other.Phase == ledger.PhaseGone || other.Create.Address != addr {
			continue
		}
		if !slices.ContainsFunc(p.Steps, func(step plan.Step) bool { return step.Machine == name && step.Action == plan.Destroy }) {
			return fmt.Errorf("the address %s is that of %s; choose another one, or end that machine: \"lab destroy %s\"", addr, name, name)
		}
	}
	return nil
}

// forwardable returns a *network.PortError if a host port is neither free nor among those
// that the lab has.
func forwardable(ctx context.Context, f lab.Forward, own map[ledger.Port]bool) error {
	if own[ledger.Port{Host: f.HostPort, UDP: f.UDP}] {
		return nil
	}
	return network.Free(ctx, f.HostPort, f.UDP)
}

// ownPorts returns the host ports that the lab has, with no guest ports: its supervisor
// hands them on from one generation to the next. The supervisor listens before a machine
// is ready, which is when the ledger hears of its ports, so the supervisor is asked. What
// is recorded counts for machines whose supervisor does not answer, or may be one that
// cannot be found any more.
func (s *session) ownPorts(ctx context.Context) map[ledger.Port]bool {
	own := map[ledger.Port]bool{}
	st, err := s.plugged(ctx)
	for _, m := range st.Machines {
		for _, f := range m.Forwards {
			own[ledger.Port{Host: f.HostPort, UDP: f.UDP}] = true
		}
	}
	for name, m := range s.state.Machines {
		if !runs(m, s.observed[name]) || err == nil && unreachable(m, s.observed[name]) == "" {
			continue
		}
		for _, p := range m.Ports {
			own[ledger.Port{Host: p.Host, UDP: p.UDP}] = true
		}
		for _, f := range m.Create.Spec.Machine(name).Ports {
			own[ledger.Port{Host: f.HostPort, UDP: f.UDP}] = true
		}
	}
	return own
}

// plugged returns what the lab's supervisor says of its machines.
func (s *session) plugged(ctx context.Context) (supervise.Status, error) {
	c, err := supervise.Dial(ctx, s.host.Dirs, s.id)
	if err != nil {
		return supervise.Status{}, err
	}
	defer c.Close()
	return c.Status(ctx)
}

// attachable returns a *VolumeInUseError if another machine writes to a volume, and goes
// on doing so.
func (s *session) attachable(ctx context.Context, m lab.Machine, want lab.Volume, p plan.Plan) error {
	if want.ReadOnly {
		return nil
	}
	v, err := s.volumes().Get(want.Name)
	if errors.Is(err, volume.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	users, err := s.users(ctx, v)
	if err != nil {
		return err
	}
	for _, u := range users {
		if u.disk.ReadOnly || u.generation.Machine == m.Name || ends(p, u.generation.Machine) {
			continue
		}
		return &VolumeInUseError{Volume: v.Name, By: u.generation}
	}
	return nil
}

// ends reports whether the present generation of a machine ends with the plan.
func ends(p plan.Plan, name lab.Name) bool {
	for _, step := range p.Steps {
		if step.Machine == name {
			return step.Action == plan.Destroy || step.Action == plan.Replace
		}
	}
	return false
}

// preflightRecorded is preflight for machines that are to be born as it was recorded:
// nothing is asked of those that the plan leaves alone.
func (s *session) preflightRecorded(ctx context.Context, want *lab.Lab, p plan.Plan, images map[lab.Name]Image) error {
	some := *want
	some.Machines = nil
	for _, m := range want.Machines {
		if slices.ContainsFunc(p.Steps, func(step plan.Step) bool { return step.Machine == m.Name }) {
			some.Machines = append(some.Machines, m)
		}
	}
	return s.preflight(ctx, &some, p, images)
}
