// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os/exec"
	"slices"
	"strings"
	"syscall"

	"github.com/labfile/lab/boxes"
	"github.com/labfile/lab/boxes/build"
	"github.com/labfile/lab/internal/engine"
	"github.com/labfile/lab/internal/guest"
	"github.com/labfile/lab/internal/labfile"
	"github.com/labfile/lab/internal/ledger"
	"github.com/labfile/lab/internal/ui"
	"github.com/labfile/lab/providers"
)

// Exit codes of lab. A command that ran on a machine ("lab exec", "lab ssh")
// passes its own on instead.
const (
	ExitDone        = 0   // done
	ExitFailed      = 1   // something went wrong
	ExitDifferent   = 2   // differences were found
	ExitUsage       = 3   // bad usage, a bad Labfile, or with --locked a stale lock file
	ExitLocked      = 4   // another lab command works on the lab
	ExitIncapable   = 5   // the host can't do it
	ExitInterrupted = 130 // SIGINT or SIGTERM
)

// usageError says that the command line is wrong.
type usageError struct{ text, hint string }

func (e *usageError) Error() string { return e.text }

func usage(hint, format string, a ...any) error {
	return &usageError{text: fmt.Sprintf(format, a...), hint: hint}
}

// labfileError says that the Labfile could not be reached or read. What is wrong
// with its content is a *labfile.Problems instead.
type labfileError struct{ error }

func (e *labfileError) Unwrap() error { return e.error }

// Hint implements hinter.
func (e *labfileError) Hint() string {
	var own hinter
	if errors.As(e.error, &own) {
		return own.Hint()
	}
	if errors.Is(e.error, fs.ErrNotExist) {
		return "\"lab init\" writes one; -f FILE names another; \"lab list\" shows the labs there are"
	}
	return "see that it is a file which you may read; -f FILE names another"
}

// hinter is an error that knows the next step itself.
type hinter interface {
	error
	Hint() string
}

// hinted gives an error a next step.
type hinted struct {
	error
	hint string
}

func (e *hinted) Unwrap() error { return e.error }
func (e *hinted) Hint() string  { return e.hint }

// exitCode ends the program with a code and no message.
type exitCode int

func (e exitCode) Error() string { return fmt.Sprintf("exit code %d", int(e)) }

// commandExit ends the program with the exit code of a command that it ran for the
// user. Only "exec" and "ssh" make one: the exit code of any other command in a guest,
// such as a check, is not lab's to pass on.
type commandExit struct {
	code  int
	cause error
}

func (e *commandExit) Error() string { return e.cause.Error() }
func (e *commandExit) Unwrap() error { return e.cause }

// passOn turns the exit of a user's command into the program's. Other errors stay.
func passOn(err error) error {
	var quit *guest.ExitError
	if errors.As(err, &quit) {
		return &commandExit{exitOf(quit), err}
	}
	return err
}

// errDeclined says that the user answered no.
var errDeclined = errors.New("cancelled")

// explain returns the exit code for err, and what to tell the user: the error and
// the next steps. An empty text means that there is nothing to tell.
func (a *app) explain(ctx context.Context, err error) (code int, text string, hints []string) {
	if err == nil {
		return ExitDone, "", nil
	}
	var (
		code0 exitCode
		quit  *commandExit
	)
	switch {
	case errors.As(err, &code0):
		return int(code0), "", nil
	case errors.As(err, &quit):
		return quit.code, "", nil
	case ctx.Err() != nil:
		return ExitInterrupted, interrupted(err), nil
	}
	code, text = ExitFailed, err.Error()
	var up *engine.UpError
	if errors.As(err, &up) {
		return a.notUp(up)
	}
	for _, known := range a.table() {
		if c, t, h, ok := known(err); ok {
			if t != "" {
				text = t
			}
			if h != "" {
				hints = append(hints, h)
			}
			code = c
			break
		}
	}
	var own hinter
	if errors.As(err, &own) && own.Hint() != "" {
		hints = []string{own.Hint()} // it knows better than the table
	}
	return code, text, hints
}

