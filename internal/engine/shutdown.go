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
	"github.com/labfile/lab/providers"
)

// askTime is how long an agent may take to hear that its guest is to shut down. After
// that the power button is tried, which has at least buttonTime.
const (
	askTime    = 5 * time.Second
	buttonTime = 2 * time.Second
)

// shutDown asks a machine that runs to shut down, by its agent or else by its power
// button, and returns how it ended. One that was asked and does not obey within grace is
// powered off. One that cannot be asked runs on, which is an *UnaskedError, unless force
// is set: then it is powered off, too. Grace 0 is for those who want no questions.
func (s *session) shutDown(ctx context.Context, m ledger.Machine, grace time.Duration, force bool) (ledger.Stopped, error) {
	g := s.generation(m)
	if grace <= 0 {
		return ledger.Stopped{Forced: true}, s.provider.Stop(ctx, g, 0)
	}
	until := time.Now().Add(grace)
	slow := fmt.Sprintf("it did not shut down within %s", span(grace))
	reachable, err := s.audible(ctx, g)
	if err == nil && reachable && m.Create.Agent && s.askAgent(ctx, m, min(askTime, grace)) {
		limited, cancel := context.WithDeadline(ctx, until)
		defer cancel()
		if _, err := s.provider.Wait(limited, g); err == nil || ctx.Err() != nil {
			return ledger.Stopped{}, ctx.Err()
		}
		return ledger.Stopped{Forced: true, Why: slow}, s.provider.Stop(ctx, g, 0)
	}
	if err == nil {
		err = s.provider.Stop(ctx, g, max(buttonTime, time.Until(until)))
	}
	switch {
	case errors.Is(err, providers.ErrUnasked) && force:
		return ledger.Stopped{Forced: true, Why: err.Error()}, s.provider.Stop(ctx, g, 0)
	case errors.Is(err, providers.ErrUnasked):
		return ledger.Stopped{}, &UnaskedError{Machine: m.Name, Err: err}
	case err != nil:
		return ledger.Stopped{}, err
	}
	if now, err := s.provider.Inspect(ctx, g); err == nil && now.Exit.Forced() {
		return ledger.Stopped{Forced: true, Why: slow}, nil
	}
	return ledger.Stopped{}, nil
}

// audible returns an error that is providers.ErrUnasked if a machine is paused: it would
// not notice its power button. Otherwise it says whether the machine's agent can be
// reached.
func (s *session) audible(ctx context.Context, g lab.Generation) (reachable bool, err error) {
	m, err := s.provider.Inspect(ctx, g)
	if err == nil && m.State == providers.StatePaused {
		return false, fmt.Errorf("%w: %s", providers.ErrUnasked, pausedText(m))
	}
	return err == nil && m.Unreachable == "", nil
}

// askAgent asks the agent to shut the guest down, and reports whether it said that it
// does: not every guest listens to its power button.
func (s *session) askAgent(ctx context.Context, m ledger.Machine, limit time.Duration) bool {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	target, err := s.targetOf(s.generation(m), m.Create, "") // a later one may have the name
	if err == nil {
		err = poweroff(ctx, target)
	}
	if err != nil {
		s.host.Log.Debug("asking the agent to power off", "machine", m.Name, "err", err)
	}
	return err == nil
}

func poweroff(ctx context.Context, target guest.Target) error {
	conn, err := target.Agent(ctx)
	if err != nil {
		return err
	}
	defer conn.Close()
	return guest.Poweroff(ctx, conn)
}

// stays records that a machine that was to be stopped runs on, if that is so by err, and
// returns err.
func (s *session) stays(g lab.Generation, err error) error {
	var unasked *UnaskedError
	if !errors.As(err, &unasked) {
		return err
	}
	me := &MachineError{Machine: g.Machine, Generation: g.Number, Stage: StageFailed, Err: err}
	if rerr := s.record(ledger.MachineStays, g, ledger.Stays{Why: unasked.Err.Error()}); rerr != nil {
		me.Err = errors.Join(err, rerr)
	}
	return me
}

func stoppedText(how ledger.Stopped) string {
	switch {
	case !how.Forced:
		return "stopped"
	case how.Why == "":
		return "powered off"
	}
	return "powered off: " + how.Why
}

// letGoTime is what a guest may take to shut down that has a volume.
const letGoTime = 30 * time.Second

// letGo shuts a generation down that is about to be ended by force, if it writes to a
// volume: what it has not written yet would be lost, and its services would find their
// data as after a power cut. So one that was ready once and cannot be asked runs on, as
// with Stop: that is an *UnaskedError. One that never was ready is ended all the same, and
// one that nobody waited for is not even asked.
func (s *session) letGo(ctx context.Context, g lab.Generation) error {
	live, err := s.provider.Inspect(ctx, g)
	if err != nil || live.State != providers.StateRunning && live.State != providers.StatePaused {
		return nil
	}
	rec, known := s.machine(g.Machine).Of(g.Number)
	writes := slices.ContainsFunc(live.Volumes, func(v providers.Volume) bool { return !v.ReadOnly })
	ready := !rec.Ready.IsZero() || !known
	if !writes || !ready && rec.Failed == (ledger.Failed{}) {
		return nil
	}
	if !known { // the ledger is lost
		rec = ledger.Machine{Name: g.Machine, Generation: g.Number}
	}
	s.emit(Event{Machine: g.Machine, Generation: g.Number, Stage: StageStop, Text: "shutting down, so that its volumes are whole"})
	how, err := s.shutDown(ctx, rec, letGoTime, s.opt.Force || !ready)
	if how.Forced {
		s.emit(Event{Machine: g.Machine, Generation: g.Number, Stage: StageStop, Text: stoppedText(how)})
	}
	return err
}
