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
	"github.com/labfile/lab/internal/plan"
	"github.com/labfile/lab/internal/supervise"
	"github.com/labfile/lab/providers"
)

// Due is a machine, or a lab, whose time is over.
type Due struct {
	Machine    lab.Name // empty for the whole lab
	Generation int
	Then       lab.ExpiryAction // what the Labfile wants to happen
	Why        string
}

// uses says when machines were last used: by name, those that run.
type uses map[lab.Name]use

type use struct {
	generation int
	last       time.Time
	open       bool // it is in use
}

// Due returns what is due now by max_age, idle and expires, as they were recorded:
// no Labfile is needed. The whole lab comes alone. Errors: ErrNoLab.
func (l *Lab) Due(ctx context.Context) ([]Due, error) {
	due, _, err := l.due(ctx)
	return due, err
}

// due also returns when the next thing will be, as far as that is known: the zero
// time if nothing ever will.
func (l *Lab) due(ctx context.Context) ([]Due, time.Time, error) {
	if !l.book.Exists() {
		return nil, time.Time{}, ErrNoLab
	}
	state, err := l.read()
	if err != nil {
		return nil, time.Time{}, err
	}
	if !mortal(state) {
		return nil, time.Time{}, nil // the machines need not be looked at
	}
	p, err := l.host.Provider(state.Opened)
	if err != nil {
		return nil, time.Time{}, err
	}
	seen, err := observe(ctx, p, l.id)
	if err != nil {
		return nil, time.Time{}, err
	}
	used, err := l.uses(ctx)
	if err != nil {
		return nil, time.Time{}, err
	}
	due, next := fallDue(state, seen, used, time.Now())
	return due, next, nil
}

// errSettled says that what was due no longer is: some command has replaced or
// stopped the machine meanwhile.
var errSettled = errors.New("it is not due any more")

// stillDue looks again, now that the lab is locked, whether what the clock asked for
// is due, and records why it will be done. errSettled if it is not.
func (s *session) stillDue(ctx context.Context) error {
	then := s.opt.due
	if then == nil {
		return nil
	}
	seen, err := observe(ctx, s.provider, s.id)
	if err != nil {
		return err
	}
	used, err := s.uses(ctx) // somebody may have begun to use it while lab waited for the lock
	if err != nil {
		return err
	}
	due, _ := fallDue(s.state, seen, used, time.Now())
	i := slices.IndexFunc(due, func(d Due) bool {
		return d.Machine == then.Machine && d.Generation == then.Generation && d.Then == then.Then
	})
	if i < 0 {
		return errSettled
	}
	g := lab.Generation{Lab: s.id, Machine: then.Machine, Number: then.Generation}
	return s.record(ledger.MachineExpired, g, ledger.Expired{Then: then.Then, Why: due[i].Why})
}

// mortal reports whether anything of the lab is to end at some time.
func mortal(state ledger.State) bool {
	for _, m := range state.Machines {
		if m.Phase != ledger.PhaseGone && (m.Create.Spec.MaxAge != nil || m.Create.Spec.Idle != nil) {
			return true
		}
	}
	return state.Opened.Expires > 0
}

// uses asks the supervisor when machines were last used.
func (l *Lab) uses(ctx context.Context) (uses, error) {
	c, err := supervise.Dial(ctx, l.host.Dirs, l.id)
	if errors.Is(err, supervise.ErrNotRunning) {
		return uses{}, nil
	}
	if err != nil {
		return nil, err
	}
	defer c.Close()
	st, err := c.Status(ctx)
	if err != nil {
		return nil, err
	}
	used := uses{}
	for _, m := range st.Machines {
		if u := used[m.Generation.Machine]; m.Generation.Number >= u.generation {
			used[m.Generation.Machine] = use{m.Generation.Number, m.LastActive, m.Open > 0}
		}
	}
	return used, nil
}

// fallDue weighs the records against the clock. It is pure.
func fallDue(state ledger.State, seen map[lab.Name][]providers.Machine, used uses, now time.Time) (due []Due, next time.Time) {
	later := func(t time.Time) {
		if next.IsZero() || t.Before(next) {
			next = t
		}
	}
	if after := state.Opened.Expires; after > 0 && len(state.Names()) > 0 {
		if end := state.Since.Add(after); now.Before(end) {
			later(end)
		} else {
			return []Due{{Then: lab.ExpiryDestroy, Why: fmt.Sprintf("the lab is %s old, and expires is %s", span(now.Sub(state.Since)), span(after))}}, next
		}
	}
	for _, name := range state.Names() {
		m := state.Machines[name]
		spec := m.Create.Spec.Machine(name)
		running := m.Phase == ledger.PhaseReady && runs(m, seen[name])
		if m.Ready.IsZero() || !running && m.Phase != ledger.PhaseStopped && m.Phase != ledger.PhaseExited {
			continue // not born yet, or some command works on it
		}
		if e := spec.MaxAge; e.After > 0 && (running || e.Then == lab.ExpiryDestroy) { // what is stopped is replaced when it is wanted again
			if why := overdue(m, e, now); why != "" {
				due = append(due, Due{name, m.Generation, e.Then, why})
				continue
			}
			later(m.Ready.Add(e.After))
		}
		u, known := used[name]
		e := spec.Idle
		if e.After == 0 || !running || !known || u.generation != m.Generation || u.open {
			continue
		}
		last := u.last
		if m.LastEntered.After(last) {
			last = m.LastEntered
		}
		switch unused := e.Then == lab.ExpiryReplace && !last.After(m.Ready); {
		case unused: // it is as good as new
		case now.Sub(last) >= e.After:
			due = append(due, Due{name, m.Generation, e.Then, fmt.Sprintf("it was last used %s ago, and idle is %s", span(now.Sub(last)), span(e.After))})
		default:
			later(last.Add(e.After))
		}
	}
	return due, next
}

