// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"
	"errors"
	"fmt"

	"github.com/labfile/lab/internal/labfile"
	"github.com/labfile/lab/internal/ui"
)

// validateJSON is the schema of "lab validate --json".
type validateJSON struct {
	File     string        `json:"file"`
	Valid    bool          `json:"valid"`
	Problems []problemJSON `json:"problems"`
}

type problemJSON struct {
	File    string `json:"file"`
	Line    int    `json:"line"`
	Column  int    `json:"column"`
	Path    string `json:"path,omitempty"` // of the key: "machines.web.memory"
	Message string `json:"message"`
}

func (a *app) validateCommand() *command {
	return &command{
		name: "validate", group: groupLook, args: "[LABFILE]", max: 1, lab: true, reports: true,
		short: "check a Labfile and report every problem at once",
		long: `Reads the Labfile and says what is wrong with it, by line and column. Folders
that are mounted and files of provision steps must be there; user data must be what
cloud-init reads. No box is looked at, and nothing is started: "lab plan" finds out
the rest. Exit code 3 if there are problems.`,
		examples: []string{
			"lab validate", "the Labfile of this folder",
			"lab validate demo/Labfile --json", "another one, for an editor",
		},
		run: func(_ context.Context, r request) error {
			if len(r.args) == 1 {
				if a.set.string("file") != "" {
					return usage("leave one of them out", "two Labfiles are named: %q and --file", r.args[0])
				}
				a.set["file"] = r.args
			}
			path, err := a.labfilePath()
			if err != nil {
				return err
			}
			want, err := a.loadWhole(path)
			var bad *labfile.Problems
			if a.asJSON && (err == nil || errors.As(err, &bad)) {
				out := validateJSON{File: path, Valid: err == nil, Problems: []problemJSON{}}
				if bad != nil {
					for _, p := range bad.List {
						out.Problems = append(out.Problems, problemJSON{p.File, p.Line, p.Column, p.Path, p.Message})
					}
				}
				if err := ui.JSON(a.Out, out); err != nil {
					return err
				}
				if bad != nil {
					return exitCode(ExitUsage)
				}
				return nil
			}
			if err != nil {
				return err
			}
			noun := "machines"
			if len(want.Machines) == 1 {
				noun = "machine"
			}
			_, err = fmt.Fprintf(a.Out, "%s: lab %s, %d %s, no problems\n", path, want.Name, len(want.Machines), noun)
			return err
		},
	}
}

func (a *app) schemaCommand() *command {
	return &command{
		name: "schema", group: groupTools,
		short: "print the JSON schema of a Labfile",
		long: `Editors with a YAML language server complete and check a Labfile with it. It is
generated from the types that lab itself reads a Labfile into.`,
		examples: []string{"lab schema > labfile.schema.json", "for an editor"},
		run: func(context.Context, request) error {
			schema, err := labfile.Schema()
			if err != nil {
				return err
			}
			_, err = a.Out.Write(append(schema, '\n'))
			return err
		},
	}
}
