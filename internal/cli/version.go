// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"
	"fmt"

	"github.com/labfile/lab/internal/ui"
)

func (a *app) versionCommand() *command {
	return &command{
		name: "version", group: groupTools, reports: true,
		short:    "print the version",
		examples: []string{"lab version --json", "for a program"},
		run: func(context.Context, request) error {
			v := a.Version()
			if a.asJSON {
				return ui.JSON(a.Out, v)
			}
			text := "lab " + v.Version
			if v.Commit != "" {
				text += " (" + v.Commit + ")"
			}
			_, err := fmt.Fprintf(a.Out, "%s %s %s\n", text, v.Go, v.Platform)
			return err
		},
	}
}
