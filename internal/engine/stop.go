// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/ledger"
	"github.com/labfile/lab/internal/plan"
)

// StopOptions are the options of Stop.
type StopOptions struct {
	Options
	Grace time.Duration // how long a guest may take to shut down; 0 means by force at once
}

// Stop shuts the machines down; their disks stay. The power of one that was asked and
// does not obey within StopOptions.Grace is cut; one that cannot be asked runs on, unless
// Options.Force says otherwise. Stopping what is stopped succeeds. Errors: ErrNoLab,
// *NoMachineError, *LockedError, and *UpError, with an *UnaskedError for each that runs on.
func (l *Lab) Stop(ctx context.Context, o StopOptions) error {
	s, err := l.begin(ctx, nil, o.Options)
	if err != nil {
		return err
	}
	defer s.end()
	names, err := s.choose(o.Machines)
	if err != nil {
		return err
	}
	err = s.each(ctx, names, func(m ledger.Machine) error {
		if err := s.stopLeftovers(ctx, m, o.Grace); err != nil {
			return err
		}
		g := s.generation(m)
		if !runs(m, s.observed[m.Name]) {
			return nil
		}
		began := time.Now()
		if err := s.record(ledger.MachineStop, g, nil); err != nil {
			return err
		}
		s.emit(Event{Machine: g.Machine, Generation: g.Number, Stage: StageStop, Text: "stopping"})
		how, err := s.shutDown(ctx, m, o.Grace, o.Force)
		if interrupted(ctx, err) {
			return s.abandonStop(ctx, g, began, err)
		}
		if err != nil {
			return s.stays(ctx, g, err)
		}
		return s.stopped(ctx, g, how, began)
	})
	return err
}

// stopped records that a generation was stopped, and says so.
func (s *session) stopped(ctx context.Context, g lab.Generation, how ledger.Stopped, began time.Time) error {
	if err := s.unplug(ctx, g); err != nil {
		return err
	}
	if err := s.record(ledger.MachineStopped, g, how); err != nil {
		return err
	}
	s.emit(Event{Machine: g.Machine, Generation: g.Number, Stage: StageStopped, Text: stoppedText(how), Took: since(began)})
	return nil
}

// abandonStop says what an interruption, err, left of a machine that was being shut down. A
// guest cannot be told to stay: if it was asked, it may end yet, which the supervisor sees.
func (s *session) abandonStop(ctx context.Context, g lab.Generation, began time.Time, err error) error {
	ctx, cancel := cleanup(ctx)
	defer cancel()
	if !ended(ctx, s.provider, g) {
		s.emit(Event{Machine: g.Machine, Generation: g.Number, Stage: StageUndone, Text: "interrupted; it still runs, and stops later if its guest obeys"})
		return err
	}
	return errors.Join(err, s.stopped(ctx, g, s.howItEnded(ctx, g), began))
}

// stopLeftovers ends generations beside the present one that still run, because a
// command was killed that was about to replace the one by the other. One that writes to a
// volume is asked to shut down, unless grace is 0.
func (s *session) stopLeftovers(ctx context.Context, m ledger.Machine, grace time.Duration) error {
	for _, o := range s.observed[m.Name] {
		if o.Number == m.Generation || !isOn(o) {
			continue
		}
		if grace > 0 {
			if err := s.letGoRecorded(ctx, o.Generation); err != nil {
				return err
			}
		}
		if err := s.unplug(ctx, o.Generation); err != nil {
			return err
		}
		if err := s.provider.Stop(ctx, o.Generation, 0); err != nil {
			return fmt.Errorf("stopping %s: %w", o.Generation, err)
		}
	}
	return nil
}

// Start boots stopped machines again, in the order of their dependencies, as they
// were recorded: no Labfile is needed. Errors as Stop.
func (l *Lab) Start(ctx context.Context, o Options) error {
	s, err := l.begin(ctx, nil, o)
	if err != nil {
		return err
	}
	defer s.end()
	names, err := s.choose(o.Machines)
	if err != nil {
		return err
	}
	want := s.asRecorded()
	p := plan.Make(s.input(want, nil)) // no digests: the boxes may have moved, and that does not matter here
	var failed UpError
	p.Steps = slices.DeleteFunc(p.Steps, func(step plan.Step) bool {
		if !slices.Contains(names, step.Machine) {
			return true
		}
		if step.Action == plan.Start || step.Action == plan.Keep {
			return false
		}
		failed.Failed = append(failed.Failed, &MachineError{
			Machine: step.Machine, Generation: step.Generation, Stage: StageFailed, Kept: true,
			Err: fmt.Errorf("it cannot be started, only replaced by \"lab up\": %s", words(step.Reasons)),
		})
		return true
	})
	if len(failed.Failed) > 0 {
		return &failed
	}
	starts := p
	starts.Steps = slices.DeleteFunc(slices.Clone(p.Steps), func(step plan.Step) bool { return step.Action != plan.Start })
	if err := s.preflightRecorded(ctx, want, starts, nil); err != nil {
		return err
	}
	return s.apply(ctx, want, p, nil)
}

// asRecorded returns the lab as the ledger knows it.
func (s *session) asRecorded() *lab.Lab {
	s.asOf = true
	want := &lab.Lab{Name: s.state.Opened.Name, File: s.state.Opened.File, Provider: s.state.Opened.Provider, URI: s.state.Opened.URI, Expires: s.state.Opened.Expires, Expose: s.state.Opened.Exposes(), InheritProxy: s.state.Opened.InheritProxy}
	for _, name := range s.state.Names() {
		want.Machines = append(want.Machines, s.state.Machines[name].Create.Spec.Machine(name))
	}
	return want
}

// choose returns the machines named, by their own names or their role's, or all
// that exist.
func (s *session) choose(names []lab.Name) ([]lab.Name, error) {
	if !s.book.Exists() {
		return nil, ErrNoLab
	}
	known := s.state.Names()
	if len(names) == 0 {
		return known, nil
	}
	var machines []lab.Machine
	for _, name := range known {
		machines = append(machines, s.state.Machines[name].Create.Spec.Machine(name))
	}
	return expand(names, machines)
}

// each runs fn for every machine at once and collects what went wrong.
func (s *session) each(ctx context.Context, names []lab.Name, fn func(ledger.Machine) error) error {
	all := make([]ledger.Machine, len(names))
	for i, name := range names {
		all[i] = s.machine(name)
	}
	return together(ctx, all, func(m ledger.Machine) error {
		err := fn(m)
		var me *MachineError
		if err == nil || errors.As(err, &me) {
			return err
		}
		return &MachineError{Machine: m.Name, Generation: m.Generation, Stage: StageFailed, Kept: true, Err: err}
	}, s.generation)
}

// together runs fn for everything at once and waits for the end of all. The errors
// are in a *UpError, each for the generation that of names; if ctx has ended, its error is
// returned instead.
func together[T any](ctx context.Context, all []T, fn func(T) error, of func(T) lab.Generation) error {
	var (
		wg     sync.WaitGroup
		mu     sync.Mutex
		failed UpError
	)
	for _, one := range all {
		wg.Go(func() {
			if err := fn(one); err != nil {
				mu.Lock()
				defer mu.Unlock()
				failed.Failed = append(failed.Failed, failedAt(of(one), err))
			}
		})
	}
	wg.Wait()
	if err := ctx.Err(); err != nil {
		return err
	}
	return failed.orNil()
}
