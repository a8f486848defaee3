// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/ledger"
	"github.com/labfile/lab/internal/network"
	"github.com/labfile/lab/internal/plan"
	"github.com/labfile/lab/internal/supervise"
	"github.com/labfile/lab/providers"
)

// keep leaves a running machine as it is, besides what can be changed in place.
func (s *session) keep(ctx context.Context, g lab.Generation, m lab.Machine, step plan.Step) error {
	rec := s.machine(g.Machine)
	super, err := s.supervisor(ctx)
	if err != nil {
		return err
	}
	if err := s.recheck(ctx, g, m, rec); err != nil {
		return err
	}
	s.finishTakeOver(ctx, super, rec, m)
	bound, err := plug(ctx, super, cable(g, m, rec.Create), rec.Ports)
	if err != nil {
		return err
	}
	// A machine that was being started when lab was interrupted is not yet
	// known to be ready.
	if rec.Phase != ledger.PhaseReady {
		return s.boot(ctx, launch{Generation: g, m: m, began: time.Now()})
	}
	if err := s.tellProxies(ctx, g, rec.Create); err != nil {
		return err
	}
	if len(step.Changes) > 0 {
		err := s.record(ledger.MachineChanged, g, ledger.Changed{Spec: ledger.SpecOf(m), Ports: ports(bound)})
		if err != nil {
			return err
		}
		s.emit(Event{Machine: g.Machine, Generation: g.Number, Stage: StageChanged, Text: words(step.Changes)})
		return nil
	}
	s.emit(Event{Machine: g.Machine, Generation: g.Number, Stage: StageKept, Text: readyText(rec.Create.Address, bound)})
	return nil
}

// recheck waits until a machine that is ready passes the readiness checks that the
// Labfile has now. If it does not, it stays as it is, and so does what is recorded.
func (s *session) recheck(ctx context.Context, g lab.Generation, m lab.Machine, rec ledger.Machine) error {
	if rec.Phase != ledger.PhaseReady || slices.Equal(m.Ready, rec.Create.Spec.Machine(g.Machine).Ready) {
		return nil
	}
	target, err := s.targetOf(g, rec.Create)
	if err == nil {
		attendant, leave := s.attend(ctx, g, Attention{Expected: true})
		err = s.waitReady(ctx, attendant.watched(ctx, target), g, m.Ready)
		leave()
	}
	if err == nil || interrupted(ctx, err) {
		return err
	}
	return &MachineError{
		Machine: g.Machine, Generation: g.Number, Stage: StageCheck, Kept: true,
		Err: fmt.Errorf("it runs as before, but does not pass the Labfile's new checks: %w", err),
	}
}

// start boots a stopped machine again.
func (s *session) start(ctx context.Context, g lab.Generation, m lab.Machine, changes []string) error {
	began := time.Now()
	if rec := s.machine(g.Machine); unreachable(rec, s.observed[g.Machine]) != "" {
		if err := s.bringBack(ctx, g, rec); err != nil {
			return err
		}
	} else if rec.Phase == ledger.PhaseStopping {
		if err := s.park(ctx, g, rec); err != nil {
			return err
		}
	}
	if len(changes) > 0 {
		err := s.record(ledger.MachineChanged, g, ledger.Changed{Spec: ledger.SpecOf(m)})
		if err != nil {
			return err
		}
	}
	if err := s.noticed(ctx, g); err != nil {
		return err
	}
	if err := s.record(ledger.MachineStart, g, nil); err != nil {
		return err
	}
	return s.boot(ctx, launch{Generation: g, m: m, began: began})
}

// noticeTime is how long a supervisor may take to notice that a machine has ended.
const noticeTime = 5 * time.Second

// noticed waits until the supervisor, if there is one, has noticed and recorded the end of
// a generation that no longer runs. Otherwise it would take the next run for the one
// before, and unplug it as soon as it does notice.
func (s *session) noticed(ctx context.Context, g lab.Generation) error {
	if !slices.ContainsFunc(s.observed[g.Machine], func(m providers.Machine) bool { return m.Generation == g && m.State == providers.StateStopped }) {
		return nil
	}
	super, err := supervise.Dial(ctx, s.host.Dirs, s.id)
	if errors.Is(err, supervise.ErrNotRunning) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("starting %s: %w", g, err)
	}
	defer super.Close()
	for until := time.Now().Add(noticeTime); ; {
		st, err := super.Status(ctx)
		if err != nil {
			return fmt.Errorf("starting %s: %w", g, err)
		}
		if !slices.ContainsFunc(st.Machines, func(m supervise.MachineStatus) bool { return m.Generation == g }) {
			return nil
		}
		if time.Now().After(until) {
			return super.Unplug(ctx, g)
		}
		select {
		case <-time.After(10 * time.Millisecond):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// cable is how the machine is plugged into the lab's network.
func cable(g lab.Generation, m lab.Machine, c ledger.Create) supervise.Machine {
	return supervise.Machine{
		Generation: g, Role: m.Role, Addr: c.Address, Direct: c.Direct, Agent: c.Agent, Forwards: m.Ports,
	}
}

// plug plugs the machine in. Where any host port will do, it gets the one it had
// before, if that is still free.
func plug(ctx context.Context, super *supervise.Client, mc supervise.Machine, before []ledger.Port) ([]lab.Forward, error) {
	asked := mc.Forwards
	mc.Forwards = rebind(asked, before)
	bound, err := super.Plug(ctx, mc)
	var taken *network.PortError
	if errors.As(err, &taken) && !slices.Equal(asked, mc.Forwards) {
		mc.Forwards = asked
		bound, err = super.Plug(ctx, mc)
	}
	return bound, err
}

func ports(bound []lab.Forward) []ledger.Port {
	var ps []ledger.Port
	for _, f := range bound {
		ps = append(ps, ledger.Port{Host: f.HostPort, Guest: f.GuestPort, UDP: f.UDP})
	}
	return ps
}

func readyText(addr netip.Addr, bound []lab.Forward) string {
	text := addr.String()
	for _, f := range bound {
		text += fmt.Sprintf(", 127.0.0.1:%d -> %d%s", f.HostPort, f.GuestPort, ledger.Port{UDP: f.UDP}.Protocol())
	}
	return text
}

func words(list []string) string {
	text := ""
	for i, w := range list {
		if i > 0 {
			text += ", "
		}
		text += w
	}
	return text
}
