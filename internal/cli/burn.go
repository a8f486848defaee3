// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"
	"fmt"
	"math"
	"slices"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/labfile/lab/internal/engine"
	"github.com/labfile/lab/internal/ui"
)

func (a *app) burnCommand() *command {
	return &command{
		name: "burn", group: groupLook, args: "[MACHINE...]", max: -1, lab: true, reports: true,
		short: "destroy machines on purpose and watch them come back",
		long: `A phoenix drill: destroys the machines without warning, brings them back as "lab up"
does, and reports how long each took to be ready again and how much it had written
since its birth, which is lost. Volumes are kept, and a machine that writes to one is
shut down for that. It asks on a terminal and wants --yes elsewhere.

One round by default. With --every or --for there are more, until the time is over or
Ctrl-C is pressed; either ends it with the lab up. The exit code is 1 if a machine did
not come back.`,
		flags: []cli.Flag{
			&cli.IntFlag{Name: "random", Usage: "destroy `N` of the machines in each round, by chance"},
			&cli.DurationFlag{Name: "every", Usage: "begin a round every `TIME` (10m with --for)"},
			&cli.DurationFlag{Name: "for", Usage: "begin no round after `TIME` (no end with --every)"},
			yesFlag(),
		},
		complete: a.completeMachines,
		examples: []string{
			"lab burn", "every machine, once",
			"lab burn web --yes", "one, without asking",
			"lab burn --random 1 --every 10m --for 1h", "one by chance, six times or so",
		},
		run: a.burn,
	}
}

// burnJSON is the schema of "lab burn --json".
type burnJSON struct {
	Rounds    int            `json:"rounds"`
	Recovered int            `json:"recovered"` // how many of Burnt came back
	Slowest   time.Duration  `json:"slowest"`   // nanoseconds
	Burnt     []engine.Burnt `json:"burnt"`
}

func (a *app) burn(ctx context.Context, r request) error {
	opt := engine.BurnOptions{Random: r.Int("random"), Every: r.Duration("every"), For: r.Duration("for")}
	switch {
	case r.IsSet("random") && opt.Random < 1:
		return usage("leave it out for all machines", "--random needs a number of machines")
	case r.IsSet("every") && opt.Every <= 0, r.IsSet("for") && opt.For <= 0:
		return usage("write 30s, 10m or 1h", "--every and --for need a time")
	case opt.For > 0 && opt.Every == 0:
		opt.Every = 10 * time.Minute
	case opt.Every > 0 && opt.For == 0:
		opt.For = math.MaxInt64
	}
	names, err := several(r.args)
	if err != nil {
		return err
	}
	want, l, err := a.wanted(ctx)
	if err != nil {
		return err
	}
	opt.Machines = names
	victims, err := l.Burnable(ctx, want, opt) // before anybody is asked
	if err != nil {
		return err
	}
	if !r.Bool("yes") {
		what := ui.Names(victims) + " of lab " + string(l.ID())
		if opt.Random > 0 && opt.Random < len(victims) {
			what = fmt.Sprintf("%d of %s of lab %s by chance", opt.Random, ui.Names(victims), l.ID())
		}
		if !a.interactive() {
			return usage("add --yes", "there is no terminal to ask on whether to destroy %s", what)
		}
		if err := a.ask(ctx, fmt.Sprintf("Destroy %s, disk and all, and bring them back?", what)); err != nil {
			return err
		}
	}
	show := a.show()
	opt.Events, opt.Command = show.event, a.typed
	opt.Tell = func(b engine.Burnt) {
		if opt.For > 0 && b.Trouble == "" { // a report at the end is far away
			show.pause()
			a.ui.Note("round %d: %s came back in %s", b.Round, b.Machine, b.Recovered.Round(10*time.Millisecond))
		}
	}
	burnt, err := l.Burn(ctx, want, opt)
	show.close()
	if len(burnt) == 0 {
		return err
	}
	slices.SortStableFunc(burnt, func(x, y engine.Burnt) int { return x.Round - y.Round })
	out := burnJSON{Burnt: burnt}
	for _, b := range burnt {
		out.Rounds = max(out.Rounds, b.Round)
		if b.Next > 0 {
			out.Recovered++
			out.Slowest = max(out.Slowest, b.Recovered)
		}
	}
	if a.asJSON {
		if perr := ui.JSON(a.Out, out); perr != nil {
			return perr
		}
		return err
	}
	if perr := ui.Burnt(a.Out, burnt, a.ui.OutPage()); perr != nil {
		return perr
	}
	if err == nil {
		a.ui.Note("%d of %d came back, the slowest in %s", out.Recovered, len(burnt), out.Slowest.Round(10*time.Millisecond))
	}
	return err
}