// interrupted says what an interruption left behind: nothing, as a rule.
func interrupted(err error) string {
	var rest []string
	for _, line := range strings.Split(err.Error(), "\n") {
		if !strings.Contains(line, context.Canceled.Error()) {
			rest = append(rest, line)
		}
	}
	return strings.Join(append([]string{"interrupted"}, rest...), "\n")
}

// exitOf is the exit code by which a remote command's end is passed on: its own,
// or 128 and the signal's number, as a shell has it.
func exitOf(e *guest.ExitError) int {
	if e.Signal == "" {
		return e.Code
	}
	name := "SIG" + strings.TrimPrefix(e.Signal, "SIG")
	for n := syscall.Signal(1); n < 32; n++ {
		if signalName(n) == name {
			return 128 + int(n)
		}
	}
	return ExitFailed
}

// rule recognises an error and says how to end: the code, a better text than the
// error's own if there is one, and the next step.
type rule func(error) (code int, text, hint string, ok bool)

// is makes a rule from a sentinel.
func is(target error, code int, hint string) rule {
	return func(err error) (int, string, string, bool) { return code, "", hint, errors.Is(err, target) }
}

// as makes a rule from a type of error.
func as[T error](code int, f func(T) (text, hint string)) rule {
	return func(err error) (int, string, string, bool) {
		var e T
		if !errors.As(err, &e) {
			return 0, "", "", false
		}
		text, hint := f(e)
		return code, text, hint, true
	}
}

// table is every error that has a next step. The first rule that fits counts:
// the cause comes before what it made fail.
func (a *app) table() []rule {
	return []rule{
		as(ExitUsage, func(e *usageError) (string, string) { return e.text, e.hint }),
		as(ExitUsage, func(e *labfile.Problems) (string, string) {
			return e.Error(), "docs/labfile.md lists every key; \"lab schema\" lets editors complete them"
		}),
		is(labfile.ErrNotFound, ExitUsage, "\"lab init\" writes one; -f FILE names another; \"lab list\" shows the labs there are"),
		as(ExitUsage, func(*labfileError) (string, string) { return "", "" }), // it has its hint itself
		as(ExitLocked, func(e *engine.LockedError) (string, string) {
			return "", "wait for it to end, or stop it; readers such as \"" + a.say("status") + "\" work meanwhile"
		}),
		as(ExitUsage, a.noMachine),
		as(ExitUsage, func(e *engine.SeveralError) (string, string) {
			return "", fmt.Sprintf("say which one: %s", ui.Names(e.Machines))
		}),
		func(err error) (int, string, string, bool) {
			if !errors.Is(err, engine.ErrNoLab) {
				return 0, "", "", false
			}
			return ExitFailed, "", a.noLab(), true
		},
		is(engine.ErrNothingToBurn, ExitFailed, "\""+a.say("up")+"\" brings them up first"),
		as(ExitFailed, func(e *ledger.CorruptError) (string, string) {
			return "", "put the ledger back from a copy, or remove the lab: \"" + a.say("destroy") + "\" works without it"
		}),
		is(engine.ErrStaleLock, ExitUsage, "\""+a.say("lock")+"\" pins what is missing"),
		is(build.ErrIncapable, ExitIncapable, "a cloud image works instead: \"lab box add NAME URL --checksum sha256:...\"; \"lab doctor\" checks this host"),
		is(providers.ErrIncapable, ExitIncapable, "\"lab doctor\" checks this host and names the cure for what it lacks"),
		is(boxes.ErrDigest, ExitFailed, "if the new content is what you want, \""+a.say("lock --update")+"\" pins it; if not, do not trust its source"),
		is(boxes.ErrUnsafe, ExitFailed, "flatten the image where you trust it: qemu-img convert -O qcow2 OLD NEW"),
		is(boxes.ErrNotFound, ExitFailed, "\"lab box list\" shows the boxes there are; \"lab box add NAME SOURCE\" adds one"),
		is(syscall.EADDRINUSE, ExitFailed, "choose another host port in the Labfile, or 0 to let lab pick one"),
		is(providers.ErrNotRunning, ExitFailed, "\""+a.say("up")+"\" starts it; \""+a.say("status")+"\" says how it ended"),
		is(guest.ErrDisconnected, ExitFailed, "the guest ended it, as one does that restarts: \""+a.say("logs")+" MACHINE\" shows what it says, then try again"),
		is(syscall.ENOSPC, ExitFailed, "make room on the disk; \"lab gc\" and \"lab box prune\" remove what nobody needs"),
		is(exec.ErrNotFound, ExitIncapable, "\"lab doctor\" checks this host and names the cure for what it lacks"),
	}
}

