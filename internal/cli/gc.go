// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"

	"github.com/urfave/cli/v2"

	"github.com/labfile/lab/internal/engine"
	"github.com/labfile/lab/internal/lab"
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
directories of labs that are gone. Machines that a lab knows of are never touched, nor
are boxes and baked layers: "lab box prune" and "lab bake --prune" remove those.`,
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
			if err := ui.Garbage(a.Out, found, dry, a.ui.OutPage()); err != nil {
				return err
			}
			return a.tellLayers(ctx, h)
		},
	}
}

// tellLayers says how much disk is taken by layers that no generation was born from.
// They are a cache, which gc leaves alone.
func (a *app) tellLayers(ctx context.Context, h *engine.Host) error {
	spare, err := h.PruneLayers(ctx, nil, true)
	if err != nil || len(spare) == 0 {
		return err
	}
	var bytes lab.Bytes
	for _, l := range spare {
		bytes += l.Bytes
	}
	a.ui.Note("%s that no generation is made of: %s; \"lab bake --prune\" removes those that this folder's Labfile does not need either",
		ui.Count(len(spare), "baked layer"), ui.Size(int64(bytes)))
	return nil
}
