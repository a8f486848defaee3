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
	"github.com/labfile/lab/providers"
)

// askTime is how long an agent may take to hear that its guest is to shut down. After
// that the power button is tried, which has at least buttonTime.
const (
	askTime    = 4 * time.Second
	buttonTime = 2 * time.Second
)

// shutDown asks a machine that runs to shut down, by its agent or else by its power
// button, and returns how it ended. One that was asked and does not obey within grace is
// powered off. One that cannot be asked runs on, which is an *UnaskedError, unless force
// is set: then it is powered off, too. Grace 0 is for those who want no questions.
func (s *session) shutDown(ctx context.Context, m ledger.Machine, grace time.Duration, force bool) (ledger.Stopped, error) {
	g := s.generation(m)
	if grace <= 0 {
		return s.cut(ctx, g, "")
	}
	_, leave := s.attend(ctx, g, Attention{Leaving: true})
	defer leave()
	until := time.Now().Add(grace)
	slow := fmt.Sprintf("it did not shut down within %s", span(grace))
	reachable, err := s.audible(ctx, g)
	if err == nil && reachable && m.Create.Agent && s.askAgent(ctx, m, min(askTime, grace)) {
		limited, cancel := context.WithDeadline(ctx, until)
		defer cancel()
		_, werr := s.provider.Wait(limited, g)
		switch {
		case werr == nil:
			return ledger.Stopped{}, nil
		case ctx.Err() != nil:
			return ledger.Stopped{}, ctx.Err()
		case limited.Err() != nil:
			return s.cut(ctx, g, slow)
		}
		s.host.Log.Debug("waiting for a machine that shuts down", "machine", g, "err", werr)
	}
	if err == nil {
		err = s.provider.Stop(ctx, g, max(buttonTime, time.Until(until)))
	}
	switch {
	case errors.Is(err, providers.ErrUnasked) && force:
		return s.cut(ctx, g, err.Error())
	case errors.Is(err, providers.ErrUnasked):
		return ledger.Stopped{}, s.unasked(g, err)
	case err != nil:
		return ledger.Stopped{}, err
	}
	if now, err := s.provider.Inspect(ctx, g); err == nil && now.Exit.Forced() {
		return ledger.Stopped{Forced: true, Why: slow}, nil
	}
	return ledger.Stopped{}, nil
}

// howItEnded says of a machine that does not run how it was stopped.
func (s *session) howItEnded(ctx context.Context, g lab.Generation) (how ledger.Stopped) {
	if now, err := s.provider.Inspect(ctx, g); err == nil {
		how.Forced = now.Exit.Forced()
	}
	return how
}

// cut cuts a machine's power.
func (s *session) cut(ctx context.Context, g lab.Generation, why string) (ledger.Stopped, error) {
	if err := s.provider.Stop(ctx, g, 0); err != nil {
		return ledger.Stopped{}, fmt.Errorf("cutting the power of %s: %w", g, err)
	}
	return ledger.Stopped{Forced: true, Why: why}, nil
}

// unasked is the error of a machine that runs on because of err.
func (s *session) unasked(g lab.Generation, err error) *UnaskedError {
	return &UnaskedError{Machine: g.Machine, Err: err, Command: s.forceful(g)}
}

