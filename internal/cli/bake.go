// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/urfave/cli/v2"

	"github.com/labfile/lab/internal/bake"
	"github.com/labfile/lab/internal/engine"
	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/labfile"
	"github.com/labfile/lab/internal/ledger"
	"github.com/labfile/lab/internal/ui"
)

// bakeJSON is the schema of "lab bake --json".
type bakeJSON struct {
	Images []engine.BakedImage `json:"images"`
}

// bakePruneJSON is the schema of "lab bake --prune --json".
type bakePruneJSON struct {
	DryRun bool           `json:"dryRun"`
	Layers []bake.Removed `json:"layers"`
	Bytes  lab.Bytes      `json:"bytes"`
}

func (a *app) bakeCommand() *command {
	return &command{
		name: "bake", group: groupKeep, args: "[MACHINE...]", max: -1, lab: true, reports: true,
		short: "run provision steps, and keep the images that they make",
		long: `Runs the provision steps of the machines, or of all, each in a throw-away machine,
and keeps what it made as a layer. Steps whose layers are there are not run again:
a layer is found by the box, the steps before it, the step, and the content of its
files. "lab up" does the same for what it needs; no machine of the lab is touched.

With --prune it removes the layers that no recorded generation of any lab and no
machine of this Labfile is made of.`,
		flags: []cli.Flag{
			&cli.BoolFlag{Name: "no-cache", Usage: "run every step, even if its layer is there; \"lab replace\" then takes it"},
			&cli.BoolFlag{Name: "locked", Usage: "refuse to run unless Labfile.lock pins every box"},
			&cli.BoolFlag{Name: "prune", Usage: "remove layers that nobody needs, instead"},
			&cli.BoolFlag{Name: "dry-run", Usage: "with --prune: only say what would be removed"},
		},
		complete: a.completeMachines,
		examples: []string{
			"lab bake", "the images of all machines",
			"lab bake web --no-cache", "one image, with today's packages",
			"lab bake --prune", "free the space of old images",
		},
		run: func(ctx context.Context, r request) error {
			switch {
			case r.Bool("prune") && (len(r.args) > 0 || r.Bool("no-cache")):
				return usage("--prune takes neither machines nor --no-cache", "usage: lab bake --prune [--dry-run]")
			case r.Bool("dry-run") && !r.Bool("prune"):
				return usage("--dry-run goes with --prune", "\"lab plan\" says which steps are to be baked")
			case r.Bool("prune"):
				return a.pruneLayers(ctx, r.Bool("dry-run"))
			}
			return a.bakeImages(ctx, r)
		},
	}
}

func (a *app) bakeImages(ctx context.Context, r request) error {
	names, err := several(r.args)
	if err != nil {
		return err
	}
	want, l, err := a.wanted(ctx)
	if err != nil {
		return err
	}
	show := a.show()
	images, err := l.Bake(ctx, want, engine.BakeOptions{
		NoCache: r.Bool("no-cache"),
		UpOptions: engine.UpOptions{Locked: r.Bool("locked"), Options: engine.Options{
			Machines: names, Events: show.event, Command: a.typed,
		}},
	})
	show.close()
	if err != nil {
		return err
	}
	if a.asJSON {
		if images == nil {
			images = []engine.BakedImage{}
		}
		return ui.JSON(a.Out, bakeJSON{images})
	}
	if len(images) == 0 {
		a.ui.Note("no machine has provision steps")
	}
	for _, i := range images {
		what := "nothing to do"
		if i.Baked > 0 {
			what = fmt.Sprintf("%d of %d steps baked", i.Baked, len(i.Layers))
		}
		if _, err := fmt.Fprintf(a.Out, "%s  %s  %s\n", i.Machine, ledger.Short(i.Image), what); err != nil {
			return err
		}
	}
	return nil
}

// pruneLayers removes layers. Those of the present Labfile stay, if there is one.
func (a *app) pruneLayers(ctx context.Context, dryRun bool) error {
	keep, err := a.imagesHere(ctx)
	if err != nil && !errors.Is(err, labfile.ErrNotFound) {
		return err
	}
	h, err := a.host()
	if err != nil {
		return err
	}
	gone, err := h.PruneLayers(ctx, keep, dryRun)
	if err != nil {
		return err
	}
	var bytes lab.Bytes
	for _, g := range gone {
		bytes += g.Bytes
	}
	if a.asJSON {
		if gone == nil {
			gone = []bake.Removed{}
		}
		return ui.JSON(a.Out, bakePruneJSON{dryRun, gone, bytes})
	}
	removed, freed := "removed", "freed"
	if dryRun {
		removed, freed = "would remove", "would free"
	}
	for _, g := range gone {
		if _, err := fmt.Fprintf(a.Out, "%s %s  %s\n", removed, ledger.Short(g.Key), ui.Clean(g.Text)); err != nil {
			return err
		}
	}
	_, err = fmt.Fprintf(a.Out, "%s %s\n", freed, ui.Size(int64(bytes)))
	return err
}

// imagesHere returns the digests of the images of the present Labfile.
func (a *app) imagesHere(ctx context.Context) ([]string, error) {
	want, l, err := a.wanted(ctx)
	if err != nil {
		return nil, err
	}
	show := a.show()
	defer show.close()
	return l.Images(ctx, want, engine.UpOptions{Options: engine.Options{Events: show.event, Command: a.typed}})
}

// stepOutput returns the lines that a failed step printed, for the user to read,
// unless they were told already.
func stepOutput(err error, told *[]*engine.StepError) []string {
	var e *engine.StepError
	if !errors.As(err, &e) || slices.Contains(*told, e) {
		return nil
	}
	*told = append(*told, e)
	lines := make([]string, len(e.Output))
	for i, l := range e.Output {
		lines[i] = "  | " + ui.Clean(l)
	}
	return lines
}
