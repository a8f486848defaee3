// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"

	"github.com/labfile/lab/internal/engine"
	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/ledger"
)

func (a *app) tendCommand() *command {
	return &command{
		name: "tend", hidden: true, args: "ID", min: 1, max: 1,
		short: "replace, stop or destroy what has expired",
		long: `Does what is due by max_age, idle and expires. A lab's supervisor starts it by itself;
its progress goes to the supervisor's log.`,
		run: func(ctx context.Context, r request) error {
			if !lab.ValidLabel(r.args[0]) {
				return usage("a lab's supervisor starts it by itself", "%q is no lab's ID", r.args[0])
			}
			h, err := a.host()
			if err != nil {
				return err
			}
			show := a.show()
			_, err = h.Lab(lab.ID(r.args[0])).Tend(ctx, engine.Options{Command: ledger.Supervisor, Events: show.event})
			show.close()
			a.rewriteSSH(ctx, h)
			return err
		},
	}
}
