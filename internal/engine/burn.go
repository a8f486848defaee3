// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/ledger"
)

// Burnt is what became of one machine in a phoenix drill: it was destroyed without
// warning, and brought back. It is part of the schema of "lab burn --json".
type Burnt struct {
	Round      int           `json:"round"` // counts from 1
	Machine    lab.Name      `json:"machine"`
	Generation int           `json:"generation"`          // that was destroyed
	Next       int           `json:"next,omitempty"`      // that took its place; 0 if none did
	Lost       lab.Bytes     `json:"lost"`                // bytes that it had written since its birth, about
	Recovered  time.Duration `json:"recovered,omitempty"` // nanoseconds from the blow until it was ready again
	Trouble    string        `json:"trouble,omitempty"`   // why it did not recover
}

// BurnOptions are the options of Burn.
type BurnOptions struct {
	UpOptions
	Random int           // destroy so many of the machines in each round; 0 for all of them
	Every  time.Duration // from the beginning of one round to that of the next
	For    time.Duration // no round begins later than this; 0 for one round
	Tell   func(Burnt)   // told how each machine fared, one call at a time; may be nil
}

// Burn is a phoenix drill: it destroys machines of the lab without warning, and
// brings them back as Up does, round after round. The end of ctx ends it between two
// rounds; within one, the lab is brought up first. A machine that does not come back
// ends it, with the error of Up.
//
// Errors: ErrNoLab, *NoMachineError, and those of Up.
func (l *Lab) Burn(ctx context.Context, want *lab.Lab, o BurnOptions) ([]Burnt, error) {
	var all []Burnt
	began := time.Now()
	for round := 1; ; round++ {
		start := time.Now()
		burnt, err := l.burn(ctx, want, o, round)
		for _, b := range burnt {
			all = append(all, b)
			if o.Tell != nil {
				o.Tell(b)
			}
		}
		if err != nil {
			return all, err
		}
		next := start.Add(o.Every)
		if o.For == 0 || next.Sub(began) > o.For {
			return all, nil
		}
		select {
		case <-ctx.Done():
		case <-time.After(time.Until(next)):
		}
		if ctx.Err() != nil {
			return all, nil // in order: the lab is up
		}
	}
}

// Burnable returns the machines that Burn would choose from, without Random. It takes no
// lock and changes nothing. Errors: ErrNoLab, *NoMachineError, and ErrNothingToBurn.
func (l *Lab) Burnable(ctx context.Context, want *lab.Lab, o BurnOptions) ([]lab.Name, error) {
	s := &session{Lab: l, opt: o.Options}
	if err := s.look(ctx, want); err != nil {
		return nil, err
	}
	o.Random = 0
	return s.victims(want, o)
}

// burn is one round.
func (l *Lab) burn(ctx context.Context, want *lab.Lab, o BurnOptions, round int) ([]Burnt, error) {
	burnt, blow, err := l.strike(ctx, want, o, round)
	if err != nil || len(burnt) == 0 {
		return burnt, err
	}
	// Whoever destroys must also rebuild: an interruption waits for that.
	ctx = context.WithoutCancel(ctx)
	up := o.UpOptions
	up.Confirm, up.Machines = nil, nil
	var (
		mu    sync.Mutex
		ready = map[lab.Name]time.Time{}
	)
	tell := o.Events
	up.Events = func(e Event) {
		if e.Stage == StageReady {
			mu.Lock()
			ready[e.Machine] = e.Time
			mu.Unlock()
		}
		emit(tell, e)
	}
	_, err = l.Up(ctx, want, up)
	state, rerr := l.read()
	for i := range burnt {
		b := &burnt[i]
		m := state.Machines[b.Machine]
		at, ok := ready[b.Machine]
		switch {
		case ok && m.Phase == ledger.PhaseReady && m.Generation > b.Generation:
			b.Next, b.Recovered = m.Generation, at.Sub(blow[b.Machine])
		case m.Failed.Error != "":
			b.Trouble = m.Failed.Error
		case err != nil:
			b.Trouble = err.Error()
		default:
			b.Trouble = "it was not brought back"
		}
	}
	return burnt, errors.Join(err, rerr)
}

// strike destroys machines: whose turn it is, what they were, and when each was hit.
func (l *Lab) strike(ctx context.Context, want *lab.Lab, o BurnOptions, round int) ([]Burnt, map[lab.Name]time.Time, error) {
	s, err := l.begin(ctx, want, o.Options)
	if err != nil {
		return nil, nil, err
	}
	defer s.end()
	names, err := s.victims(want, o)
	if err != nil {
		return nil, nil, err
	}
	// Nothing is destroyed that would not come back.
	if _, _, _, err := s.plan(ctx, want, UpOptions{Locked: o.Locked}, names); err != nil {
		return nil, nil, err
	}
	var (
		mu    sync.Mutex
		burnt []Burnt
		blow  = map[lab.Name]time.Time{}
	)
	err = s.each(ctx, names, func(m ledger.Machine) error {
		b := Burnt{Round: round, Machine: m.Name, Generation: m.Generation}
		for _, live := range s.observed[m.Name] {
			if live.Number == m.Generation {
				b.Lost = live.Written
			}
		}
		at := time.Now()
		mu.Lock()
		burnt, blow[m.Name] = append(burnt, b), at
		mu.Unlock()
		g := lab.Generation{Lab: s.id, Machine: m.Name, Number: m.Generation}
		return s.remove(context.WithoutCancel(ctx), g, []string{fmt.Sprintf("burnt in round %d of a drill", round)})
	})
	slices.SortFunc(burnt, func(a, b Burnt) int { return compare(a.Machine, b.Machine) })
	if len(burnt) > 0 && ctx.Err() != nil {
		err = nil // what was struck is brought back first
	}
	return burnt, blow, err
}

// victims chooses among the machines that are named, run, and are in the Labfile.
func (s *session) victims(want *lab.Lab, o BurnOptions) ([]lab.Name, error) {
	names, err := s.choose(o.Machines)
	if err != nil {
		return nil, err
	}
	names = slices.DeleteFunc(slices.Clone(names), func(name lab.Name) bool {
		_, wanted := want.Machine(name)
		m := s.state.Machines[name]
		return !wanted || m.Phase != ledger.PhaseReady || !runs(m, s.observed[name])
	})
	if len(names) == 0 {
		return nil, ErrNothingToBurn
	}
	if o.Random > 0 && o.Random < len(names) {
		rand.Shuffle(len(names), func(i, j int) { names[i], names[j] = names[j], names[i] })
		names = names[:o.Random]
		slices.Sort(names)
	}
	return names, nil
}

// ErrNothingToBurn says that none of the machines is up.
var ErrNothingToBurn = errors.New("none of the machines is ready: there is nothing to burn")
