// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/labfile/lab/internal/guest"
	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/ledger"
	"github.com/labfile/lab/internal/plan"
	"github.com/labfile/lab/internal/supervise"
	"github.com/labfile/lab/providers"
)

// birth is a generation that this session makes, and the one whose place it takes.
type birth struct {
	lab.Generation
	instead *ledger.Machine // nil if it takes nobody's place
	beside  bool            // instead runs on until this one takes over
}

// replace puts the next generation in the place of the present one, which is
// retired once the next one is ready: neither an interruption nor a failure loses
// anything.
func (s *session) replace(ctx context.Context, step plan.Step, m lab.Machine, img Image, born func(birth)) error {
	next := lab.Generation{Lab: s.id, Machine: step.Machine, Number: step.Next}
	old := s.machine(step.Machine)
	keep := s.restorable(old)
	if keep {
		if err := s.serve(ctx, old); err != nil {
			return err
		}
	}
	for _, n := range step.Leftovers {
		if p, _ := old.Of(n); n == step.Generation && keep || p.Retired && p.Phase == ledger.PhaseRetired {
			continue // until the next one is ready
		}
		if err := s.remove(ctx, lab.Generation{Lab: s.id, Machine: step.Machine, Number: n}, step.Reasons); err != nil {
			return err
		}
	}
	if err := s.retireLeftovers(ctx, step, m); err != nil {
		return err
	}
	old = s.machine(step.Machine)
	l := launch{Generation: next, m: m, newborn: true}
	switch {
	case !keep:
		return s.birth(ctx, l, img, step.Reasons, func() { born(birth{Generation: next}) })
	case step.Strategy == lab.BlueGreen || step.Strategy == lab.Rolling:
		l.beside = true
		if err := s.handOver(ctx, l, img, step.Reasons, old, born); err != nil {
			return err
		}
	default:
		if err := s.stopFirst(ctx, l, img, step.Reasons, old, born); err != nil {
			return err
		}
	}
	ctx, cancel := cleanup(ctx) // the next one has taken over: there is no way back
	defer cancel()
	if err := s.retire(ctx, old, m.Replace.Keep, step.Reasons); err != nil {
		return err
	}
	return s.prune(ctx, next, m.Replace.Keep)
}

// restorable reports whether the recorded generation is one to go back to: it was
// ready once, and it is whole.
func (s *session) restorable(old ledger.Machine) bool {
	if old.Ready.IsZero() || old.Phase == ledger.PhaseDestroying || old.Phase == ledger.PhaseGone {
		return false
	}
	return slices.ContainsFunc(s.observed[old.Name], func(m providers.Machine) bool {
		return m.Number == old.Generation && m.State != providers.StateBroken
	})
}

// retireLeftovers finishes earlier replacements, of which lab was killed before it had
// retired what gave way.
func (s *session) retireLeftovers(ctx context.Context, step plan.Step, m lab.Machine) error {
	for _, n := range step.Retire {
		if old, ok := s.machine(step.Machine).Of(n); ok {
			if err := s.retire(ctx, old, m.Replace.Keep, step.Reasons); err != nil {
				return err
			}
		}
	}
	return nil
}

// endLeftovers retires what gave way, and removes the generations that the step has no
// use for.
func (s *session) endLeftovers(ctx context.Context, step plan.Step, m lab.Machine) error {
	if err := s.retireLeftovers(ctx, step, m); err != nil {
		return err
	}
	for _, n := range step.Leftovers {
		if err := s.remove(ctx, lab.Generation{Lab: s.id, Machine: step.Machine, Number: n}, step.Reasons); err != nil {
			return err
		}
	}
	return nil
}

// stopFirst shuts the present generation down and then gives birth to the next one.
// If that fails, the present one is started again.
func (s *session) stopFirst(ctx context.Context, l launch, img Image, why []string, old ledger.Machine, born func(birth)) error {
	g := s.generation(old)
	ran := runs(old, s.observed[old.Name])
	if _, err := s.supervisor(ctx); err != nil { // the next one needs it
		return &MachineError{Machine: g.Machine, Instead: g.Number, Stage: StageBoot, Err: err}
	}
	if l.m.Role != string(l.Machine) && ran { // no more is asked of it by its role's name
		if err := s.withdraw(ctx, g); err != nil {
			return err
		}
	}
	if err := s.park(ctx, g, old); err != nil {
		return s.unparked(ctx, g, old, err)
	}
	old.Ports = s.machine(l.Machine).Ports
	err := s.birth(ctx, l, img, why, func() { born(birth{Generation: l.Generation, instead: &old}) })
	var failed *MachineError
	if !errors.As(err, &failed) || errors.Is(err, providers.ErrIncapable) {
		return err // if it is an error, undo knows what to do
	}
	// First, so that whatever ends this command, or fills the disk, the old one counts.
	if err := s.restore(old); err != nil {
		failed.Err = fmt.Errorf("%w; going back to generation %d: %w; the next command does", failed.Err, g.Number, err)
		return failed
	}
	failed.Instead = old.Generation
	if err := s.lay(ctx, l, failed); err != nil {
		failed.Err, failed.Down = fmt.Errorf("%w; %w", failed.Err, err), true
		return failed
	}
	if err := s.keepFailed(l, failed); err != nil {
		failed.Err = fmt.Errorf("%w; %w", failed.Err, err)
	}
	if !ran {
		return failed
	}
	s.emit(Event{Machine: g.Machine, Generation: g.Number, Stage: StageBoot, Text: fmt.Sprintf("%s failed; starting %s again", l.Generation, g)})
	if err := s.start(ctx, g, old.Create.Spec.Machine(old.Name), nil); err != nil {
		failed.Err = fmt.Errorf("%w; and generation %d, which it was to replace, did not start again: %w", failed.Err, g.Number, err)
		failed.Down = true
	}
	return failed
}

