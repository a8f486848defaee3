// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/ledger"
	"github.com/labfile/lab/internal/network"
	"github.com/labfile/lab/internal/supervise"
	"github.com/labfile/lab/providers"
)

// finishTakeOver does what is left to do of a takeover during which lab was killed: the
// present generation takes over in one step, and connections to those before it have
// their time to end. Where there is no standby to take over, plugging it in does.
func (s *session) finishTakeOver(ctx context.Context, super *supervise.Client, present ledger.Machine, m lab.Machine) {
	outgoing := recorded(present, nil).Outgoing
	if len(outgoing) == 0 {
		return
	}
	l := launch{Generation: s.generation(present), m: m}
	if _, err := promote(ctx, super, l, present.Ports); err != nil {
		s.host.Log.Debug("finishing a takeover", "machine", l.Generation, "err", err)
		return
	}
	for _, n := range outgoing {
		if old, ok := present.Of(n); ok {
			s.drained(ctx, super, l, old)
		}
	}
}

// serve makes sure that the present generation has its name and its ports, if there is
// one before it that is not retired yet: lab may have been killed while the one took
// over from the other.
func (s *session) serve(ctx context.Context, present ledger.Machine) error {
	if len(recorded(present, nil).Outgoing) == 0 || !runs(present, s.observed[present.Name]) {
		return nil
	}
	super, err := s.supervisor(ctx)
	if err != nil {
		return err
	}
	m := present.Create.Spec.Machine(present.Name)
	s.finishTakeOver(ctx, super, present, m)
	_, err = plug(ctx, super, cable(s.generation(present), m, present.Create), present.Ports)
	return err
}

// handOver gives birth to the next generation beside the present one and lets it
// take over once it is ready. If it fails, nothing has happened to the present one.
func (s *session) handOver(ctx context.Context, l launch, img Image, why []string, old ledger.Machine, born func(birth)) error {
	err := s.birth(ctx, l, img, why, func() { born(birth{Generation: l.Generation, instead: &old, beside: true}) })
	if err == nil {
		err = s.takeOver(ctx, l, old)
	}
	var failed *MachineError
	if !errors.As(err, &failed) || errors.Is(err, providers.ErrIncapable) {
		return err // if it is an error, undo knows what to do
	}
	failed.Instead = old.Generation
	if err := s.lay(ctx, l, failed); err != nil {
		failed.Err = fmt.Errorf("%w; %w", failed.Err, err)
		return failed
	}
	if err := s.keepFailed(l, failed); err != nil {
		failed.Err = fmt.Errorf("%w; %w", failed.Err, err)
	}
	return failed
}

// takeOver makes a generation that is ready the present one, and waits until the
// connections to the old one have ended. The record comes first: if lab is killed
// between the two, the next command makes it so.
func (s *session) takeOver(ctx context.Context, l launch, old ledger.Machine) error {
	began := time.Now()
	if err := ctx.Err(); err != nil {
		return err
	}
	super, err := s.supervisor(ctx)
	if err != nil {
		return s.fail(ctx, l.Generation, StageHandover, err)
	}
	sure, cancel := cleanup(ctx) // an interruption comes too late, or came before
	defer cancel()
	s.emit(Event{Machine: l.Machine, Generation: l.Number, Stage: StageHandover, Text: "taking over from " + s.generation(old).String()})
	if err := s.record(ledger.MachinePromoted, l.Generation, nil); err != nil {
		return err
	}
	bound, err := promote(sure, super, l, old.Ports)
	var taken *network.PortError
	if errors.As(err, &taken) || errors.Is(err, supervise.ErrNotPlugged) || errors.Is(err, supervise.ErrStale) {
		// Nothing has changed, so that is what the ledger shall say. If it cannot, the
		// generation counts as the present one, and must not be ended as one that failed.
		if rerr := s.record(ledger.MachinePromoted, s.generation(old), nil); rerr != nil {
			return fmt.Errorf("%w; recording that %s stays: %w; the next command tries to take over again", err, s.generation(old), rerr)
		}
		return s.fail(sure, l.Generation, StageHandover, err)
	}
	if err != nil {
		return fmt.Errorf("taking over from %s: %w; the next command finishes it", s.generation(old), err)
	}
	if got := ports(bound); !slices.Equal(got, s.machine(l.Machine).Ports) {
		if err := s.record(ledger.MachineChanged, l.Generation, ledger.Changed{Spec: ledger.SpecOf(l.m), Ports: got}); err != nil {
			return err
		}
	}
	s.emit(Event{Machine: l.Machine, Generation: l.Number, Stage: StageHandover, Text: fmt.Sprintf("in service; connections to %s end within %s", s.generation(old), l.m.Replace.Drain)})
	s.drained(ctx, super, l, old)
	rec := s.machine(l.Machine)
	s.emit(Event{
		Machine: l.Machine, Generation: l.Number, Stage: StageReady, Text: readyText(rec.Create.Address, bound),
		Took: since(rec.Born), Time: began.Add(since(began)),
	})
	return nil
}

// promote asks the supervisor to let a standby take over. Where any host port will
// do, it gets those of the one before.
func promote(ctx context.Context, super *supervise.Client, l launch, before []ledger.Port) ([]lab.Forward, error) {
	want := rebind(l.m.Ports, before)
	bound, err := super.Promote(ctx, l.Generation, want, l.m.Replace.Drain)
	var taken *network.PortError
	if errors.As(err, &taken) && !slices.Equal(want, l.m.Ports) {
		return super.Promote(ctx, l.Generation, l.m.Ports, l.m.Replace.Drain)
	}
	return bound, err
}

// hurriedDrain is how long connections have that are still open when whoever waits for
// them to end gives up.
const hurriedDrain = 10 * time.Second

// drained waits until the connections to a generation that gave way have ended, or
// their time is over.
func (s *session) drained(ctx context.Context, super *supervise.Client, l launch, old ledger.Machine) {
	err := super.Drained(ctx, s.generation(old))
	if err != nil && ctx.Err() != nil {
		s.emit(Event{
			Machine: l.Machine, Generation: l.Number, Stage: StageHandover,
			Text: fmt.Sprintf("interrupted; what is connected to %s has %s more", s.generation(old), span(min(hurriedDrain, l.m.Replace.Drain))),
		})
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), hurriedDrain)
		defer cancel()
		err = super.Drained(ctx, s.generation(old))
	}
	if err != nil {
		s.host.Log.Debug("waiting for connections to end", "machine", s.generation(old), "err", err)
	}
}
