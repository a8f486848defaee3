// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"
	"slices"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/labfile/lab/internal/engine"
	"github.com/labfile/lab/internal/guest"
	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/ui"
)

// enter logs in to a machine by hand, as its policy allows: it is asked first, and
// what is done is recorded before it is done.
func (a *app) enter(ctx context.Context, l *engine.Lab, name lab.Name, user, how string, command []string) (*guest.Client, error) {
	if err := l.Admit(name, how); err != nil {
		return nil, err
	}
	waiting := time.AfterFunc(silence, func() { a.ui.Note("%s %s", name, l.Silence(ctx, name).Waiting()) })
	client, err := l.Connect(ctx, name, user)
	waiting.Stop()
	if err != nil {
		return nil, err
	}
	if err := a.entered(ctx, l, name, how, command); err != nil {
		client.Close()
		return nil, err
	}
	go client.Watch(ctx, func(silent bool) {
		a.silent.Store(silent)
		if silent {
			a.ui.Note("%s %s, Ctrl-C ends that", name, l.Silence(ctx, name).Waiting())
		} else {
			a.ui.Note("%s %s", name, (*engine.Silence)(nil).Waiting())
		}
	})
	return client, nil
}

// silence is how long a machine is waited for without a word.
const silence = 4 * time.Second

// attend tells of a machine that falls silent while something waits for what it says, and
// returns what ends that. What a tells is set here.
func (a *app) attend(ctx context.Context, l *engine.Lab, name lab.Name, of engine.Attention) (leave func()) {
	ctx, cancel := context.WithCancel(ctx)
	of.Tell = func(why *engine.Silence) { a.ui.Note("%s %s", name, why.Waiting()) }
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := l.Attend(ctx, name, of); err != nil {
			a.log().Debug("watching a machine", "machine", name, "err", err)
		}
	}()
	return func() {
		cancel()
		<-done
	}
}

// entered records that a machine is entered by hand, and tells what that means.
func (a *app) entered(ctx context.Context, l *engine.Lab, name lab.Name, how string, command []string) error {
	e, err := l.Enter(ctx, name, how, command)
	if err != nil {
		return err
	}
	switch {
	case e.Policy == lab.ShellWarn:
		a.ui.Note("%s: this is recorded (on_shell: warn); what you change by hand is lost with the generation", name)
	case e.Tainted:
		a.ui.Note("%s is tainted now (on_shell: taint): the next %q replaces it", name, a.say("up"))
	}
	return nil
}

func (a *app) taintCommand() *command {
	return &command{
		name: "taint", group: groupLook, args: "MACHINE...", min: 1, max: -1, asks: "name a machine to taint", lab: true,
		short: "mark machines for replacement by the next \"lab up\"",
		long: `Notes that the present generation of each machine is not to be trusted any more.
It runs on; "lab plan" says why it is to be replaced, and "lab up" replaces it. A
machine whose Labfile says "on_shell: taint" is marked by the first login. It never
waits for another command.`,
		flags: []cli.Flag{
			&cli.StringFlag{Name: "why", Usage: "say why, in a few `WORDS`: the plan and the history show them"},
		},
		complete: a.completeMachines,
		examples: []string{
			"lab taint web", "replace it at the next occasion",
			"lab taint db --why 'tried an index by hand'", "and remember why",
		},
		run: func(ctx context.Context, r request) error { return a.mark(ctx, r, markTainted, (*engine.Lab).Taint) },
	}
}

func (a *app) untaintCommand() *command {
	return &command{
		name: "untaint", group: groupLook, args: "MACHINE...", min: 1, max: -1, asks: "name a machine to trust again", lab: true,
		short: "trust tainted machines again",
		long: `Takes the taint off the present generation of each machine: "lab up" leaves it
alone then. The history keeps both.`,
		flags: []cli.Flag{
			&cli.StringFlag{Name: "why", Usage: "say why, in a few `WORDS`"},
		},
		complete: a.completeMachines,
		examples: []string{"lab untaint web --why 'only looked at a log'", "keep it after all"},
		run: func(ctx context.Context, r request) error {
			return a.mark(ctx, r, markUntainted, (*engine.Lab).Untaint)
		},
	}
}

// What is told of machines that were marked.
const (
	markTainted   = "tainted"
	markUntainted = "not tainted any more"
)

// mark taints or untaints machines.
func (a *app) mark(ctx context.Context, r request, what string, do func(*engine.Lab, context.Context, []lab.Name, string, engine.Options) error) error {
	names, err := several(r.args)
	if err != nil {
		return err
	}
	l, err := a.existing(ctx)
	if err != nil {
		return err
	}
	if names, err = l.Expand(names); err != nil {
		return err
	}
	tainted := l.Tainted()
	if err := do(l, ctx, names, strings.TrimSpace(r.String("why")), engine.Options{Command: a.typed}); err != nil {
		return err
	}
	if what == markTainted {
		a.ui.Note("%s: %s", what, ui.Names(names))
		return nil
	}
	for _, was := range []bool{true, false} {
		some := slices.DeleteFunc(slices.Clone(names), func(n lab.Name) bool { return tainted[n] != was })
		switch {
		case len(some) == 0:
		case was:
			a.ui.Note("%s: %s", what, ui.Names(some))
		case len(some) == 1:
			a.ui.Note("%s was not tainted", some[0])
		default:
			a.ui.Note("%s were not tainted", ui.Names(some))
		}
	}
	return nil
}
