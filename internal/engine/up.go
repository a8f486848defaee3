// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
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
	_, p, _, err := s.plan(ctx, want, o, nil)
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
// the same name and address. The rest of the lab is brought up as by Up. Errors: ErrNoLab,
// and those of Up.
func (l *Lab) Rebuild(ctx context.Context, want *lab.Lab, o UpOptions) (plan.Plan, error) {
	if !l.book.Exists() {
		return plan.Plan{}, ErrNoLab
	}
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
	want, p, images, err := s.plan(ctx, want, o, rebuild)
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

// plan resolves the boxes and what else the Labfile leaves open, and compares. It
// returns what is wanted then, the plan, and what the machines are to be born from.
func (s *session) plan(ctx context.Context, want *lab.Lab, o UpOptions, rebuild []lab.Name) (*lab.Lab, plan.Plan, map[lab.Name]Image, error) {
	only, err := expand(o.Machines, want.Machines)
	if err != nil {
		return nil, plan.Plan{}, nil, err
	}
	if rebuild, err = expand(rebuild, want.Machines); err != nil {
		return nil, plan.Plan{}, nil, err
	}
	boxes, err := s.images(ctx, want, o)
	if err != nil {
		return nil, plan.Plan{}, nil, err
	}
	images, err := s.layered(want, boxes)
	if err != nil {
		return nil, plan.Plan{}, nil, err
	}
	if want, err = booting(want); err != nil {
		return nil, plan.Plan{}, nil, err
	}
	if want, err = s.networked(ctx, want, images); err != nil {
		return nil, plan.Plan{}, nil, err
	}
	in := s.input(want, images)
	in.Only, in.Rebuild = only, rebuild
	p := plan.Make(in)
	if err := s.preflight(ctx, want, p, images); err != nil {
		return nil, plan.Plan{}, nil, err
	}
	for i, step := range p.Steps {
		if why := s.undone[step.Machine]; why != "" && !s.locked() { // else somebody is at it
			p.Steps[i].Undone = why
		}
	}
	return want, p, images, nil
}

// outcome is how a step ended, for those that wait for it.
type outcome struct {
	done chan struct{}
	ok   bool
}

// apply carries the plan out: every step in its own goroutine, behind those that
// destroy and those that it depends on.
func (s *session) apply(ctx context.Context, want *lab.Lab, p plan.Plan, images map[lab.Name]Image) error {
	if err := s.reach(ctx, p); err != nil {
		return err
	}
	s.machines = want.Machines
	before := s.state.Opened.Expose
	if err := s.open(want); err != nil {
		return err
	}
	s.renumber = s.whole(p)
	proxies, err := s.proxies()
	if err != nil {
		return err
	}
	s.relays = proxies.Relays
	if err := s.expose(ctx, before); err != nil {
		return err
	}
	if err := s.assignAddresses(p, want); err != nil {
		return err
	}
	oven, err := s.prepare(ctx, want, p, images)
	if err != nil {
		sure, cancel := cleanup(ctx)
		defer cancel()
		return errors.Join(err, s.closeIfEmpty(sure))
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
	return s.endRelays(ctx)
}

// prepare keeps the scripts and makes the networks that the plan needs, and starts to bake.
func (s *session) prepare(ctx context.Context, want *lab.Lab, p plan.Plan, images map[lab.Name]Image) (*oven, error) {
	if err := s.keepScripts(want, p); err != nil {
		return nil, err
	}
	if err := s.connect(ctx, want, p); err != nil {
		return nil, err
	}
	return s.bakes(ctx, want, p, images)
}

// reach finds out, before anything is changed, whether the provider's daemon is there
// to change it.
func (s *session) reach(ctx context.Context, p plan.Plan) error {
	a, ok := s.provider.(providers.Addressed)
	if !ok || p.Count(plan.Keep) == len(p.Steps) {
		return nil
	}
	return a.Reach(ctx)
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
		return s.endLeftovers(ctx, step, m)
	}
	if err := s.endLeftovers(ctx, step, m); err != nil {
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
	opening := ledger.State{Opened: ledger.Opened{InheritProxy: want.InheritProxy, Expose: ledger.ExposedOf(want.Expose)}}
	if _, err := s.Lab.proxies(opening, want.Machines, nil); err != nil {
		return err
	}
	if err := s.makeDirs(); err != nil {
		return err
	}
	if filepath.Dir(s.lock.file.Name()) != s.host.Dirs.RunLab(s.id) {
		// Another command began the same lab at the same time, with another runtime directory.
		return &LockedError{Lab: s.id}
	}
	opened := ledger.Opened{Name: want.Name, File: want.File, Provider: s.provider.Name(), Expires: want.Expires, Expose: ledger.ExposedOf(want.Expose), InheritProxy: want.InheritProxy}
	if s.baking != nil { // no guest is told
		opened.InheritProxy = s.state.Opened.InheritProxy
	}
	if a, ok := s.provider.(providers.Addressed); ok {
		opened.URI = a.URI()
	}
	opened.Folder = s.state.Opened.Folder
	if !s.asOf && want.File != "" {
		opened.Folder = folderOf(want.File)
	}
	if s.state.Opened.Equal(opened) {
		return nil
	}
	return s.record(ledger.LabOpened, lab.Generation{}, opened)
}

// since returns the time from the machine's birth.
func since(t time.Time) time.Duration { return time.Since(t).Round(time.Millisecond) }
