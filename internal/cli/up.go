// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/urfave/cli/v2"
	"golang.org/x/term"

	"github.com/labfile/lab/internal/engine"
	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/ledger"
	"github.com/labfile/lab/internal/plan"
	"github.com/labfile/lab/internal/ui"
)

func (a *app) upCommand() *command {
	return &command{
		name: "up", group: groupDaily, args: "[MACHINE...]", max: -1, lab: true, reports: true,
		short: "make the lab what its Labfile says",
		long: `Creates the machines that are missing, starts those that are stopped, replaces
those that differ from the Labfile, and waits until all are ready. Machines that
are as wanted are left alone, so it can be repeated at any time; after an
interruption it goes on from there. With names, only those machines and what they
depend on. On a terminal it asks before it replaces or destroys a machine, and says
what becomes of its disk.

It says what it is going to do before it does it. --plan carries out exactly a plan
that "lab plan --out" wrote down, without asking, or refuses because something has
changed since. A machine that is no longer in the Labfile is destroyed, after asking;
where there is no terminal to ask on, only with --yes.

With --dry-run it prints what it would do. Boxes that are not there yet are fetched
or built first even then: what they are is part of the answer.`,
		flags: []cli.Flag{
			&cli.BoolFlag{Name: "dry-run", Usage: "print the plan and leave all machines alone"},
			&cli.BoolFlag{Name: "locked", Usage: "refuse to run unless Labfile.lock pins every box"},
			&cli.StringFlag{Name: "plan", Usage: "carry out the plan in `FILE`, or nothing"},
			junitFlag(),
			yesFlag(),
		},
		complete: a.completeMachines,
		examples: []string{
			"lab up", "the whole lab",
			"lab up web", "one machine and what it depends on",
			"lab up --dry-run", "what would be done, and why",
			"lab up --name two", "a second instance beside the first",
			"lab up --var VERSION=1.2", "set a variable of the Labfile",
			"lab up --junit lab.xml", "for a CI server, with what failed",
		},
		run: func(ctx context.Context, r request) error {
			if r.Bool("dry-run") {
				if r.String("junit") != "" {
					return usage("leave one of them out", "with --dry-run there is nothing to report")
				}
				_, err := a.showPlan(ctx, r)
				return err
			}
			if path := r.String("plan"); path != "" {
				return a.bringPlanned(ctx, r, path)
			}
			return a.bring(ctx, r, (*engine.Lab).Up, func(lab.Machine) bool { return false })
		},
	}
}

func (a *app) replaceCommand() *command {
	return &command{
		name: "replace", aliases: []string{"rebuild"}, group: groupDaily, args: "MACHINE... | --all", max: -1, lab: true, reports: true,
		short: "replace machines by new ones, born from their image",
		long: `Gives each of the machines a new generation: a new disk, the same name and
address. The old generation is kept, stopped, as long as "replace.keep" in the Labfile
says; volumes pass on to the new one. The rest of the lab is brought up as by "lab up".
On a terminal it asks before a disk is lost, and before other machines are replaced.`,
		flags: []cli.Flag{
			&cli.BoolFlag{Name: "all", Usage: "all machines of the lab"},
			&cli.BoolFlag{Name: "locked", Usage: "refuse to run unless Labfile.lock pins every box"},
			&cli.BoolFlag{Name: "yes", Aliases: []string{"y"}, Usage: "do not ask"},
			junitFlag(),
		},
		complete: a.completeMachines,
		examples: []string{
			"lab replace web", "one machine",
			"lab replace --all", "all of them",
		},
		run: func(ctx context.Context, r request) error {
			if r.Bool("all") == (len(r.args) > 0) {
				return usage("usage: lab replace MACHINE... | --all", "say which machines to replace, or --all")
			}
			return a.bring(ctx, r, (*engine.Lab).Rebuild, func(m lab.Machine) bool {
				return r.Bool("all") || slices.Contains(r.args, everyMachine) || slices.Contains(r.args, string(m.Name)) || slices.Contains(r.args, m.Role)
			})
		},
	}
}

func yesFlag() cli.Flag {
	return &cli.BoolFlag{Name: "yes", Aliases: []string{"y"}, Usage: "do not ask"}
}

// raise is engine.Lab's Up or Rebuild.
type raise func(*engine.Lab, context.Context, *lab.Lab, engine.UpOptions) (plan.Plan, error)

// bring carries out Up or Rebuild and prints the lab's state. asked reports
// whether it was the user's own word that the machine is to be replaced.
func (a *app) bring(ctx context.Context, r request, do raise, asked func(lab.Machine) bool) error {
	names, err := several(r.args)
	if err != nil {
		return err
	}
	want, l, err := a.wanted(ctx)
	if err != nil {
		return a.unreadable(r, err)
	}
	named := func(name lab.Name) bool {
		m, ok := want.Machine(name)
		return ok && asked(m)
	}
	c := newChecked()
	return a.reported(ctx, r, l, want, c, func(show *shown) (plan.Plan, error) {
		return do(l, ctx, want, engine.UpOptions{Locked: r.Bool("locked"), Options: engine.Options{
			Machines: names, Events: show.event, Command: a.typed, Checked: c.add,
			Confirm: func(p plan.Plan) error { return a.confirmPlan(ctx, l, show, p, named, r.Bool("yes")) },
		}})
	})
}

