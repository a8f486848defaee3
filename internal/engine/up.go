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
	"github.com/labfile/lab/providers"
)

// Plan says what Up would do. It fetches boxes that are not pinned yet, since
// what they are is part of the answer, and changes nothing else.
func (l *Lab) Plan(ctx context.Context, want *lab.Lab, o UpOptions) (plan.Plan, error) {
	s := &session{Lab: l, opt: o.Options}
	if err := s.look(ctx, want); err != nil {
		return plan.Plan{}, err
	}
	p, _, err := s.plan(ctx, want, o, nil)
	return p, err
}

// Up makes the lab what want says: machines that are missing are created, those
// that are stopped are started, those that differ are replaced, and all are
// waited for until they are ready. Carrying it out twice changes nothing the
// second time. If ctx ends, what this call gave birth to is destroyed again.
//
// Errors: *LockedError, *UpError, ErrStaleLock, what Options.Confirm returned,
// and those of fetching boxes.
func (l *Lab) Up(ctx context.Context, want *lab.Lab, o UpOptions) (plan.Plan, error) {
	return l.up(ctx, want, o, nil)
}

// Rebuild replaces the named machines, or all, by new generations: a new disk,
// the same name and address. The rest of the lab is brought up as by Up.
func (l *Lab) Rebuild(ctx context.Context, want *lab.Lab, o UpOptions) (plan.Plan, error) {
	rebuild := o.Machines
	if len(rebuild) == 0 {
		for _, m := range want.Machines {
			rebuild = append(rebuild, m.Name)
		}
	}
	return l.up(ctx, want, o, rebuild)
}

func (l *Lab) up(ctx context.Context, want *lab.Lab, o UpOptions, rebuild []lab.Name) (plan.Plan, error) {
	s, err := l.begin(ctx, want, o.Options)
	if err != nil {
		return plan.Plan{}, err
	}
	defer s.end()
	p, images, err := s.plan(ctx, want, o, rebuild)
	if err != nil {
		return p, err
	}
	if o.Exactly != nil {
		if err := o.Exactly.holds(l.id, want, images, p); err != nil {
			return p, err
		}
	}
	if o.Confirm != nil {
		if err := o.Confirm(p); err != nil {
			return p, err
		}
	}
	s.writeLock(want)
	return p, s.apply(ctx, want, p, images)
}

// plan resolves the boxes and compares.
func (s *session) plan(ctx context.Context, want *lab.Lab, o UpOptions, rebuild []lab.Name) (plan.Plan, map[lab.Name]Image, error) {
	only, err := expand(o.Machines, want.Machines)
	if err != nil {
		return plan.Plan{}, nil, err
	}
	if rebuild, err = expand(rebuild, want.Machines); err != nil {
		return plan.Plan{}, nil, err
	}
	boxes, err := s.images(ctx, want, o)
	if err != nil {
		return plan.Plan{}, nil, err
	}
	images, err := s.layered(want, boxes)
	if err != nil {
		return plan.Plan{}, nil, err
	}
	if err := fits(want, images); err != nil {
		return plan.Plan{}, nil, err
	}
	if err := s.storable(want); err != nil {
		return plan.Plan{}, nil, err
	}
	in := s.input(want, images)
	in.Only, in.Rebuild = only, rebuild
	return plan.Make(in), images, nil
}

// fits checks what can be known of machines only together with their boxes, before
// anything is changed.
func fits(want *lab.Lab, images map[lab.Name]Image) error {
	var errs []error
	for _, m := range want.Machines {
		img, ok := images[m.Name]
		switch {
		case !ok:
		case m.Disk != 0 && m.Disk < img.Size:
			errs = append(errs, fmt.Errorf("machine %q: a disk of %s is smaller than the %s of its box; ask for more, or leave it out", m.Name, m.Disk, img.Size))
		case m.UserData != "" && !img.CloudInit:
			errs = append(errs, fmt.Errorf("machine %q: user_data needs cloud-init, which box %s does not have", m.Name, m.Box))
		case m.Memory < img.MinMemory:
			errs = append(errs, fmt.Errorf("machine %q: %s of memory are below the %s that box %s needs", m.Name, m.Memory, img.MinMemory, m.Box))
		}
	}
	return errors.Join(errs...)
}

