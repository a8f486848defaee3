// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"encoding/json"
	"fmt"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/ledger"
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
	for _, name := range s.state.Names() {
		next := s.state.Machines[name]
		if next.Phase != ledger.PhaseCreating && (next.Phase != ledger.PhaseFailed || !next.Ready.IsZero()) {
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

// presume makes the session's state what resume would make of the lab, for those who
// only want to know.
func (s *session) presume() error {
	for _, a := range s.abandoned() {
		data, err := json.Marshal(restored(a.before))
		if err != nil {
			return err
		}
		if err := s.state.Apply(ledger.Record{
			Type: ledger.MachineRestored, Machine: a.before.Name, Generation: a.before.Generation, Data: data,
		}); err != nil {
			return err
		}
	}
	return nil
}

// resume goes back to the generations before replacements that were abandoned. What
// else an interruption leaves is seen by the plan.
func (s *session) resume(ctx context.Context) error {
	gone := false
	for _, a := range s.abandoned() {
		if err := s.restore(a.before); err != nil {
			return err
		}
		next := s.generation(a.next)
		s.emit(Event{
			Machine: a.next.Name, Generation: a.next.Generation, Stage: StageUndone,
			Text: fmt.Sprintf("its replacement was interrupted; going back to generation %d", a.before.Generation),
		})
		spec := a.next.Create.Spec.Machine(a.next.Name)
		if a.next.Phase == ledger.PhaseFailed && spec.Replace.OnFailure != lab.DiscardFailed {
			failed := &MachineError{Machine: a.next.Name, Generation: a.next.Generation, Kept: true}
			l := launch{Generation: next, m: spec}
			if err := s.lay(ctx, l, failed); err != nil {
				return err
			}
			if err := s.keepFailed(l, failed); err != nil {
				return err
			}
			continue
		}
		if err := s.remove(ctx, next, []string{"it was interrupted before it was ready"}); err != nil {
			return err
		}
		gone = true
	}
	if !gone {
		return nil
	}
	var err error
	s.observed, err = observe(ctx, s.provider, s.id)
	return err
}