// lay ends a generation that never became ready: it is stopped and, unless the
// Labfile wants to keep such, removed.
func (s *session) lay(ctx context.Context, l launch, failed *MachineError) error {
	ctx, cancel := cleanup(ctx)
	defer cancel()
	failed.Enterable = false
	if l.m.Replace.OnFailure == lab.DiscardFailed || !failed.Kept {
		failed.Kept = false
		return s.remove(ctx, l.Generation, []string{"it never became ready"})
	}
	if m, ok := s.machine(l.Machine).Of(l.Number); ok && m.Create.Agent {
		s.syncAttended(ctx, m)
	}
	if _, err := s.letGo(ctx, l.Generation); err != nil {
		return err
	}
	if err := s.unplug(ctx, l.Generation); err != nil {
		return err
	}
	if err := s.provider.Stop(ctx, l.Generation, 0); err != nil {
		return fmt.Errorf("stopping %s: %w", l.Generation, err)
	}
	return nil
}

// keepFailed records that a generation that failed is kept on purpose, if it is.
func (s *session) keepFailed(l launch, failed *MachineError) error {
	if !failed.Kept {
		return nil
	}
	return s.record(ledger.MachineRetired, l.Generation, ledger.Retired{Failed: true})
}

// retire stops a generation that gave way and keeps it; or removes it, if none are
// kept.
func (s *session) retire(ctx context.Context, old ledger.Machine, keep int, why []string) error {
	g := s.generation(old)
	if keep < 1 {
		return s.remove(ctx, g, why)
	}
	if now, _ := s.machine(old.Name).Of(old.Generation); now.Phase != ledger.PhaseStopped {
		if err := s.park(ctx, g, old); err != nil {
			return err
		}
	}
	if err := s.record(ledger.MachineRetired, g, ledger.Retired{}); err != nil {
		return err
	}
	s.emit(Event{Machine: g.Machine, Generation: g.Number, Stage: StageStopped, Text: g.String() + " is kept, stopped"})
	return nil
}

// prune removes what was kept of earlier generations, beyond the newest that are to
// be kept.
func (s *session) prune(ctx context.Context, present lab.Generation, keep int) error {
	var retired []int
	for _, p := range s.machine(present.Machine).Past {
		if p.Retired && p.Generation < present.Number {
			retired = append(retired, p.Generation)
		}
	}
	slices.Sort(retired)
	for _, n := range retired[:max(0, len(retired)-keep)] {
		g := lab.Generation{Lab: s.id, Machine: present.Machine, Number: n}
		if err := s.remove(ctx, g, []string{fmt.Sprintf("%d retired generations are kept", keep)}); err != nil {
			return err
		}
	}
	return nil
}

func (s *session) generation(m ledger.Machine) lab.Generation {
	return lab.Generation{Lab: s.id, Machine: m.Name, Number: m.Generation}
}

// withdraw takes a replica out of its role's name.
func (s *session) withdraw(ctx context.Context, g lab.Generation) error {
	super, err := s.supervisor(ctx)
	if err != nil {
		return err
	}
	if err := super.Withdraw(ctx, g); err != nil && !errors.Is(err, supervise.ErrNotPlugged) {
		return err
	}
	return nil
}

// syncTime bounds what a guest may take to write everything to its disk before it
// is shut down by force.
const syncTime = 5 * time.Second

// loginTime is the default of Host.Patience: an emulated OpenSSH takes seconds.
const loginTime = 30 * time.Second