// input gathers what a plan is made from.
func (s *session) input(want *lab.Lab, images map[lab.Name]Image) plan.Input {
	in := plan.Input{
		Lab: s.id, Want: want, Images: map[lab.Name]plan.Image{},
		Recorded: map[lab.Name]plan.Recorded{}, Observed: map[lab.Name][]plan.Observed{},
	}
	for name, img := range images {
		in.Images[name] = plan.Image{Digest: img.Digest, Box: img.Box, Layers: img.Layers, Missing: img.Missing}
	}
	for name, m := range s.state.Machines {
		in.Recorded[name] = recorded(m, s.observed[name])
		if w, ok := want.Machine(name); ok && images != nil { // who asks for no images wants what there is
			rec := in.Recorded[name]
			rec.Tainted, rec.Expired = m.Tainted, overdue(m, w.MaxAge, time.Now())
			in.Recorded[name] = rec
		}
	}
	for name, seen := range s.observed {
		for _, g := range seen {
			in.Observed[name] = append(in.Observed[name], plan.Observed{Number: g.Number, State: planState(g.State)})
		}
	}
	return in
}

// expand returns the machines that names stand for: a machine, or all replicas
// of a role. A name that is neither gives a *NoMachineError.
func expand(names []lab.Name, machines []lab.Machine) ([]lab.Name, error) {
	var expanded []lab.Name
	for _, name := range names {
		found := false
		for _, m := range machines {
			if (m.Name == name || m.Role == string(name)) && !slices.Contains(expanded, m.Name) {
				expanded = append(expanded, m.Name)
			}
			found = found || m.Name == name || m.Role == string(name)
		}
		if !found {
			e := &NoMachineError{Name: name}
			for _, m := range machines {
				e.Known = append(e.Known, m.Name)
			}
			return nil, e
		}
	}
	return expanded, nil
}

func planState(s providers.State) plan.State {
	switch s {
	case providers.StateRunning:
		return plan.Running
	case providers.StateBroken:
		return plan.Broken
	}
	return plan.Stopped
}

// recorded translates what the ledger says into the planner's words.
func recorded(m ledger.Machine, seen []providers.Machine) plan.Recorded {
	r := plan.Recorded{
		Spec: m.Create.Spec.Machine(m.Name), Generation: m.Generation, Last: m.Last,
		Image: m.Create.Image, Box: m.Create.Box, Layers: m.Create.Layers,
		Trouble: exitText(m.Exited), Rollback: m.Create.Rollback,
	}
	switch m.Phase {
	case ledger.PhaseCreating:
		r.Phase = plan.PhaseUnfinished
	case ledger.PhaseFailed:
		r.Phase, r.Trouble = plan.PhaseFailed, m.Failed.Error
		if !m.Ready.IsZero() { // it failed to start again; its disk is worth another try
			r.Phase = plan.PhaseLived
		}
	case ledger.PhaseDestroying:
		r.Phase = plan.PhaseDestroying
	case ledger.PhaseGone:
		r.Phase = plan.PhaseGone
	default:
		r.Phase = plan.PhaseLived
	}
	for _, p := range m.Past {
		switch {
		case p.Retired && p.Phase == ledger.PhaseRetired:
			r.Retired = append(r.Retired, p.Generation)
		case p.Retired && p.Phase == ledger.PhaseFailed && p.Generation > m.Generation:
			r.Failed = append(r.Failed, p.Generation)
		}
	}
	r.Stopped = m.Phase == ledger.PhaseStopped || m.Phase == ledger.PhaseStopping
	r.Stopping = m.Phase == ledger.PhaseStopping
	for _, g := range seen {
		if g.Number == m.Generation && g.State == providers.StatePaused {
			r.Trouble, r.Stopped = pausedText(g), false
		}
	}
	for _, g := range seen { // an exit that no supervisor lived to record
		if g.Number == m.Generation && r.Trouble == "" && g.State == providers.StateStopped && !r.Stopped {
			r.Trouble = exitText(ledger.Exited{Reason: string(g.Exit.Reason), Detail: g.Exit.Detail})
		}
	}
	return r
}

