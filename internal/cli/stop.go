// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/labfile/lab/internal/engine"
	"github.com/labfile/lab/internal/ui"
)

func (a *app) stopCommand() *command {
	return &command{
		name: "stop", group: groupDaily, args: "[MACHINE...]", max: -1, lab: true,
		short: "shut machines down and keep their disks",
		long: `Asks the guests to shut down, and cuts the power of those that take longer than
--grace. A machine that cannot be asked runs on, and the command fails, unless you say
--force. Disks, names and addresses stay.`,
		flags:    stopFlags(),
		complete: a.completeMachines,
		examples: []string{
			"lab stop", "all machines",
			"lab stop web --force", "one machine, even if it does not answer",
			"lab stop web --grace 0s", "one machine, without asking it",
		},
		run: func(ctx context.Context, r request) error {
			if err := checkGrace(r); err != nil {
				return err
			}
			return a.change(ctx, r, func(l *engine.Lab, o engine.Options) error { return stop(ctx, r, l, o) })
		},
	}
}

func stopFlags() []cli.Flag {
	return []cli.Flag{
		&cli.DurationFlag{
			Name: "grace", Value: 30 * time.Second, Usage: "give guests `TIME` to shut down; 0 cuts the power at once (default: 30s)",
		},
		&cli.BoolFlag{Name: "force", Usage: "cut the power of machines that cannot be asked to shut down"},
	}
}

// stop carries out engine.Lab.Stop as the stopFlags say.
func stop(ctx context.Context, r request, l *engine.Lab, o engine.Options) error {
	o.Force = r.Bool("force")
	return l.Stop(ctx, engine.StopOptions{Options: o, Grace: r.Duration("grace")})
}

// checkGrace refuses a --grace that no guest can be given.
func checkGrace(r request) error {
	if r.Duration("grace") < 0 {
		return usage("write a time such as 30s", "--grace cannot be negative")
	}
	return nil
}

func (a *app) restartCommand() *command {
	return &command{
		name: "restart", group: groupDaily, args: "[MACHINE...]", max: -1, lab: true,
		short: "shut machines down and boot them again",
		long: `Stops the machines as "lab stop" does and starts them as "lab start" does: disks, names
and addresses stay, and nothing is replaced. A machine that cannot be asked to shut
down runs on, and the command fails, unless you say --force.`,
		flags:    stopFlags(),
		complete: a.completeMachines,
		examples: []string{
			"lab restart web", "one machine",
			"lab restart", "all machines",
		},
		run: func(ctx context.Context, r request) error {
			if err := checkGrace(r); err != nil {
				return err
			}
			return a.change(ctx, r, func(l *engine.Lab, o engine.Options) error {
				err := stop(ctx, r, l, o)
				var some *engine.UpError // the others are down by now
				if err != nil && !errors.As(err, &some) {
					return err
				}
				if serr := l.Start(ctx, o); err == nil {
					return serr
				}
				return err
			})
		},
	}
}

func (a *app) startCommand() *command {
	return &command{
		name: "start", group: groupDaily, args: "[MACHINE...]", max: -1, lab: true,
		short: "boot stopped machines again",
		long: `Boots machines that were stopped, as they were, and waits until they are ready.
It needs no Labfile and replaces nothing; "lab up" also takes up changes.`,
		complete: a.completeMachines,
		examples: []string{
			"lab start", "all machines",
			"lab start db", "one machine",
		},
		run: func(ctx context.Context, r request) error {
			return a.change(ctx, r, func(l *engine.Lab, o engine.Options) error { return l.Start(ctx, o) })
		},
	}
}

// change carries out something that needs no Labfile.
func (a *app) change(ctx context.Context, r request, do func(*engine.Lab, engine.Options) error) error {
	names, err := several(r.args)
	if err != nil {
		return err
	}
	l, err := a.existing(ctx)
	if err != nil {
		return err
	}
	show := a.show()
	err = do(l, engine.Options{Machines: names, Events: show.event, Command: a.typed})
	show.close()
	return err
}

func (a *app) destroyCommand() *command {
	return &command{
		name: "destroy", aliases: []string{"down"}, group: groupDaily, args: "[MACHINE...]", max: -1, lab: true,
		short: "remove machines and everything that belongs to them",
		long: `Ends the machines and removes their disks; without names, the whole lab: its
keys, its network and its record too. Boxes stay, and so do volumes unless you say
--volumes. A machine that writes to a volume is shut down first; if it cannot be asked
to, nothing is removed unless you say --force. It asks on a terminal and wants --yes
elsewhere. It works without the Labfile and with a damaged record.`,
		flags: []cli.Flag{
			yesFlag(),
			&cli.BoolFlag{Name: "volumes", Usage: "remove their volumes, too, with all snapshots"},
			&cli.BoolFlag{Name: "force", Usage: "cut the power of machines with volumes that cannot be asked to shut down"},
		},
		complete: a.completeMachines,
		examples: []string{
			"lab destroy", "the whole lab",
			"lab destroy web --yes", "one machine, without asking",
			"lab destroy --lab ID --yes", "a lab whose Labfile is gone",
		},
		run: a.destroy,
	}
}

func (a *app) destroy(ctx context.Context, r request) error {
	names, err := several(r.args)
	if err != nil {
		return err
	}
	l, err := a.existing(ctx)
	if err != nil {
		return err
	}
	if !r.Bool("yes") {
		what := "the lab " + string(l.ID()) + " with all its machines and disks"
		if len(names) > 0 {
			what = ui.Names(names) + " of lab " + string(l.ID()) + ", disk and all"
		}
		if r.Bool("volumes") {
			what += ", and the volumes with their data"
		}
		if !a.interactive() {
			return usage("add --yes", "there is no terminal to ask on whether to destroy %s", what)
		}
		if _, err := l.Status(ctx); errors.Is(err, engine.ErrNoLab) {
			return err
		}
		if err := a.ask(ctx, fmt.Sprintf("Destroy %s?", what)); err != nil {
			return err
		}
	}
	show := a.show()
	err = l.Destroy(ctx, engine.Options{Machines: names, Events: show.event, Command: a.typed, Volumes: r.Bool("volumes"), Force: r.Bool("force")})
	show.close()
	if h, herr := a.host(); herr == nil {
		a.rewriteSSH(ctx, h)
	}
	if errors.Is(err, engine.ErrNoLab) && len(names) == 0 && r.Bool("yes") {
		a.ui.Note("there is no lab %s: nothing to destroy", l.ID())
		return nil
	}
	return err
}
