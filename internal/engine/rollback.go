// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"cmp"
	"context"
	"fmt"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/opencontainers/go-digest"

	"github.com/labfile/lab/boxes/source"
	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/ledger"
	"github.com/labfile/lab/internal/plan"
)

// NoGenerationError says that a machine has no such generation, or none that can be
// gone back to.
type NoGenerationError struct {
	Machine lab.Name
	Number  int   // 0 if any would have done
	Known   []int // those that would do, ascending

	only int  // the only one that there ever was; 0 if there were more
	disk bool // it is about the disks that are kept
}

// Error implements error.
func (e *NoGenerationError) Error() string {
	switch {
	case e.Number == 0:
		return fmt.Sprintf("%s has no earlier generation that was ready", e.Machine)
	case e.disk:
		return fmt.Sprintf("%s has no disk of generation %d; it has that of %s", e.Machine, e.Number, numbers(e.Known))
	case e.only != 0:
		return fmt.Sprintf("%s has no generation %d; there is only generation %d", e.Machine, e.Number, e.only)
	case len(e.Known) == 0:
		return fmt.Sprintf("%s has no generation %d", e.Machine, e.Number)
	}
	return fmt.Sprintf("%s has no generation %d; it has %s", e.Machine, e.Number, numbers(e.Known))
}

// Hint is the next step.
func (e *NoGenerationError) Hint() string {
	return fmt.Sprintf("\"lab history %s\" shows the generations there were", e.Machine)
}

// numbers writes numbers for a sentence: "1", "1 and 2", "1, 2 and 3".
func numbers(all []int) string {
	words := make([]string, len(all))
	for i, n := range all {
		words[i] = strconv.Itoa(n)
	}
	last := len(words) - 1
	if last < 1 {
		return strings.Join(words, "")
	}
	return strings.Join(words[:last], ", ") + " and " + words[last]
}

// Generations returns every generation that the machine ever had, oldest first,
// or those of all machines if name is empty. Errors: ErrNoLab, *NoMachineError.
func (l *Lab) Generations(name lab.Name) ([]ledger.Generation, error) {
	records, err := l.History()
	if err != nil {
		return nil, err
	}
	all, err := ledger.Generations(records, name)
	if err != nil || name == "" || len(all) > 0 {
		return all, err
	}
	state, err := ledger.Fold(records)
	if err != nil {
		return nil, err
	}
	return nil, &NoMachineError{Name: name, Known: state.Names()}
}

// Generation returns one generation of a machine: number, or the newest one if that
// is 0. Errors: ErrNoLab, *NoMachineError, *NoGenerationError.
func (l *Lab) Generation(name lab.Name, number int) (ledger.Generation, error) {
	all, err := l.Generations(name)
	if err != nil {
		return ledger.Generation{}, err
	}
	if number == 0 {
		state, err := l.read()
		if err != nil {
			return ledger.Generation{}, err
		}
		number = state.Machines[name].Generation
	}
	e := &NoGenerationError{Machine: name, Number: number}
	for _, g := range all {
		if g.Number == number {
			return g, nil
		}
		e.Known = append(e.Known, g.Number)
	}
	return ledger.Generation{}, e
}

// Rollback goes back to the image and the specification of an earlier generation
// of a machine, as a new generation: number to or, if that is 0, the newest one
// before the present that was ever ready. No Labfile is needed. What a generation
// wrote to its disk does not come back.
//
// Errors: ErrNoLab, *NoMachineError, *NoGenerationError, and those of Up.
func (l *Lab) Rollback(ctx context.Context, name lab.Name, to int, o Options) (plan.Plan, error) {
	s, err := l.begin(ctx, nil, o)
	if err != nil {
		return plan.Plan{}, err
	}
	defer s.end()
	if names, err := s.choose([]lab.Name{name}); err != nil {
		return plan.Plan{}, err
	} else if len(names) != 1 || names[0] != name {
		return plan.Plan{}, &NoMachineError{Name: name, Known: names}
	}
	target, err := s.earlier(name, to)
	if err != nil {
		return plan.Plan{}, err
	}
	c := target.Create()
	img, err := s.imageOf(ctx, c)
	if err != nil {
		return plan.Plan{}, fmt.Errorf("going back to %s: %w", target, err)
	}
	want := s.asRecorded()
	for i, m := range want.Machines {
		if m.Name == name {
			want.Machines[i] = c.Spec.Machine(name)
		}
	}
	in := s.input(want, nil)
	in.Only, in.Rebuild = []lab.Name{name}, []lab.Name{name}
	in.Why = fmt.Sprintf("you asked to go back to generation %d", target.Number)
	p := plan.Make(in)
	p.Steps = slices.DeleteFunc(p.Steps, func(step plan.Step) bool { return step.Machine != name })
	images := map[lab.Name]Image{name: img}
	if err := s.preflightRecorded(ctx, want, p, images); err != nil {
		return plan.Plan{}, fmt.Errorf("going back to %s: %w", target, err)
	}
	if o.Confirm != nil {
		if err := o.Confirm(p); err != nil {
			return p, err
		}
	}
	s.rollback = target.Number
	if target.Rollback != 0 {
		s.rollback = target.Rollback // that is where the image and the specification are from
	}
	return p, s.apply(ctx, want, p, images)
}

// earlier returns the generation to go back to.
func (s *session) earlier(name lab.Name, to int) (ledger.Generation, error) {
	all, err := s.Generations(name)
	if err != nil {
		return ledger.Generation{}, err
	}
	present := s.machine(name).Generation
	e := &NoGenerationError{Machine: name, Number: to}
	for _, g := range slices.Backward(all) {
		switch {
		case g.Number == to:
			return g, nil
		case g.Number >= present || g.Born == nil:
			continue
		case to == 0:
			return g, nil
		}
		e.Known = append(e.Known, g.Number)
	}
	if len(all) == 1 && to != 0 {
		e.only = all[0].Number
	}
	slices.Sort(e.Known)
	return ledger.Generation{}, e
}

// imageOf finds again what a generation was born from: in the store, or else where
// it came from, as long as the digest is the same.
func (s *session) imageOf(ctx context.Context, c ledger.Create) (Image, error) {
	box := cmp.Or(c.Box, c.Image)
	res, err := s.host.Boxes.Resolve(ctx, source.Request{
		Ref: c.From, Pin: digest.Digest(box), BaseDir: filepath.Dir(s.state.Opened.File),
		Progress: func(text string, done, total int64) {
			s.emit(Event{Box: c.Spec.Box, Stage: StageBox, Text: text, Done: done, Total: total})
		},
	})
	if err != nil {
		return Image{}, fmt.Errorf("its box %s: %w", ledger.Short(box), err)
	}
	return s.host.stored(imageFrom(res, c.From), c.Layers)
}
