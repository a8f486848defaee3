// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/ledger"
	"github.com/labfile/lab/internal/supervise"
	"github.com/labfile/lab/internal/volume"
	"github.com/labfile/lab/providers"
)

// Destroy ends the machines and removes everything that belongs to them; without
// Options.Machines also the lab's keys, network and ledger. It works from the
// provider's truth, so a lost or damaged ledger does not stop it.
func (l *Lab) Destroy(ctx context.Context, o Options) error {
	lk, err := l.acquire(o.Command)
	if err != nil {
		return err
	}
	s := &session{Lab: l, opt: o, lock: lk, forced: "lab destroy --force"}
	if len(o.Machines) > 0 {
		s.forced = fmt.Sprintf("lab destroy %s --force", strings.ReplaceAll(join(o.Machines), ",", ""))
	}
	defer s.end()
	s.state, err = s.read()
	if err != nil {
		if len(o.Machines) > 0 {
			return err
		}
		// Whatever keeps the ledger from being read, the machines are the provider's.
		s.emit(Event{Stage: StageNote, Text: fmt.Sprintf("going on without the ledger: %v", err)})
	}
	found := l.book.Exists()
	var all []providers.Machine
	candidates, err := l.candidates(s.state.Opened)
	if err != nil {
		return err
	}
	for _, p := range candidates {
		seen, err := p.List(ctx, l.id)
		if err != nil {
			if !p.known {
				continue
			}
			err = fmt.Errorf("listing the machines of %s: %w", l.id, err)
			if at := placeOf(p.Provider); at != (volume.Place{}) && ctx.Err() == nil {
				err = &silentError{err, at, l.host.Dirs.Lab(l.id)}
			}
			return err
		}
		if len(seen) > 0 || p.own {
			s.provider, all = p.Provider, seen
			found = found || len(seen) > 0
		}
		if len(seen) > 0 {
			break
		}
	}
	if !found {
		if _, err := os.Stat(l.host.Dirs.Lab(l.id)); err != nil {
			_ = s.removeFiles(ctx) // the lock itself
			return ErrNoLab
		}
	}
	if s.provider == nil {
		if !found && len(o.Machines) == 0 { // volumes of a lab that was destroyed
			return s.removeFiles(ctx)
		}
		return &noProviderError{s.state.Opened.Provider}
	}
	if err := s.stillDue(ctx); err != nil {
		return err
	}
	if len(o.Machines) == 0 {
		return s.destroyAll(ctx, all)
	}
	names, err := s.choose(o.Machines)
	if err != nil {
		return err
	}
	var gone []ledger.Machine
	for _, name := range names {
		gone = append(gone, s.machine(name))
	}
	err = s.each(ctx, names, func(m ledger.Machine) error {
		for _, g := range generations(m, all) {
			if err := s.remove(ctx, g, []string{"you asked to destroy it"}); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	if o.Volumes {
		if err := s.removeVolumes(ctx, gone); err != nil {
			return err
		}
	}
	return s.closeIfEmpty(ctx)
}

// silentError says that a daemon of another host does not tell what machines a lab has.
type silentError struct {
	error
	at  volume.Place
	dir string
}

func (e *silentError) Unwrap() error { return e.error }

// Hint is the next step.
func (e *silentError) Hint() string {
	return fmt.Sprintf("\"lab doctor --provider %s --uri '%s'\" tells more; if that host is gone for good, \"rm -r '%s'\" has this one forget the lab, its volumes too",
		e.at.Provider, e.at.URI, e.dir)
}

// generations returns the recorded and the observed generations of a machine.
func generations(m ledger.Machine, all []providers.Machine) []lab.Generation {
	var gs []lab.Generation
	for _, g := range all {
		if g.Machine == m.Name {
			gs = append(gs, g.Generation)
		}
	}
	if len(gs) == 0 {
		gs = append(gs, lab.Generation{Machine: m.Name, Number: m.Generation})
	}
	return gs
}

// destroyAll removes the lab.
func (s *session) destroyAll(ctx context.Context, all []providers.Machine) error {
	if err := s.letAllGo(ctx, all); err != nil {
		return err
	}
	if s.book.Exists() {
		for _, g := range all {
			// The intent alone: the ledger itself goes at the end.
			if err := s.record(ledger.MachineDestroy, g.Generation, ledger.Destroy{Why: []string{"the lab is destroyed"}}); err != nil {
				s.host.Log.Debug("recording the end of a machine", "err", err)
			}
		}
	}
	err := together(ctx, all, func(m providers.Machine) error {
		began := time.Now()
		g := m.Generation
		s.emit(Event{Machine: g.Machine, Generation: g.Number, Stage: StageDestroy, Text: "destroying " + g.String()})
		if err := s.provider.Destroy(ctx, g); err != nil {
			return fmt.Errorf("destroying %s: %w", g, err)
		}
		s.emit(Event{Machine: g.Machine, Generation: g.Number, Stage: StageDestroyed, Text: "destroyed " + g.String(), Took: since(began)})
		return nil
	}, generationOf)
	if err != nil {
		return err
	}
	if err := supervise.Stop(ctx, s.host.Dirs, s.id); err != nil {
		return fmt.Errorf("stopping the lab's supervisor: %w", err)
	}
	if err := s.removeNetworks(ctx); err != nil {
		return err
	}
	return s.removeFiles(ctx)
}

func generationOf(m providers.Machine) lab.Generation { return m.Generation }

// failedAt is err as that of a machine, with its generation.
func failedAt(g lab.Generation, err error) *MachineError {
	var me *MachineError
	if errors.As(err, &me) {
		return me
	}
	return &MachineError{Machine: g.Machine, Generation: g.Number, Stage: StageFailed, Err: err}
}

// allAudible returns an *UnaskedError for each machine that writes to a volume and of which
// it is known beforehand that it cannot be asked to shut down.
func (s *session) allAudible(ctx context.Context, all []providers.Machine) error {
	if s.opt.Force {
		return nil
	}
	var failed UpError
	for _, m := range all {
		writes, err := s.writesVolume(ctx, m.Generation)
		if err == nil && writes {
			if _, err = s.audible(ctx, m.Generation); errors.Is(err, providers.ErrUnasked) {
				err = s.unasked(m.Generation, err)
			}
		}
		if err != nil {
			failed.Failed = append(failed.Failed, failedAt(m.Generation, err))
		}
	}
	return failed.orNil()
}

// letAllGo has machines that write to volumes shut down before anything is removed,
// unless the volumes go, too. Nothing is asked of any machine if one would run on.
func (s *session) letAllGo(ctx context.Context, all []providers.Machine) error {
	if s.opt.Volumes {
		return nil
	}
	if err := s.allAudible(ctx, all); err != nil {
		return err
	}
	return together(ctx, all, func(m providers.Machine) error { return s.letGoRecorded(ctx, m.Generation) }, generationOf)
}

// removeFiles removes the lab's files; the ledger last, so that a lab that is
// half removed is still found.
func (s *session) removeFiles(ctx context.Context) error {
	d := s.host.Dirs
	kept, err := s.volumes().Names()
	if err != nil {
		return err
	}
	if s.opt.Volumes {
		for _, name := range kept {
			if err := s.volumes().Remove(ctx, name); err != nil {
				return err
			}
		}
		kept = nil
	}
	if err := s.tidy(ctx); err != nil {
		return err
	}
	paths := []string{d.SSHConfig(s.id), d.Machines(s.id), d.Keys(s.id)}
	if len(kept) == 0 {
		paths = append(paths, d.Lab(s.id))
	} else {
		if o, ok, err := s.origin(); err == nil && ok {
			if err := s.writeOrigin(o); err != nil {
				return fmt.Errorf("removing the lab's files: %w", err)
			}
		}
		others, err := s.besidesVolumes()
		if err != nil {
			return fmt.Errorf("removing the lab's files: %w", err)
		}
		paths = append(paths, others...)
	}
	for _, path := range append(paths, d.RunLab(s.id)) {
		if err := os.RemoveAll(path); err != nil {
			return fmt.Errorf("removing the lab's files: %w", err)
		}
	}
	if len(kept) > 0 && !s.fresh {
		s.emit(Event{Stage: StageNote, Text: fmt.Sprintf("its volumes are kept, for the next \"lab up\": %s (\"lab destroy --volumes\" removes them)", strings.Join(kept, ", "))})
	}
	return nil
}

// tidy removes what commands that were killed left of volumes elsewhere. Without a ledger
// it may be the descriptions that are lost, and not the data.
func (s *session) tidy(ctx context.Context) error {
	if s.provider == nil || !s.book.Exists() {
		return nil
	}
	at := placeOf(s.provider)
	if at == (volume.Place{}) {
		return nil
	}
	err := s.volumes().Tidy(ctx, at)
	if errors.Is(err, providers.ErrIncapable) { // the pool is gone, and nobody is helped by keeping the lab
		s.emit(Event{Stage: StageNote, Text: "what may be left of volumes was not looked for: " + err.Error()})
		return nil
	}
	return err
}

// closeIfEmpty ends the supervisor of a lab whose last machine is gone, and
// removes a lab that this session began.
func (s *session) closeIfEmpty(ctx context.Context) error {
	if len(s.state.Names()) > 0 {
		return nil
	}
	if err := supervise.Stop(ctx, s.host.Dirs, s.id); err != nil {
		return fmt.Errorf("stopping the lab's supervisor: %w", err)
	}
	if !s.fresh {
		return nil
	}
	for _, name := range s.made {
		if err := s.volumes().Remove(ctx, name); err != nil {
			return err
		}
	}
	if err := s.removeNetworks(ctx); err != nil {
		return err
	}
	return s.removeFiles(ctx)
}

// remove destroys one generation and records it.
func (s *session) remove(ctx context.Context, g lab.Generation, why []string) error {
	g.Lab = s.id
	began := time.Now()
	if err := s.letGoRecorded(ctx, g); err != nil { // before the intent, for it may stay
		return failedAt(g, err)
	}
	if err := s.record(ledger.MachineDestroy, g, ledger.Destroy{Why: why}); err != nil {
		return err
	}
	s.emit(Event{Machine: g.Machine, Generation: g.Number, Stage: StageDestroy, Text: "destroying " + g.String()})
	if err := s.unplug(ctx, g); err != nil {
		return err
	}
	if err := s.provider.Destroy(ctx, g); err != nil {
		return fmt.Errorf("destroying %s: %w", g, err)
	}
	if err := os.Remove(s.host.Dirs.Files(g)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("destroying %s: %w", g, err)
	}
	if err := s.record(ledger.MachineDestroyed, g, nil); err != nil {
		return err
	}
	s.emit(Event{Machine: g.Machine, Generation: g.Number, Stage: StageDestroyed, Text: "destroyed " + g.String(), Took: since(began)})
	return nil
}

// unplug takes the machine off the network, if there is a supervisor to do it.
func (s *session) unplug(ctx context.Context, g lab.Generation) error {
	c, err := supervise.Dial(ctx, s.host.Dirs, s.id)
	if errors.Is(err, supervise.ErrNotRunning) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("unplugging %s: %w", g, err)
	}
	defer c.Close()
	return c.Unplug(ctx, g)
}