// bringPlanned carries out the plan in a file. Whoever wrote it down has read it.
func (a *app) bringPlanned(ctx context.Context, r request, path string) error {
	if len(r.args) > 0 {
		return usage("leave the names out", "the plan in the file says which machines it is about")
	}
	planned, err := engine.ReadPlanned(path)
	if err != nil {
		return a.unreadable(r, &hinted{err, "\"" + a.say("plan --out FILE") + "\" writes one"})
	}
	want, l, err := a.wanted(ctx)
	if err != nil {
		return a.unreadable(r, err)
	}
	c := newChecked()
	return a.reported(ctx, r, l, want, c, func(show *shown) (plan.Plan, error) {
		return l.Up(ctx, want, engine.UpOptions{Locked: r.Bool("locked"), Exactly: &planned, Options: engine.Options{
			Machines: planned.Machines, Events: show.event, Command: a.typed, Checked: c.add,
			Confirm: func(p plan.Plan) error {
				return a.confirmPlan(ctx, l, show, p, func(lab.Name) bool { return true }, true)
			},
		}})
	})
}

// carryOut shows the progress of what changes a lab, and the lab's state after it, in the
// order of want if that is not nil.
func (a *app) carryOut(ctx context.Context, l *engine.Lab, want *lab.Lab, do func(*shown) (plan.Plan, error)) error {
	known := wasReady(l)
	show := a.show()
	done, err := do(show)
	show.close()
	if done.Changes() {
		a.refreshSSH(ctx, l)
	}
	if err != nil {
		return err
	}
	st, err := l.Status(ctx)
	if err != nil {
		return err
	}
	if done.Changes() && !known {
		a.tellEmulation(st)
	}
	if a.ui.Quiet && !a.asJSON {
		return nil
	}
	a.inOrder(&st, want)
	return a.printStatus(st)
}

// wasReady reports whether a machine of the lab ever became ready.
func wasReady(l *engine.Lab) bool {
	records, err := l.History()
	return err == nil && slices.ContainsFunc(records, func(r ledger.Record) bool { return r.Type == ledger.MachineReady })
}

// tellEmulation says what emulation costs. It is for a lab that came up for the
// first time: who goes on working with it knows.
func (a *app) tellEmulation(st engine.Status) {
	for _, m := range st.Machines {
		if m.Accel == "tcg" {
			a.ui.Note("the machines are emulated in software (no KVM): they do the same, some ten times slower; \"lab doctor\" says why")
			return
		}
	}
}

// confirmPlan shows a plan that changes something. On a terminal it asks if machines are
// replaced that the user did not name for that, or a disk is lost; elsewhere a machine
// is replaced unasked, for that is what a changed Labfile means, but not destroyed.
func (a *app) confirmPlan(ctx context.Context, l *engine.Lab, show *shown, p plan.Plan, asked func(lab.Name) bool, yes bool) error {
	if !p.Changes() {
		return nil
	}
	show.pause()
	if !a.ui.Quiet {
		if err := ui.Plan(a.Err, p, a.ui.ErrPage()); err != nil {
			return err
		}
	}
	loss := lossOf(p, asked, stillborn(l))
	if yes || loss == "" {
		return nil
	}
	if !a.interactive() {
		var gone []lab.Name
		for _, s := range p.Steps {
			if s.Action == plan.Destroy {
				gone = append(gone, s.Machine)
			}
		}
		if len(gone) > 0 {
			return usage("add --yes, or put it back into the Labfile",
				"there is no terminal to ask on whether to destroy what the Labfile no longer has: %s", ui.Names(gone))
		}
		return nil
	}
	return a.ask(ctx, loss+" Continue?")
}

// interactive reports whether somebody can be asked.
func (a *app) interactive() bool {
	f, ok := a.In.(*os.File)
	return ok && term.IsTerminal(int(f.Fd())) && a.ui.Size != nil
}

// ask returns nil if the user says yes, ctx's error if that ends first, and
// errDeclined otherwise.
func (a *app) ask(ctx context.Context, question string) error {
	fmt.Fprintf(a.Err, "%s [y/N] ", question)
	// A read from a terminal cannot be called off: it is left behind, and ends with
	// the program.
	answer := make(chan string, 1)
	go func() {
		line, _ := bufio.NewReader(io.LimitReader(a.In, 1024)).ReadString('\n')
		answer <- line
	}()
	var line string
	select {
	case <-ctx.Done():
		fmt.Fprintln(a.Err)
		return ctx.Err()
	case line = <-answer:
	}
	if line == "" {
		fmt.Fprintln(a.Err)
		return errDeclined
	}
	switch strings.ToLower(strings.TrimSpace(line)) {
	case "y", "yes":
		return nil
	}
	return errDeclined
}

// shown is the progress of one operation. It can pause for a question.
type shown struct {
	ui *ui.UI
	p  ui.Progress
}

func (a *app) show() *shown { return &shown{ui: a.ui} }

// event is called by the engine, one call at a time.
func (s *shown) event(e engine.Event) {
	if s.p == nil {
		s.p = s.ui.Progress()
	}
	s.p.Event(e)
}

func (s *shown) pause() { s.close() }

func (s *shown) close() {
	if s.p != nil {
		s.p.Close()
		s.p = nil
	}
}

// printStatus prints the state of a lab as the answer.
func (a *app) printStatus(st engine.Status) error {
	if a.asJSON {
		return ui.JSON(a.Out, st)
	}
	return ui.Status(a.Out, st, time.Now(), a.ui.OutPage())
}