// forceful is the command that ends a machine without asking it.
func (s *session) forceful(g lab.Generation) string {
	return cmp.Or(s.forced, fmt.Sprintf("lab stop %s --force", g.Machine))
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
	target, err := s.targetOf(s.generation(m), m.Create) // a later one may have the name
	if err == nil {
		err = poweroff(ctx, target)
	}
	if err != nil {
		s.host.Log.Debug("asking the agent to power off", "machine", m.Name, "err", err)
	}
	if err != nil && errors.Is(ctx.Err(), context.DeadlineExceeded) {
		s.emit(Event{Machine: m.Name, Generation: m.Generation, Stage: StageNote, Text: "its agent does not answer; its power button is pressed"})
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

// stays records that a machine that was to be stopped runs on, if that is so after err,
// and returns an error that says so: an *UnaskedError. Otherwise it returns err.
func (s *session) stays(ctx context.Context, g lab.Generation, err error) error {
	var unasked *UnaskedError
	if !errors.As(err, &unasked) {
		live, ierr := s.provider.Inspect(context.WithoutCancel(ctx), g)
		if interrupted(ctx, err) || ierr != nil || !isOn(live) {
			return err
		}
		unasked = s.unasked(g, err)
		err = unasked
	}
	me := &MachineError{Machine: g.Machine, Generation: g.Number, Stage: StageFailed, Err: err}
	if rerr := s.record(ledger.MachineStays, g, ledger.Stays{Why: unasked.Err.Error()}); rerr != nil {
		me.Err = errors.Join(err, rerr)
	}
	return me
}

// isOn reports whether a machine runs or is paused.
func isOn(m providers.Machine) bool {
	return m.State == providers.StateRunning || m.State == providers.StatePaused
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

// letGoTime is what a guest may take to shut down that has a volume. If there is less time
// for all that is to be done, it is half of what is left.
const letGoTime = 30 * time.Second

// letGo shuts a generation down that is about to be ended by force, if it writes to a
// volume: what it has not written yet would be lost, and its services would find their
// data as after a power cut. So one that cannot be asked runs on, as with Stop: that is an
// *UnaskedError. It returns how the machine ended.
func (s *session) letGo(ctx context.Context, g lab.Generation) (ledger.Stopped, error) {
	writes, err := s.writesVolume(ctx, g)
	if err != nil || !writes {
		return ledger.Stopped{}, err
	}
	rec, known := s.machine(g.Machine).Of(g.Number)
	if !known { // the ledger is lost
		rec = ledger.Machine{Name: g.Machine, Generation: g.Number}
	}
	grace := letGoTime
	if until, ok := ctx.Deadline(); ok { // others may come after this one
		grace = max(time.Millisecond, min(grace, time.Until(until)/2))
	}
	s.emit(Event{Machine: g.Machine, Generation: g.Number, Stage: StageStop, Text: "shutting down, so that its volumes are whole"})
	how, err := s.shutDown(ctx, rec, grace, s.opt.Force)
	if err == nil && how.Forced {
		s.emit(Event{Machine: g.Machine, Generation: g.Number, Stage: StageStop, Text: stoppedText(how)})
	}
	return how, err
}

// writesVolume reports whether a generation runs and writes to a volume. With Options.Force, one
// that the provider says nothing of counts as one that does not.
func (s *session) writesVolume(ctx context.Context, g lab.Generation) (bool, error) {
	live, err := s.provider.Inspect(ctx, g)
	switch {
	case errors.Is(err, providers.ErrNotFound), err != nil && s.opt.Force && ctx.Err() == nil:
		return false, nil
	case err != nil:
		return false, &unseenError{fmt.Errorf("finding out whether %s writes to a volume: %w", g, err), s.forceful(g)}
	}
	return isOn(live) && slices.ContainsFunc(live.Volumes, func(v providers.Volume) bool { return !v.ReadOnly }), nil
}

// letGoRecorded is letGo, and records that the generation is stopped. Of one that never was
// ready nothing is recorded, or it would count as one that is worth to be started again.
func (s *session) letGoRecorded(ctx context.Context, g lab.Generation) error {
	writes, err := s.writesVolume(ctx, g)
	if err != nil || !writes {
		return err
	}
	if rec, _ := s.machine(g.Machine).Of(g.Number); rec.Ready.IsZero() || rec.Phase == ledger.PhaseRetired {
		_, err := s.letGo(ctx, g)
		return err
	}
	if err := s.record(ledger.MachineStop, g, nil); err != nil {
		return err
	}
	how, err := s.letGo(ctx, g)
	if err != nil {
		return s.stays(ctx, g, err)
	}
	return s.record(ledger.MachineStopped, g, how)
}
