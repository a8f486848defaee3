// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"
	"strconv"
	"strings"
	"time"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/ui"
)

func (a *app) showCommand() *command {
	return &command{
		name: "show", group: groupLook, args: "MACHINE[@GENERATION]", min: 1, max: 1, lab: true, reports: true,
		short: "show one generation of a machine",
		long: `Prints what the ledger says of a generation: why it was born, from which image and
specification, when it became ready, and how it ended. Without a number it is the
present one. "lab history MACHINE" lists them all.`,
		complete: a.completeMachines,
		examples: []string{
			"lab show web", "the present generation",
			"lab show web@3", "an earlier one",
			"lab show web@3 --json", "for a program",
		},
		run: func(ctx context.Context, r request) error {
			name, number, err := generation(r.args[0])
			if err != nil {
				return err
			}
			l, err := a.existing(ctx)
			if err != nil {
				return err
			}
			if name, err = l.One(name); err != nil {
				return err
			}
			g, err := l.Generation(name, number)
			if err != nil {
				return err
			}
			if a.asJSON {
				return ui.JSON(a.Out, g)
			}
			return ui.Generation(a.Out, g, time.Now(), a.ui.ColorOut)
		},
	}
}

// generation reads an argument such as "web@3"; the number is 0 if there is none.
func generation(arg string) (lab.Name, int, error) {
	name, digits, found := strings.Cut(arg, "@")
	if names, err := machines([]string{name}); err != nil || !found {
		if err != nil {
			return "", 0, err
		}
		return names[0], 0, nil
	}
	number, err := strconv.Atoi(digits)
	if err != nil || number < 1 || digits != strconv.Itoa(number) {
		return "", 0, usage("write MACHINE@NUMBER, such as web@3; \"lab history "+name+"\" shows the numbers", "%q is no generation", ui.Clean(arg))
	}
	return lab.Name(name), number, nil
}
