// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"fmt"
	"os"
	osuser "os/user"
	"strconv"
	"time"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/ledger"
)

// Entry is a machine being entered by hand.
type Entry struct {
	Machine    lab.Name
	Generation int
	Policy     lab.Shell
	Tainted    bool // this tainted the generation
}

// ForbiddenError says that a machine's policy forbids to enter it by hand.
type ForbiddenError struct {
	Machine lab.Name
	How     string // "ssh", "exec", "cp" or "console"
}

// Error implements error.
func (e *ForbiddenError) Error() string {
	return fmt.Sprintf("machine %q: its Labfile forbids %s (on_shell: forbid)", e.Machine, e.How)
}

// Hint is the next step.
func (e *ForbiddenError) Hint() string {
	return fmt.Sprintf("change what it is made from, then \"lab up\"; \"lab logs %s\" shows what it says", e.Machine)
}

// Admit reports whether a machine may be entered by hand, without saying that it
// was. Errors: ErrNoLab, *NoMachineError, *ForbiddenError.
func (l *Lab) Admit(name lab.Name, how string) error {
	_, err := l.admit(name, how)
	return err
}

func (l *Lab) admit(name lab.Name, how string) (ledger.Machine, error) {
	m, _, err := l.known(name)
	if err != nil {
		return m, err
	}
	if m.Create.Spec.OnShell == lab.ShellForbid {
		return m, &ForbiddenError{Machine: name, How: how}
	}
	return m, nil
}

// Enter records that the machine is about to be entered by hand, and does what its
// policy says. how is "ssh", "exec", "cp" or "console"; command is what is run, or
// nothing for a shell. It takes no lock, so it never waits for a command that
// changes the lab.
//
// Errors: ErrNoLab, *NoMachineError, *ForbiddenError.
func (l *Lab) Enter(ctx context.Context, name lab.Name, how string, command []string) (Entry, error) {
	m, err := l.admit(name, how)
	if err != nil {
		return Entry{}, err
	}
	if err := ctx.Err(); err != nil {
		return Entry{}, err
	}
	e := Entry{Machine: name, Generation: m.Generation, Policy: m.Create.Spec.OnShell}
	if e.Policy == "" {
		e.Policy = lab.ShellAllow
	}
	data := ledger.Entered{Kind: how, User: person(), Command: command}
	if err := l.note(ledger.MachineEntered, m, "", data); err != nil {
		return e, err
	}
	if e.Policy == lab.ShellTaint && len(m.Tainted) == 0 { // once is enough
		e.Tainted = true
		return e, l.note(ledger.MachineTainted, m, "", ledger.Tainted{Why: data.String()})
	}
	return e, nil
}

// Taint marks the present generation of the machines as one that the next Up
// replaces. It takes no lock. Errors: ErrNoLab, *NoMachineError.
func (l *Lab) Taint(ctx context.Context, names []lab.Name, why string, o Options) error {
	if why == "" {
		why = "by " + person()
	}
	return l.mark(ctx, names, o, func(m ledger.Machine) error {
		return l.note(ledger.MachineTainted, m, o.Command, ledger.Tainted{Why: why})
	})
}

// Untaint takes every taint off the present generation of the machines. Untainting
// what is not tainted succeeds. Errors: as Taint.
func (l *Lab) Untaint(ctx context.Context, names []lab.Name, why string, o Options) error {
	if why == "" {
		why = "by " + person()
	}
	return l.mark(ctx, names, o, func(m ledger.Machine) error {
		if len(m.Tainted) == 0 {
			return nil
		}
		return l.note(ledger.MachineUntainted, m, o.Command, ledger.Tainted{Why: why})
	})
}

// Tainted returns the machines whose present generation is tainted; none if the ledger
// cannot be read.
func (l *Lab) Tainted() map[lab.Name]bool {
	tainted := map[lab.Name]bool{}
	state, err := l.read()
	if err != nil {
		return tainted
	}
	for name, m := range state.Machines {
		tainted[name] = len(m.Tainted) > 0
	}
	return tainted
}

func (l *Lab) mark(ctx context.Context, names []lab.Name, o Options, each func(ledger.Machine) error) error {
	state, err := l.read()
	if err != nil {
		return err
	}
	if names, err = (&session{Lab: l, state: state}).choose(names); err != nil {
		return err
	}
	for _, name := range names {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := each(state.Machines[name]); err != nil {
			return err
		}
	}
	return nil
}

// note appends a record about a machine's present generation.
func (l *Lab) note(t ledger.Type, m ledger.Machine, command string, data any) error {
	_, err := l.book.Append(ledger.Record{Type: t, Command: command, Machine: m.Name, Generation: m.Generation}, data)
	return err
}

// person names the user of this host.
func person() string {
	if u, err := osuser.Current(); err == nil && u.Username != "" {
		return u.Username
	}
	return "uid " + strconv.Itoa(os.Getuid())
}

// overdue says that a generation is older than its max_age allows, in words; empty
// if it is not. wanted is what the Labfile says of the machine now.
func overdue(m ledger.Machine, wanted lab.Expiry, now time.Time) string {
	if wanted.After == 0 || m.Ready.IsZero() {
		return ""
	}
	age := now.Sub(m.Ready)
	if age < wanted.After {
		return ""
	}
	return fmt.Sprintf("it is %s old, and max_age is %s", span(age), span(wanted.After))
}

// span renders a duration for people: in whole minutes from an hour on.
func span(d time.Duration) string {
	switch {
	case d >= time.Hour:
		d = d.Round(time.Minute)
		if d%time.Hour == 0 {
			return fmt.Sprintf("%dh", d/time.Hour)
		}
		return fmt.Sprintf("%dh%dm", d/time.Hour, d%time.Hour/time.Minute)
	case d >= time.Second:
		d = d.Round(time.Second)
		if d%time.Minute == 0 {
			return fmt.Sprintf("%dm", d/time.Minute)
		}
		return d.String()
	}
	return d.Round(time.Millisecond).String()
}