// pausedText says why a machine's processors are halted.
func pausedText(m providers.Machine) string {
	if m.Reason == "" {
		return "it is paused"
	}
	return "it is paused: " + m.Reason
}

// exitText says in the user's words how a machine ended.
func exitText(e ledger.Exited) string {
	text := map[providers.ExitReason]string{
		providers.ExitGuest:    "the guest shut itself down",
		providers.ExitPanic:    "the guest's kernel panicked",
		providers.ExitHost:     "it was stopped",
		providers.ExitCrashed:  "the hypervisor failed",
		providers.ExitSignaled: "its process was killed from outside",
	}[providers.ExitReason(e.Reason)]
	if text != "" && e.Detail != "" {
		text += " (" + e.Detail + ")"
	}
	return text
}

// outcome is how a step ended, for those that wait for it.
type outcome struct {
	done chan struct{}
	ok   bool
}

// apply carries the plan out: every step in its own goroutine, behind those that
// destroy and those that it depends on.
func (s *session) apply(ctx context.Context, want *lab.Lab, p plan.Plan, images map[lab.Name]Image) error {
	if err := s.open(want); err != nil {
		return err
	}
	if err := s.assignAddresses(p, want); err != nil {
		return err
	}
	var (
		wg      sync.WaitGroup
		mu      sync.Mutex
		failed  UpError
		born    []birth
		results = map[lab.Name]*outcome{}
		slots   = make(chan struct{}, s.parallel(len(p.Steps)))
		places  = rolls(p, want)
	)
	oven, err := s.bakes(ctx, want, p, images)
	if err != nil {
		return err
	}
	for _, step := range p.Steps {
		results[step.Machine] = &outcome{done: make(chan struct{})}
	}
	// The supervisor starts while the first machine is made; whoever needs it
	// waits for it, and reports why there is none.
	wg.Add(1)
	go func() {
		defer wg.Done()
		_, _ = s.supervisor(ctx)
	}()
	for _, step := range p.Steps {
		wg.Add(1)
		go func() {
			defer wg.Done()
			res := results[step.Machine]
			defer close(res.done)
			rolling := places[step.Machine]
			defer func() { rolling.end(res.ok) }()
			if step.Action != plan.Destroy { // what goes gives up its host ports and its memory
				for _, gone := range p.Steps {
					if gone.Action == plan.Destroy {
						<-results[gone.Machine].done
					}
				}
			}
			why := ""
			if !await(ctx, step, results) && !s.untouched(step) {
				why = "what it depends on failed"
			} else if !rolling.turn(ctx) {
				why = "a replica before it failed"
			}
			if why != "" {
				if ctx.Err() == nil {
					mu.Lock()
					failed.Skipped = append(failed.Skipped, step.Machine)
					mu.Unlock()
					s.emit(Event{Machine: step.Machine, Stage: StageSkipped, Text: "not tried: " + why})
				}
				return
			}
			img, err := oven.baked(ctx, step)
			slots <- struct{}{}
			defer func() { <-slots }()
			if ctx.Err() != nil {
				return
			}
			m, _ := want.Machine(step.Machine)
			if err != nil && s.restorable(s.machine(step.Machine)) {
				err = &MachineError{Machine: step.Machine, Instead: step.Generation, Stage: StageFailed, Err: err}
			} else if err == nil {
				err = s.step(ctx, step, m, img, func(b birth) {
					mu.Lock()
					born = append(born, b)
					mu.Unlock()
				})
			}
			if err == nil {
				mu.Lock() // what it took the place of is gone: there is no way back
				born = slices.DeleteFunc(born, func(b birth) bool { return b.Machine == step.Machine && b.instead != nil })
				mu.Unlock()
				res.ok = true
				return
			}
			if interrupted(ctx, err) {
				return
			}
			mu.Lock()
			defer mu.Unlock()
			var me *MachineError
			if !errors.As(err, &me) {
				me = &MachineError{Machine: step.Machine, Generation: step.Next, Stage: StageFailed, Err: err}
			}
			failed.Failed = append(failed.Failed, me)
			if me.Instead != 0 { // that is settled, whatever comes
				born = slices.DeleteFunc(born, func(b birth) bool { return b.Machine == step.Machine })
			}
			s.emit(Event{Machine: step.Machine, Generation: me.Generation, Stage: StageFailed, Text: me.text(), Err: me.Err})
		}()
	}
	wg.Wait()
	oven.wg.Wait()
	if err := ctx.Err(); err != nil {
		return errors.Join(err, s.undo(ctx, born, "interrupted"))
	}
	if len(failed.Failed) > 0 {
		var err error
		if gone := failed.incapable(born); len(gone) > 0 {
			err = s.undo(ctx, gone, "this host cannot run it")
		}
		slices.SortFunc(failed.Failed, func(a, b *MachineError) int { return compare(a.Machine, b.Machine) })
		slices.Sort(failed.Skipped)
		if err != nil {
			return errors.Join(&failed, err)
		}
		return &failed
	}
	return nil
}

