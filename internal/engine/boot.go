// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/labfile/lab/internal/bake"
	"github.com/labfile/lab/internal/fsutil"
	"github.com/labfile/lab/internal/guest"
	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/ledger"
	"github.com/labfile/lab/internal/plan"
)

// booting returns the lab with the digests of what its machines run at their first boot,
// scripts included. Errors: *bake.InputError.
func booting(want *lab.Lab) (*lab.Lab, error) {
	w := *want
	w.Machines = nil
	var errs []error
	for _, m := range want.Machines {
		steps, err := bake.BootSteps(filepath.Dir(want.File), m.Boot)
		if err != nil {
			errs = append(errs, fmt.Errorf("machine %q: %w", m.Name, err))
		}
		m.Boot = steps
		w.Machines = append(w.Machines, m)
	}
	return &w, errors.Join(errs...)
}

// scriptFile is where a lab keeps a script of a boot step.
func (l *Lab) scriptFile(digest string) string {
	return filepath.Join(l.host.Dirs.Boot(l.id), strings.TrimPrefix(digest, "sha256:"))
}

// scriptError says that a script is not the one that is wanted.
type scriptError struct{ generation int } // that was born with the one that is wanted, or 0

func (e *scriptError) Error() string {
	if e.generation == 0 {
		return "the script was changed while the plan was shown"
	}
	return fmt.Sprintf("the script is not the one that generation %d was born with, which the lab has lost", e.generation)
}

// Hint is the next step.
func (e *scriptError) Hint() string {
	if e.generation == 0 {
		return "run the command again, for a plan with the script as it is now"
	}
	return "\"lab up\" makes a generation with the script as it is now; or put the former script back"
}

// script returns the script of a machine's boot step, which is kept by the lab or else still
// the same in the Labfile's folder, dir. It is nil for a step that has none. Errors:
// *bake.InputError.
func (s *session) script(dir string, m lab.Name, b lab.BootStep) ([]byte, error) {
	if b.Script == "" {
		return nil, nil
	}
	kept, err := os.ReadFile(s.scriptFile(b.File))
	if err == nil && bake.ScriptDigest(kept) == b.File {
		return kept, nil
	}
	content, digest, err := bake.ReadScript(dir, b.Script)
	if err == nil && digest != b.File {
		err = &scriptError{s.bornWith(m, b.File)}
	}
	if err != nil {
		return nil, &bake.InputError{Key: "boot", Place: b.Place, Step: b.Provision, Err: err}
	}
	return content, nil
}

// bornWith returns the newest generation of a machine that has the script with a digest in
// its boot steps, or 0.
func (s *session) bornWith(name lab.Name, digest string) int {
	newest, m := 0, s.machine(name)
	for _, g := range append(slices.Clone(m.Past), m) {
		if slices.ContainsFunc(g.Create.Spec.Machine(name).Boot, func(b lab.BootStep) bool { return b.File == digest }) {
			newest = max(newest, g.Generation)
		}
	}
	return newest
}

// runnable says why a machine could not run its boot steps.
func (s *session) runnable(want *lab.Lab, m lab.Machine) error {
	for _, b := range m.Boot {
		if _, err := s.script(filepath.Dir(want.File), m.Name, b); err != nil {
			return err
		}
	}
	return nil
}

// keepScripts keeps the scripts that new generations of a plan run, for them and for later
// ones that are born like them when the Labfile's folder has others.
func (s *session) keepScripts(want *lab.Lab, p plan.Plan) error {
	for _, step := range p.Steps {
		m, ok := want.Machine(step.Machine)
		if !ok || step.Action != plan.Create && step.Action != plan.Replace {
			continue
		}
		for _, b := range m.Boot {
			if b.Script == "" {
				continue
			}
			content, err := s.script(filepath.Dir(want.File), m.Name, b)
			if err != nil {
				return fmt.Errorf("machine %q: %w", m.Name, err)
			}
			if err := s.keepScript(b.File, content); err != nil {
				return fmt.Errorf("keeping the script of a boot step: %w", err)
			}
		}
	}
	return nil
}

func (s *session) keepScript(digest string, content []byte) error {
	path := s.scriptFile(digest)
	if kept, err := os.ReadFile(path); err == nil && bake.ScriptDigest(kept) == digest {
		return nil
	} else if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	return fsutil.WriteFile(path, content, 0o600)
}