// noLab is the next step when there is no such lab. One that was addressed by its
// ID cannot be brought up: which Labfile it had is not known.
func (a *app) noLab() string {
	const list = "\"lab list\" shows the labs there are"
	if up := a.named(); len(up) > 0 {
		return fmt.Sprintf("\"--name %s\" addresses what is up from this Labfile", up[0].Name)
	}
	if a.set.string("lab") != "" {
		return list
	}
	return "\"" + a.say("up") + "\" brings it up; " + list
}

func (a *app) noMachine(e *engine.NoMachineError) (text, hint string) {
	var names []string
	for _, n := range e.Known {
		names = append(names, string(n))
	}
	if len(names) == 0 {
		return e.Error(), "the lab has no machines; \"" + a.say("up") + "\" makes those of the Labfile"
	}
	if near := nearest(string(e.Name), names); near != "" {
		return e.Error(), fmt.Sprintf("did you mean %q?", near)
	}
	return e.Error(), "the machines are " + ui.Names(e.Known)
}

// notUp tells what became of the machines that an operation failed on.
func (a *app) notUp(e *engine.UpError) (code int, text string, hints []string) {
	code = ExitFailed
	lines := []string{fmt.Sprintf("%d machines failed", len(e.Failed))}
	if len(e.Failed) == 1 {
		lines[0] = "1 machine failed"
	}
	var (
		kept, aside []string
		login       bool // it is told how to look at what a boot step left
		told        []*engine.StepError
	)
	for _, f := range e.Failed {
		for _, part := range split(f) {
			lines = append(lines, ui.Clean(part.Error()))
		}
		lines = append(lines, stepOutput(f.Err, &told)...)
		switch {
		case f.Kept && f.Instead != 0:
			aside = append(aside, fmt.Sprintf("%s@%d", f.Machine, f.Generation))
		case f.Kept:
			kept = append(kept, string(f.Machine))
			var step *engine.StepError
			if !login && f.Enterable && errors.As(f.Err, &step) && step.Key == "boot" {
				login = true
				hints = append(hints, fmt.Sprintf("%q logs in, to look at what the step left", a.say("ssh "+string(f.Machine))))
			}
		}
		c, next := a.allHints(context.Background(), f.Err)
		if c == ExitIncapable {
			code = c
		}
		for _, h := range next {
			if !slices.Contains(hints, h) {
				hints = append(hints, h)
			}
		}
	}
	if len(e.Skipped) > 0 {
		lines = append(lines, "not tried, because of what failed: "+ui.Names(e.Skipped))
	}
	if len(kept) > 0 {
		hints = append(hints, fmt.Sprintf("%q shows what the machine printed, %q opens its console; the next %q goes on from here",
			a.say("logs "+kept[0]), a.say("console "+kept[0]), a.say("up")))
	}
	if len(aside) > 0 {
		hints = append(hints, fmt.Sprintf("%q shows what the failed generation printed; it is kept, stopped, until the next replacement", a.say("logs "+aside[0])))
	}
	return code, strings.Join(lines, "\n"), hints
}

// say renders a command for the user to type, about the same lab.
func (a *app) say(command string) string {
	for _, flag := range []string{"lab", "file", "name"} {
		if v := a.set.string(flag); v != "" {
			dashes := " --"
			if flag == "file" {
				dashes, flag = " -", "f" // short, as people type it
			}
			command += dashes + flag + " " + guest.Quote([]string{v})
		}
	}
	return "lab " + command
}
