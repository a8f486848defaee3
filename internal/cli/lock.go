// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"

	"github.com/urfave/cli/v2"

	"github.com/labfile/lab/internal/engine"
	"github.com/labfile/lab/internal/ui"
)

// lockJSON is the schema of "lab lock --json".
type lockJSON struct {
	Changes []engine.LockChange `json:"changes"`
}

func (a *app) lockCommand() *command {
	return &command{
		name: "lock", group: groupKeep, lab: true, reports: true,
		short: "pin the Labfile's boxes in Labfile.lock",
		long: `Writes the digest of every box that is not pinned yet into Labfile.lock, which
belongs into version control. With --update every box is looked up again, and
moved to what its source has now; machines follow at the next "lab up".`,
		flags: []cli.Flag{&cli.BoolFlag{Name: "update", Usage: "move every box to what its source has now"}},
		examples: []string{
			"lab lock", "pin what is not pinned",
			"lab lock --update", "move to newer boxes",
		},
		run: func(ctx context.Context, r request) error {
			want, l, err := a.wantedBy(ctx, a.load)
			if err != nil {
				return err
			}
			show := a.show()
			changes, err := l.PinBoxes(ctx, want, r.Bool("update"), engine.Options{Events: show.event, Command: a.typed})
			show.close()
			if err != nil {
				return err
			}
			if a.asJSON {
				if changes == nil {
					changes = []engine.LockChange{}
				}
				return ui.JSON(a.Out, lockJSON{changes})
			}
			return ui.LockChanges(a.Out, changes, a.ui.OutPage())
		},
	}
}