// Tend does what is due, records why before it does, and returns what it did. What it
// could not do is in the error; the rest is done.
//
// Errors: ErrNoLab, *LockedError, and those of Stop, Destroy and Up.
func (l *Lab) Tend(ctx context.Context, o Options) ([]Due, error) {
	due, _, err := l.due(ctx)
	if err != nil {
		return nil, err
	}
	return l.tendAll(ctx, due, o)
}

func (l *Lab) tendAll(ctx context.Context, due []Due, o Options) ([]Due, error) {
	var (
		done []Due
		errs []error
	)
	for _, d := range due {
		o.due = &d
		switch err := l.tend(ctx, d, o); {
		case errors.Is(err, errSettled):
		case err != nil:
			errs = append(errs, err)
		default:
			done = append(done, d)
		}
	}
	return done, errors.Join(errs...)
}

func (l *Lab) tend(ctx context.Context, d Due, o Options) error {
	if d.Machine != "" {
		o.Machines = []lab.Name{d.Machine}
	}
	switch d.Then {
	case lab.ExpiryStop:
		return l.Stop(ctx, StopOptions{Options: o, Grace: tendGrace})
	case lab.ExpiryDestroy:
		return l.Destroy(ctx, o)
	}
	_, err := l.Renew(ctx, "expired: "+d.Why, o)
	return err
}

// tendGrace is how long a guest may take to shut down when its time is over.
const tendGrace = 30 * time.Second

// Renew replaces machines by new generations that are born as the present ones were:
// no Labfile is needed. why becomes the reason. Errors: as Stop, and those of Up.
func (l *Lab) Renew(ctx context.Context, why string, o Options) (plan.Plan, error) {
	s, err := l.begin(ctx, nil, o)
	if err != nil {
		return plan.Plan{}, err
	}
	defer s.end()
	names, err := s.choose(o.Machines)
	if err != nil {
		return plan.Plan{}, err
	}
	images := map[lab.Name]Image{}
	for _, name := range names {
		if images[name], err = s.imageOf(ctx, s.machine(name).Create); err != nil {
			return plan.Plan{}, fmt.Errorf("replacing %s: %w", name, err)
		}
	}
	want := s.asRecorded()
	in := s.input(want, nil)
	in.Only, in.Rebuild, in.Why = names, names, why
	p := plan.Make(in)
	p.Steps = slices.DeleteFunc(p.Steps, func(step plan.Step) bool { return !slices.Contains(names, step.Machine) })
	if err := s.preflightRecorded(ctx, want, p, images); err != nil {
		return plan.Plan{}, err
	}
	if o.Confirm != nil {
		if err := o.Confirm(p); err != nil {
			return p, err
		}
	}
	return p, s.apply(ctx, want, p, images)
}

// How often the supervisor looks at the clock, and how long it leaves alone what
// could not be done.
const (
	tendEvery = 15 * time.Second
	tendLeast = 200 * time.Millisecond
	tendRetry = 2 * time.Second // at first, and twice as long each time
	tendMost  = time.Minute
)

// Watch calls act whenever something of the lab is due, until ctx ends. act does
// it, or sees to it that somebody does, and returns then; it may be called again for
// the same.
func (l *Lab) Watch(ctx context.Context, act func(context.Context) error) {
	retry := tendRetry
	for wait := tendLeast; ; {
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		}
		wait = tendEvery
		due, next, err := l.due(ctx)
		switch {
		case err != nil && ctx.Err() == nil:
			l.host.Log.Debug("looking for what is due", "err", err)
		case len(due) > 0:
			for _, d := range due {
				l.host.Log.Info("due", "machine", d.Machine, "generation", d.Generation, "then", d.Then, "why", d.Why)
			}
			if err := act(ctx); err != nil {
				l.host.Log.Warn("doing what is due", "err", err)
				wait, retry = retry, min(2*retry, tendMost)
				continue
			}
			wait, retry = tendLeast, tendRetry
		case !next.IsZero():
			wait = max(tendLeast, min(wait, time.Until(next)))
		}
	}
}
