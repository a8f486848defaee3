// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/labfile/lab/internal/lab"
)

// Sentinel errors.
var (
	// ErrNoLab says that the lab does not exist: it was never up, or it was
	// destroyed.
	ErrNoLab = errors.New("there is no such lab")
	// ErrStaleLock says that the lock file does not pin what the Labfile names,
	// and --locked forbids to write it.
	ErrStaleLock = errors.New("the lock file is not up to date")
)

// LockedError says that another lab command works on the lab.
type LockedError struct {
	Lab     lab.ID
	PID     int
	Command string // what its user typed
	Since   time.Time
}

// Error implements error.
func (e *LockedError) Error() string {
	who := "another command"
	if e.Command != "" {
		who = fmt.Sprintf("%q (process %d, since %s)", e.Command, e.PID, e.Since.Local().Format("15:04:05"))
	}
	return fmt.Sprintf("lab %s is locked: %s works on it", e.Lab, who)
}

// NoMachineError says that a lab has no machine of that name.
type NoMachineError struct {
	Name  lab.Name
	Known []lab.Name
}

// Error implements error.
func (e *NoMachineError) Error() string { return fmt.Sprintf("there is no machine %q", e.Name) }

// UnaskedError says that a machine that was to shut down runs on: it could not be asked
// (then Err is providers.ErrUnasked), or the attempt failed.
type UnaskedError struct {
	Machine lab.Name
	Err     error  // why
	Command string // what ends the machine by force
}

// Error implements error.
func (e *UnaskedError) Error() string {
	return e.Err.Error() + "; it runs on"
}

// Unwrap returns the cause.
func (e *UnaskedError) Unwrap() error { return e.Err }

// Hint is the next step.
func (e *UnaskedError) Hint() string {
	return fmt.Sprintf("%q cuts its power: what it has not written to its disks is lost", e.Command)
}

// unseenError says that the provider does not tell whether a machine writes to a volume.
type unseenError struct {
	error
	command string // goes on without asking
}

func (e *unseenError) Unwrap() error { return e.error }

// Hint is the next step.
func (e *unseenError) Hint() string {
	return fmt.Sprintf("try again; or %q goes on without asking, and what the machine has not written to its volumes is lost", e.command)
}

// SeveralError says that a role stands for several machines where one is needed.
type SeveralError struct {
	Role     lab.Name
	Machines []lab.Name
}

// Error implements error.
func (e *SeveralError) Error() string {
	return fmt.Sprintf("%q is several machines: %s", e.Role, join(e.Machines))
}

// MachineError is what went wrong with one machine.
type MachineError struct {
	Machine    lab.Name
	Generation int // 0 if it did not come to one
	Stage      Stage
	Kept       bool // the generation still exists, for inspection
	Enterable  bool // that generation runs, and its on_shell lets people in
	Instead    int  // the generation that it did not take over from, which is the present one; 0 if there is none
	Down       bool // Instead does not run
	Err        error
}

// Error implements error.
func (e *MachineError) Error() string {
	if e.Stage == StageCheck && e.Instead == 0 {
		return fmt.Sprintf("%s is not ready: %v", e.Machine, e.Err)
	}
	return fmt.Sprintf("%s: %s", e.Machine, e.text())
}

// text is the error without the machine's name.
func (e *MachineError) text() string {
	switch {
	case e.Instead == 0:
		return e.Err.Error()
	case e.Generation == 0:
		return fmt.Sprintf("generation %d stays: %v", e.Instead, e.Err)
	}
	stays := "stays"
	if e.Down {
		stays = "is the present one, and does not run"
	}
	return fmt.Sprintf("generation %d did not take over, generation %d %s: %v", e.Generation, e.Instead, stays, e.Err)
}

// Unwrap returns the cause.
func (e *MachineError) Unwrap() error { return e.Err }

// UpError says which machines an operation could not bring about.
type UpError struct {
	Failed  []*MachineError
	Skipped []lab.Name // they depend on what failed
}

// orNil returns the error with its machines in order, or nil if nothing failed.
func (e *UpError) orNil() error {
	if len(e.Failed) == 0 {
		return nil
	}
	slices.SortFunc(e.Failed, func(a, b *MachineError) int { return compare(a.Machine, b.Machine) })
	return e
}

// Error implements error.
func (e *UpError) Error() string {
	var b strings.Builder
	for i, f := range e.Failed {
		if i > 0 {
			b.WriteString("; ")
		}
		b.WriteString(f.Error())
	}
	if len(e.Skipped) > 0 {
		fmt.Fprintf(&b, " (not tried: %s)", join(e.Skipped))
	}
	return b.String()
}

// Unwrap returns the causes.
func (e *UpError) Unwrap() []error {
	errs := make([]error, len(e.Failed))
	for i, f := range e.Failed {
		errs[i] = f
	}
	return errs
}

func join(names []lab.Name) string {
	words := make([]string, len(names))
	for i, n := range names {
		words[i] = string(n)
	}
	return strings.Join(words, ", ")
}