// bootSteps runs the boot steps of a newborn, and records that they have run. Any other
// generation has run them. Errors:
// *StepError, *bake.InputError, and those of logging in and of bake.Machine.Settle.
func (s *session) bootSteps(ctx context.Context, target guest.Target, l launch, c ledger.Create) error {
	steps := l.m.Boot
	if !l.newborn || len(steps) == 0 {
		return nil
	}
	scripts := make([][]byte, len(steps))
	for i, b := range steps { // all of them before the first runs: it can run only once
		var err error
		if scripts[i], err = s.script(filepath.Dir(s.state.Opened.File), l.Machine, b); err != nil {
			return err
		}
	}
	env := append(slices.Clone(target.Env),
		"LAB_NAME="+s.state.Opened.Name, "LAB_MACHINE="+string(l.Machine), "LAB_ROLE="+l.m.Role, fmt.Sprintf("LAB_GENERATION=%d", l.Number))
	target.Env, target.Unset = nil, nil // only the steps get them
	client, sudo, err := s.loginAsRoot(ctx, target, l.Generation, c, "its boot steps")
	if err != nil {
		return fmt.Errorf("logging in for the boot steps: %w", err)
	}
	defer client.Close()
	if err := s.tellProxies(ctx, l.Generation, c); err != nil { // services that a step starts need them, too
		return err
	}
	m := &bake.Machine{Guest: client, User: user(c), Sudo: sudo, Env: env}
	s.tellStep(l, "waiting until the guest has booted", 0)
	if err := m.Settle(ctx); err != nil {
		return err
	}
	began := time.Now()
	for i, b := range steps {
		if err := s.bootStep(ctx, m, l, i, scripts[i]); err != nil {
			return s.stepFailed(ctx, i, len(steps), b, err)
		}
	}
	return s.record(ledger.MachineBooted, l.Generation, ledger.Booted{
		Digest: lab.BootDigest(steps), Steps: len(steps), Took: since(began),
	})
}

// bootStep runs one step.
func (s *session) bootStep(ctx context.Context, m *bake.Machine, l launch, i int, script []byte) error {
	b, began := l.m.Boot[i], time.Now()
	text := fmt.Sprintf("boot step %d of %d: %s", i+1, len(l.m.Boot), b)
	s.tellStep(l, text, 0)
	if err := m.Boot(ctx, b, script, func(line string) { s.tellStep(l, line, 0) }); err != nil {
		return err
	}
	s.tellStep(l, "ran "+text, max(1, since(began)))
	return nil
}

func (s *session) tellStep(l launch, text string, took time.Duration) {
	s.emit(Event{Machine: l.Machine, Generation: l.Number, Stage: StageBootStep, Text: text, Took: took})
}

// lostTime is how long the end of a machine may take to be noticed, when what ran in it was
// ended.
const lostTime = 2 * time.Second

// stepFailed returns why step i of a number of boot steps failed.
func (s *session) stepFailed(ctx context.Context, i, of int, b lab.BootStep, err error) error {
	e := &StepError{Key: "boot", Place: b.Place, Step: i + 1, Of: of, Text: b.String(), Err: err}
	var f *bake.FailedError
	if errors.As(err, &f) {
		e.Code, e.Signal, e.Output = f.Code, f.Signal, f.Output
	}
	if errors.Is(err, guest.ErrDisconnected) || e.Signal != "" || e.Code > 128 {
		select { // it was ended, perhaps with the whole machine, which says more
		case <-ctx.Done():
		case <-time.After(lostTime):
		}
	}
	return e
}

// unlived returns err as that of a machine that ended: it keeps the step of err, if there is one.
func unlived(err error, end *endError) error {
	var step *StepError
	if !errors.As(err, &step) {
		return end
	}
	step.Err, step.Code, step.Signal = end, 0, "" // how the machine's end looked from the step
	return step
}

// bootFailed is what the ledger says of a boot step that failed; nil for any other error.
func bootFailed(err error) *ledger.BootFailed {
	var e *StepError
	if !errors.As(err, &e) || e.Key != "boot" {
		return nil
	}
	return &ledger.BootFailed{Step: e.Step, Of: e.Of, Text: e.Text, Place: e.Place, Code: e.Code, Signal: e.Signal}
}
