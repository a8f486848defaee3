// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"
	"log/slog"

	"github.com/labfile/lab/internal/lab"
)

func (a *app) superviseCommand() *command {
	return &command{
		name: "supervise", hidden: true, args: "ID", min: 1, max: 1,
		short: "be the supervisor of a lab",
		long: `Owns the lab's network and watches its machines, until the last one has ended.
lab starts it by itself; its log goes to stderr.`,
		run: func(ctx context.Context, r request) error {
			if !lab.ValidLabel(r.args[0]) {
				return usage("lab starts its supervisors by itself", "%q is no lab's ID", r.args[0])
			}
			level := slog.LevelInfo
			if a.verbose {
				level = slog.LevelDebug
			}
			log := slog.New(slog.NewTextHandler(a.Err, &slog.HandlerOptions{Level: level}))
			return a.Supervise(ctx, lab.ID(r.args[0]), log)
		},
	}
}
