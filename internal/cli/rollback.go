// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"

	"github.com/urfave/cli/v2"

	"github.com/labfile/lab/internal/engine"
	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/plan"
)

func (a *app) rollbackCommand() *command {
	return &command{
		name: "rollback", group: groupDaily, args: "MACHINE", min: 1, max: 1, lab: true, reports: true,
		short: "go back to an earlier generation's image and specification",
		long: `Replaces the machine by a new generation that is born from the image and the
specification of an earlier one: of the newest one before the present that was ready,
or of the one that --to names. History is added to, never rewritten, and what a
generation wrote to its disk does not come back. The Labfile is not changed: the next
"lab up" says so and follows it again.`,
		flags: []cli.Flag{
			&cli.IntFlag{Name: "to", Usage: "go back to generation `N`"},
			yesFlag(),
		},
		complete: a.completeMachines,
		examples: []string{
			"lab rollback web", "undo the last replacement",
			"lab rollback web --to 3", "go back further",
		},
		run: func(ctx context.Context, r request) error {
			name, number, err := generation(r.args[0])
			if err != nil {
				return err
			}
			to := r.Int("to")
			switch {
			case r.IsSet("to") && to < 1:
				return usage("\"lab history "+string(name)+"\" shows the numbers", "--to needs the number of a generation")
			case number != 0 && r.IsSet("to") && number != to:
				return usage("use NAME@N or --to, not both", "generation given twice")
			case number != 0:
				to = number
			}
			l, err := a.existing(ctx)
			if err != nil {
				return err
			}
			if name, err = l.One(name); err != nil {
				return err
			}
			return a.carryOut(ctx, l, nil, func(show *shown) (plan.Plan, error) {
				return l.Rollback(ctx, name, to, engine.Options{
					Events: show.event, Command: a.typed,
					Confirm: func(p plan.Plan) error {
						return a.confirmPlan(ctx, l, show, p, func(m lab.Name) bool { return m == name }, r.Bool("yes"))
					},
				})
			})
		},
	}
}
