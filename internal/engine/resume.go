// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/ledger"
	"github.com/labfile/lab/providers"
)

// abandoned is a replacement by stop-first that a command which was killed left half
// done: the one before is stopped, and nobody will ever know whether the next one
// would have become ready.
type abandoned struct {
	next, before ledger.Machine
}

// abandoned finds such replacements. The one before must be whole: otherwise there is
// nothing to go back to, and the plan makes another one.
func (s *session) abandoned() []abandoned {
	var found []abandoned
	for _, name := range slices.Sorted(maps.Keys(s.state.Machines)) {
		next := s.state.Machines[name]
		if !neverReady(next) {
			continue
		}
		for i := len(next.Past) - 1; i >= 0; i-- {
			if before := next.Past[i]; !before.Retired && s.restorable(before) {
				found = append(found, abandoned{next, before})
				break
			}
		}
	}
	return found
}

// neverReady reports whether a generation did not become ready, however far it came and
// whether or not it is there.
func neverReady(m ledger.Machine) bool {
	switch m.Phase {
	case ledger.PhaseCreating:
		return true
	case ledger.PhaseFailed, ledger.PhaseDestroying, ledger.PhaseGone:
		return m.Ready.IsZero()
	}
	return false
}

// presume makes the session see the lab as resume would leave it, for those who only
// want to know.
func (s *session) presume() error {
	s.undone = map[lab.Name]string{}
	for _, a := range s.abandoned() {
		s.undone[a.next.Name] = fmt.Sprintf("its replacement by generation %d was interrupted: that is undone, generation %d is the present one again",
			a.next.Generation, a.before.Generation)
		data, err := json.Marshal(restored(a.before))
		if err != nil {
			return err
		}
		if err := s.state.Apply(ledger.Record{
			Type: ledger.MachineRestored, Machine: a.before.Name, Generation: a.before.Generation, Data: data,
		}); err != nil {
			return err
		}
		if s.keepsFailed(a.next) {
			continue
		}
		s.observed[a.next.Name] = slices.DeleteFunc(slices.Clone(s.observed[a.next.Name]), func(m providers.Machine) bool {
			return m.Number == a.next.Generation
		})
	}
	data, err := json.Marshal(ledger.Retired{Failed: true})
	if err != nil {
		return err
	}
	for _, m := range s.forgotten() {
		if err := s.state.Apply(ledger.Record{
			Type: ledger.MachineRetired, Machine: m.Name, Generation: m.Generation, Data: data,
		}); err != nil {
			return err
		}
	}
	return nil
}

// forgotten returns the generations that failed beside the present one and are to be kept
// for inspection, of which it was not recorded yet that they are: lab was killed before.
func (s *session) forgotten() []ledger.Machine {
	var found []ledger.Machine
	for _, name := range slices.Sorted(maps.Keys(s.state.Machines)) {
		m := s.state.Machines[name]
		others := m.Past
		if m.Standby != nil {
			others = append(slices.Clone(others), *m.Standby)
		}
		for _, o := range others {
			if failedBeside(m, o) && s.keepsFailed(o) {
				found = append(found, o)
			}
		}
	}
	return found
}

// failedBeside reports whether a generation failed to take the place of the present one,
// and was to be kept, though that is not recorded yet.
func failedBeside(present, other ledger.Machine) bool {
	return present.Phase != ledger.PhaseGone && other.Phase == ledger.PhaseFailed && !other.Retired && other.Generation > present.Generation &&
		other.Create.Spec.Machine(other.Name).Replace.OnFailure != lab.DiscardFailed
}

// keepsFailed reports whether a generation failed, is whole, and is to be kept for
// inspection.
func (s *session) keepsFailed(m ledger.Machine) bool {
	return m.Phase == ledger.PhaseFailed && m.Create.Spec.Machine(m.Name).Replace.OnFailure != lab.DiscardFailed &&
		slices.ContainsFunc(s.observed[m.Name], func(o providers.Machine) bool {
			return o.Number == m.Generation && o.State != providers.StateBroken
		})
}

// halted returns the machines that ended after a command had begun to stop them and was
// interrupted, with no supervisor there to record it.
func (s *session) halted() []ledger.Machine {
	var found []ledger.Machine
	for _, name := range slices.Sorted(maps.Keys(s.state.Machines)) {
		m := s.state.Machines[name]
		if m.Phase == ledger.PhaseStopping && slices.ContainsFunc(s.observed[name], func(o providers.Machine) bool {
			return o.Number == m.Generation && o.State == providers.StateStopped
		}) {
			found = append(found, m)
		}
	}
	return found
}

// resume goes back to the generations before replacements that were abandoned, keeps the
// next ones that had failed, and records what was stopped meanwhile. What else an
// interruption leaves is seen by the plan.
func (s *session) resume(ctx context.Context) error {
	for _, m := range s.halted() {
		if err := s.record(ledger.MachineStopped, s.generation(m), s.howItEnded(ctx, s.generation(m))); err != nil {
			return err
		}
	}
	changed := false
	for _, a := range s.abandoned() {
		if err := s.restore(a.before); err != nil {
			return err
		}
		next := s.generation(a.next)
		s.emit(Event{
			Machine: a.next.Name, Generation: a.next.Generation, Stage: StageUndone,
			Text: fmt.Sprintf("its replacement was interrupted; going back to generation %d", a.before.Generation),
		})
		if s.keepsFailed(a.next) || a.next.Phase == ledger.PhaseGone {
			continue
		}
		if err := s.remove(ctx, next, []string{"it was interrupted before it was ready"}); err != nil {
			return err
		}
		changed = true
	}
	for _, m := range s.forgotten() {
		failed := &MachineError{Machine: m.Name, Generation: m.Generation, Kept: true}
		l := launch{Generation: s.generation(m), m: m.Create.Spec.Machine(m.Name)}
		if err := s.lay(ctx, l, failed); err != nil {
			return err
		}
		if err := s.keepFailed(l, failed); err != nil {
			return err
		}
		changed = true
	}
	if !changed {
		return nil
	}
	var err error
	s.observed, err = observe(ctx, s.provider, s.id)
	return err
}
