// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/labfile/lab/internal/guest"
	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/ledger"
	"github.com/labfile/lab/internal/plan"
	"github.com/labfile/lab/providers"
)

// birth is a generation that this session makes, and the one whose place it takes.
type birth struct {
	lab.Generation
	instead *ledger.Machine // nil if it takes nobody's place
}

// replace puts the next generation in the place of the present one. That is shut
// down, but its disk stays until the next one is ready: an interruption loses
// nothing.
func (s *session) replace(ctx context.Context, step plan.Step, m lab.Machine, img Image, born func(birth)) error {
	next := lab.Generation{Lab: s.id, Machine: step.Machine, Number: step.Next}
	old := s.machine(step.Machine)
	keep := s.restorable(old, step)
	if err := s.removeLeftovers(ctx, step, keep); err != nil {
		return err
	}
	if !keep {
		return s.birth(ctx, next, m, img, step.Reasons, func(g lab.Generation) { born(birth{Generation: g}) })
	}
	g := lab.Generation{Lab: s.id, Machine: step.Machine, Number: old.Generation}
	if err := s.park(ctx, g, old); err != nil {
		return err
	}
	old.Ports = s.machine(step.Machine).Ports
	if err := s.birth(ctx, next, m, img, step.Reasons, func(g lab.Generation) { born(birth{g, &old}) }); err != nil {
		return err
	}
	return s.remove(ctx, g, step.Reasons)
}

// restorable reports whether the recorded generation is one to go back to: it was
// ready once, and it is whole.
func (s *session) restorable(old ledger.Machine, step plan.Step) bool {
	if old.Ready.IsZero() || old.Phase == ledger.PhaseDestroying || !slices.Contains(step.Leftovers, old.Generation) {
		return false
	}
	return slices.ContainsFunc(s.observed[step.Machine], func(m providers.Machine) bool {
		return m.Number == old.Generation && m.State != providers.StateBroken
	})
}

// removeLeftovers removes the generations that the step has no use for; with keep,
// all but the present one.
func (s *session) removeLeftovers(ctx context.Context, step plan.Step, keep bool) error {
	for _, n := range step.Leftovers {
		if keep && n == step.Generation {
			continue
		}
		if err := s.remove(ctx, lab.Generation{Lab: s.id, Machine: step.Machine, Number: n}, step.Reasons); err != nil {
			return err
		}
	}
	return nil
}

// syncTime bounds what a guest may take to write everything to its disk before it
// is shut down by force.
const syncTime = 5 * time.Second

// park shuts a generation down at once, with its disk written.
func (s *session) park(ctx context.Context, g lab.Generation, m ledger.Machine) error {
	if !runs(m, s.observed[g.Machine]) {
		return nil
	}
	if err := s.record(ledger.MachineStop, g, nil); err != nil {
		return err
	}
	s.emit(Event{Machine: g.Machine, Generation: g.Number, Stage: StageStop, Text: "stopping " + g.String()})
	if m.Create.Agent {
		s.sync(ctx, m)
	}
	if err := s.unplug(ctx, g); err != nil {
		return err
	}
	if err := s.provider.Stop(ctx, g, 0); err != nil {
		return fmt.Errorf("stopping %s: %w", g, err)
	}
	return s.record(ledger.MachineStopped, g, nil)
}

// sync asks the agent to write everything to the disk. A guest that does not
// answer loses what it has not written.
func (s *session) sync(ctx context.Context, m ledger.Machine) {
	ctx, cancel := context.WithTimeout(ctx, syncTime)
	defer cancel()
	target, err := s.target(m.Name, m.Create, "")
	if err != nil {
		return
	}
	conn, err := target.Agent(ctx)
	if err == nil {
		defer conn.Close()
		err = guest.Sync(ctx, conn)
	}
	if err != nil {
		s.host.Log.Debug("asking the agent to sync", "machine", m.Name, "err", err)
	}
}

// undo destroys what this session gave birth to, and puts back what it took the
// place of.
func (s *session) undo(ctx context.Context, born []birth, why string) error {
	ctx, cancel := cleanup(ctx)
	defer cancel()
	var errs []error
	for _, b := range born {
		if err := s.remove(ctx, b.Generation, []string{why}); err != nil {
			errs = append(errs, fmt.Errorf("undoing %s: %w", b.Generation, err))
			continue
		}
		text := why + ", destroyed again"
		if b.instead != nil {
			if err := s.restore(*b.instead); err != nil {
				errs = append(errs, fmt.Errorf("going back to generation %d of %s: %w", b.instead.Generation, b.Machine, err))
				continue
			}
			text += fmt.Sprintf("; generation %d is kept, stopped", b.instead.Generation)
		}
		s.emit(Event{Machine: b.Machine, Generation: b.Number, Stage: StageUndone, Text: text})
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	return s.closeIfEmpty(ctx)
}

// restore records that a generation that was to be replaced is the present one
// again.
func (s *session) restore(old ledger.Machine) error {
	g := lab.Generation{Lab: s.id, Machine: old.Name, Number: old.Generation}
	return s.record(ledger.MachineRestored, g, ledger.Restored{
		Create: old.Create, Born: old.Born, Ready: old.Ready, Ports: old.Ports,
	})
}