// park shuts a generation down at once, with its disk written.
func (s *session) park(ctx context.Context, g lab.Generation, m ledger.Machine) error {
	if !runs(m, s.observed[g.Machine]) {
		return nil
	}
	if err := s.record(ledger.MachineStop, g, nil); err != nil {
		return err
	}
	s.emit(Event{Machine: g.Machine, Generation: g.Number, Stage: StageStop, Text: "stopping " + g.String()})
	if reachable(m, s.observed[g.Machine]) && (m.Create.Agent || m.Phase == ledger.PhaseReady) { // or it may never have had an ssh server
		s.syncAttended(ctx, m)
	}
	if _, err := s.letGo(ctx, g); err != nil {
		return s.stays(ctx, g, err)
	}
	if err := s.unplug(ctx, g); err != nil {
		return err
	}
	if err := s.provider.Stop(ctx, g, 0); err != nil {
		return fmt.Errorf("stopping %s: %w", g, err)
	}
	return s.record(ledger.MachineStopped, g, s.howItEnded(ctx, g))
}

// parkAll finishes to park a generation after an interruption, so that it is not left
// half shut down. It returns err.
func (s *session) parkAll(ctx context.Context, g lab.Generation, m ledger.Machine, err error) error {
	if !interrupted(ctx, err) {
		return err
	}
	ctx, cancel := cleanup(ctx)
	defer cancel()
	if perr := s.park(ctx, g, m); perr != nil {
		return errors.Join(err, perr)
	}
	s.emit(Event{Machine: g.Machine, Generation: g.Number, Stage: StageUndone, Text: fmt.Sprintf("interrupted; generation %d is kept, stopped; \"lab start %s\" starts it", g.Number, g.Machine)})
	return err
}

// unparked is parkAll, but for a generation that runs on because it could not be asked to
// shut down: its role's name leads to it again.
func (s *session) unparked(ctx context.Context, g lab.Generation, m ledger.Machine, err error) error {
	var failed *MachineError
	if !errors.As(err, &failed) {
		return s.parkAll(ctx, g, m, err)
	}
	failed.Generation, failed.Instead = 0, g.Number
	super, serr := s.supervisor(ctx)
	if serr == nil {
		_, serr = plug(ctx, super, cable(g, m.Create.Spec.Machine(m.Name), m.Create), m.Ports)
	}
	if serr != nil {
		s.host.Log.Debug("giving a machine its names back", "machine", g, "err", serr)
	}
	return failed
}

// syncAttended is sync, and tells of a guest that does not answer.
func (s *session) syncAttended(ctx context.Context, m ledger.Machine) {
	_, leave := s.attend(ctx, s.generation(m), Attention{Expected: true})
	defer leave()
	s.sync(ctx, m)
}

// sync asks the guest to write everything to the disk. One that does not
// answer loses what it has not written.
func (s *session) sync(ctx context.Context, m ledger.Machine) {
	limit := syncTime
	if !m.Create.Agent {
		limit = cmp.Or(s.host.Patience, loginTime)
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	target, err := s.targetOf(s.generation(m), m.Create)
	if err != nil {
		return
	}
	if err := syncGuest(ctx, target); err != nil {
		s.host.Log.Debug("asking the guest to sync", "machine", s.generation(m), "err", err)
	}
}

func syncGuest(ctx context.Context, target guest.Target) error {
	if target.Agent == nil {
		client, err := guest.Connect(ctx, target)
		if err != nil {
			return err
		}
		defer client.Close()
		return client.Run(ctx, guest.Command{Args: []string{"sync"}})
	}
	conn, err := target.Agent(ctx)
	if err != nil {
		return err
	}
	defer conn.Close()
	return guest.Sync(ctx, conn)
}

// undo destroys what this session gave birth to, and puts back what it took the
// place of.
func (s *session) undo(ctx context.Context, born []birth, why string) error {
	ctx, cancel := cleanup(ctx)
	defer cancel()
	var errs []error
	for _, b := range born {
		if b.beside && s.machine(b.Machine).Generation == b.Number {
			continue // it was promoted: there is no way back, and the next command finishes it
		}
		text := why + ", destroyed again"
		switch {
		case b.beside:
			text += fmt.Sprintf("; generation %d runs on", b.instead.Generation)
		case b.instead != nil:
			// First, so that there is one to go on with whatever happens.
			if err := s.restore(*b.instead); err != nil {
				errs = append(errs, fmt.Errorf("going back to generation %d of %s: %w", b.instead.Generation, b.Machine, err))
				continue
			}
			text += fmt.Sprintf("; generation %d is kept, stopped; \"lab start %s\" starts it", b.instead.Generation, b.Machine)
		}
		if err := s.remove(ctx, b.Generation, []string{why}); err != nil {
			errs = append(errs, fmt.Errorf("undoing %s: %w", b.Generation, err))
			continue
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
	return s.record(ledger.MachineRestored, s.generation(old), restored(old))
}

func restored(old ledger.Machine) ledger.Restored {
	return ledger.Restored{Create: old.Create, Born: old.Born, Ready: old.Ready, Ports: old.Ports, Tainted: old.Tainted}
}