// untouched reports whether a step leaves alone a machine that is ready, so that what
// happens to others does not matter to it.
func (s *session) untouched(step plan.Step) bool {
	return step.Action == plan.Keep && len(step.Changes) == 0 && s.machine(step.Machine).Phase == ledger.PhaseReady
}

// incapable returns those of the generations that failed because the host lacks
// something: there is nothing in them to look at. They are no longer kept.
func (e *UpError) incapable(born []birth) []birth {
	var gone []birth
	for _, f := range e.Failed {
		i := slices.IndexFunc(born, func(b birth) bool { return b.Machine == f.Machine && b.Number == f.Generation })
		if i >= 0 && errors.Is(f.Err, providers.ErrIncapable) {
			f.Kept = false
			gone = append(gone, born[i])
		}
	}
	return gone
}

func compare(a, b lab.Name) int {
	if a < b {
		return -1
	}
	return 1
}

// await waits for what the step depends on, and reports whether all of it is
// ready.
func await(ctx context.Context, step plan.Step, results map[lab.Name]*outcome) bool {
	for _, dep := range step.DependsOn {
		res, ok := results[dep]
		if !ok {
			continue
		}
		select {
		case <-res.done:
			if !res.ok {
				return false
			}
		case <-ctx.Done():
			return false
		}
	}
	return ctx.Err() == nil
}

func (s *session) parallel(steps int) int {
	if n := s.host.Parallel; n > 0 {
		return n
	}
	return max(1, steps)
}

// step carries one step out. born is told of every generation before it exists.
func (s *session) step(ctx context.Context, step plan.Step, m lab.Machine, img Image, born func(birth)) error {
	if step.Action == plan.Replace {
		return s.replace(ctx, step, m, img, born)
	}
	g := lab.Generation{Lab: s.id, Machine: step.Machine, Number: step.Generation}
	if step.Action == plan.Keep {
		// First, for the supervisor may still lead to the generation before, if
		// lab was killed while this one took over.
		if err := s.keep(ctx, g, m, step); err != nil {
			return err
		}
		return s.removeLeftovers(ctx, step)
	}
	if err := s.removeLeftovers(ctx, step); err != nil {
		return err
	}
	switch step.Action {
	case plan.Start:
		return s.start(ctx, g, m, step.Changes)
	case plan.Create:
		g.Number = step.Next
		return s.birth(ctx, launch{Generation: g, m: m, newborn: true}, img, step.Reasons, func() { born(birth{Generation: g}) })
	case plan.Destroy:
		if rec := s.machine(g.Machine); rec.Phase != "" && rec.Phase != ledger.PhaseGone {
			return s.remove(ctx, g, step.Reasons)
		}
		return nil
	}
	return fmt.Errorf("unknown action %q", step.Action)
}

// open makes the lab's directory and records where the lab comes from, unless
// the ledger says so already.
func (s *session) open(want *lab.Lab) error {
	if err := s.makeDirs(); err != nil {
		return err
	}
	opened := ledger.Opened{Name: want.Name, File: want.File, Provider: s.provider.Name(), Expires: want.Expires}
	if a, ok := s.provider.(providers.Addressed); ok {
		opened.URI = a.URI()
	}
	if s.state.Opened == opened {
		return nil
	}
	return s.record(ledger.LabOpened, lab.Generation{}, opened)
}

// since returns the time from the machine's birth.
func since(t time.Time) time.Duration { return time.Since(t).Round(time.Millisecond) }
