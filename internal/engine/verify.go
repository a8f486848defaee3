// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/labfile/lab/internal/guest"
	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/verify"
)

// VerifyOptions are the options of Verify.
type VerifyOptions struct {
	Machines []lab.Name          // machines or roles; empty for all
	Progress func(verify.Result) // told each result; may be nil
	Events   func(Event)         // told of machines that do not answer; may be nil. One call of both at a time
}

// Verify carries out the checks of want or, if that is nil, those that were last
// recorded. It takes no lock and changes nothing. A check that does not pass is a
// result, and so is one of a machine that does not run.
//
// Errors: ErrNoLab, *NoMachineError, and ctx's cause.
func (l *Lab) Verify(ctx context.Context, want *lab.Lab, o VerifyOptions) (verify.Report, error) {
	if !l.book.Exists() {
		return verify.Report{}, ErrNoLab
	}
	state, err := l.read()
	if err != nil {
		return verify.Report{}, err
	}
	var machines []lab.Machine
	if want != nil {
		machines = want.Machines
	} else {
		for _, name := range state.Names() {
			machines = append(machines, state.Machines[name].Create.Spec.Machine(name))
		}
	}
	chosen, err := pick(machines, o.Machines)
	if err != nil {
		return verify.Report{}, err
	}
	s := &session{Lab: l, opt: Options{Events: o.Events}}
	if s.provider, err = l.host.Provider(state.Opened); err != nil {
		return verify.Report{}, err
	}
	var targets []verify.Target
	for _, m := range chosen {
		if len(m.Tests) == 0 {
			continue
		}
		g := lab.Generation{Lab: l.id, Machine: m.Name, Number: state.Machines[m.Name].Generation}
		attendant, leave := s.attend(ctx, g, Attention{Expected: true})
		defer leave()
		targets = append(targets, verify.Target{
			Machine: m.Name, Tests: m.Tests,
			Open: func(open context.Context) (guest.Target, error) {
				rec, err := l.running(open, m.Name)
				var none *NoMachineError
				if errors.As(err, &none) {
					return guest.Target{}, fmt.Errorf("%s is not up", m.Name)
				}
				if err != nil {
					return guest.Target{}, err
				}
				target, err := l.enterable(ctx, m.Name, rec.Create, "")
				return attendant.watched(ctx, target), err
			},
		})
	}
	progress := o.Progress
	if progress != nil { // never while Events is told something
		progress = func(r verify.Result) {
			s.mu.Lock()
			defer s.mu.Unlock()
			o.Progress(r)
		}
	}
	return verify.Run(ctx, targets, progress)
}

// pick returns the machines that names stand for, in their own order; all of them if
// there are no names.
func pick(machines []lab.Machine, names []lab.Name) ([]lab.Machine, error) {
	if len(names) == 0 {
		return machines, nil
	}
	chosen := make([]bool, len(machines))
	for _, name := range names {
		found := false
		for i, m := range machines {
			if m.Name == name || m.Role == string(name) {
				chosen[i], found = true, true
			}
		}
		if !found {
			var known []lab.Name
			for _, m := range machines {
				known = append(known, m.Name)
			}
			return nil, &NoMachineError{Name: name, Known: known}
		}
	}
	i := -1
	return slices.DeleteFunc(slices.Clone(machines), func(lab.Machine) bool {
		i++
		return !chosen[i]
	}), nil
}
