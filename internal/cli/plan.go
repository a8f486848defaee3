// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"

	"github.com/urfave/cli/v2"

	"github.com/labfile/lab/internal/engine"
	"github.com/labfile/lab/internal/plan"
	"github.com/labfile/lab/internal/ui"
)

func (a *app) planCommand() *command {
	return &command{
		name: "plan", group: groupLook, args: "[MACHINE...]", max: -1, lab: true, reports: true,
		short: "say what \"lab up\" would do, and why",
		long: `Compares the Labfile with what was recorded and what is there. Exit code 0 if
there is nothing to do, 2 if there is. Machines are not touched, but boxes that are
not there yet are fetched or built first, which may take minutes: what they are is
part of the answer.

  =  as wanted     +  create     >  start     -/+  replace     -  destroy
  ~  changed in place

With --out the plan is written down; "lab up --plan" carries out exactly that.`,
		flags: []cli.Flag{
			&cli.BoolFlag{Name: "locked", Usage: "fail unless Labfile.lock pins every box"},
			&cli.StringFlag{Name: "out", Aliases: []string{"o"}, Usage: "write the plan to `FILE` too, for \"lab up --plan FILE\""},
		},
		complete: a.completeMachines,
		examples: []string{
			"lab plan", "the whole lab",
			"lab plan --json", "for a program",
			"lab plan --out next.plan", "write it down; \"lab up --plan next.plan\" carries it out",
		},
		run: func(ctx context.Context, r request) error {
			p, err := a.showPlan(ctx, r)
			if err == nil && p.Changes() {
				return exitCode(ExitDifferent)
			}
			return err
		},
	}
}

// showPlan makes the plan and prints it.
func (a *app) showPlan(ctx context.Context, r request) (plan.Plan, error) {
	names, err := several(r.args)
	if err != nil {
		return plan.Plan{}, err
	}
	path := r.String("out")
	if path != "" {
		if path, err = a.output(path); err != nil {
			return plan.Plan{}, err
		}
	}
	want, l, err := a.wanted(ctx)
	if err != nil {
		return plan.Plan{}, err
	}
	if busy := l.Busy(); busy != nil {
		a.ui.Note("%v: the plan is of this moment", busy)
	}
	show := a.show()
	planned, err := l.PlanFor(ctx, want, engine.UpOptions{
		Locked:  r.Bool("locked"),
		Options: engine.Options{Machines: names, Events: show.event, Command: a.typed},
	})
	show.close()
	if err != nil {
		return plan.Plan{}, err
	}
	p := planned.Plan
	if path != "" {
		if err := planned.Write(path); err != nil {
			return p, err
		}
	}
	if a.asJSON {
		if p.Steps == nil {
			p.Steps = []plan.Step{}
		}
		return p, ui.JSON(a.Out, ui.PlanJSON{Changes: p.Changes(), Plan: p})
	}
	return p, ui.Plan(a.Out, p, a.ui.OutPage())
}
