// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"

	"github.com/urfave/cli/v2"

	"github.com/labfile/lab/internal/engine"
	"github.com/labfile/lab/internal/ui"
)

// gcJSON is the schema of "lab gc --json".
type gcJSON struct {
	DryRun  bool             `json:"dryRun"`
	Garbage []engine.Garbage `json:"garbage"`
}

func (a *app) gcCommand() *command {
	return &command{
		name: "gc", group: groupKeep, reports: true,
		short: "remove what no lab needs any more",
		long: `Removes what crashes and lost files left behind: half-made machines, sockets and
directories of labs that are gone. Machines that a lab knows of are never touched.`,
		flags: []cli.Flag{&cli.BoolFlag{Name: "dry-run", Usage: "only say what would be removed"}},
		examples: []string{
			"lab gc --dry-run", "what there is to remove",
			"lab gc", "remove it",
		},
		run: func(ctx context.Context, r request) error {
			h, err := a.host()
			if err != nil {
				return err
			}
			dry := r.Bool("dry-run")
			found, err := h.GC(ctx, dry)
			if err != nil {
				return err
			}
			if a.asJSON {
				if found == nil {
					found = []engine.Garbage{}
				}
				return ui.JSON(a.Out, gcJSON{dry, found})
			}
			return ui.Garbage(a.Out, found, dry)
		},
	}
}
