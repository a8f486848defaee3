// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/labfile/lab/internal/engine"
	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/ui"
	"github.com/labfile/lab/internal/verify"
)

// reportFormats are the forms of a report.
var reportFormats = []string{"human", "json", "tap", "junit"}

func (a *app) verifyCommand() *command {
	return &command{
		name: "verify", group: groupLook, args: "[MACHINE...]", max: -1, lab: true, reports: true,
		short: "find out whether machines are as the Labfile's checks want them",
		long: `Carries out the checks of the Labfile on the machines that they are for, over ssh;
nothing is installed in a machine or changed. Exit code 0 if all of them passed, 2 if
some did not, 1 if they could not be carried out. A machine that is not up passes
none.

With --output the report is written to a file, and what is printed is for people.`,
		flags: []cli.Flag{
			&cli.StringFlag{Name: "format", Usage: "print the report as `FORMAT`: human, json, tap (version 14) or junit"},
			&cli.StringFlag{Name: "output", Aliases: []string{"o"}, Usage: "write the report to `FILE`"},
		},
		complete: a.completeMachines,
		examples: []string{
			"lab verify", "every check on every machine",
			"lab verify web", "those of one machine, or of all replicas",
			"lab verify --format junit -o checks.xml", "for a CI server",
		},
		run: a.verify,
	}
}

func (a *app) verify(ctx context.Context, r request) error {
	format := r.String("format")
	if format == "" {
		format = "human"
		if a.asJSON {
			format = "json"
		}
	}
	if !slices.Contains(reportFormats, format) {
		return usage("the formats are "+strings.Join(reportFormats, ", "), "there is no format %q", ui.Clean(format))
	}
	if a.asJSON && format != "json" {
		return usage("leave one of them out", "--json and --format %s exclude each other", format)
	}
	if file := r.String("output"); file != "" {
		if _, err := a.output(file); err != nil {
			return err
		}
	}
	names, err := several(r.args)
	if err != nil {
		return err
	}
	want, l, err := a.existingAnd(ctx)
	if err != nil {
		return err
	}
	show := a.show()
	o := engine.VerifyOptions{Machines: names, Events: show.event}
	if a.ui.Size != nil || a.verbose { // anywhere else the report says it all, a moment later
		o.Progress = func(r verify.Result) {
			show.event(engine.Event{
				Time: time.Now(), Machine: r.Machine, Stage: engine.StageVerify, Text: fmt.Sprintf("%s: %s", r.Name, r.Outcome),
			})
		}
	}
	report, err := l.Verify(ctx, want, o)
	show.close()
	if err != nil {
		return err
	}
	if err := a.writeReport(l.ID(), report, format, r.String("output")); err != nil {
		return err
	}
	if len(report.Results) == 0 {
		a.ui.Note("%s", noChecks(want, names))
	}
	if report.Count(verify.Failed) > 0 {
		return exitCode(ExitDifferent)
	}
	return nil
}

// noChecks says why there was nothing to verify. want is the Labfile, or nil without
// one, and names are the machines that were asked for.
func noChecks(want *lab.Lab, names []lab.Name) string {
	has := func(m lab.Machine) bool { return len(m.Tests) > 0 }
	if len(names) > 0 && want != nil && slices.ContainsFunc(want.Machines, has) {
		return "the Labfile has no checks for " + ui.Names(names)
	}
	return "no checks in the Labfile; docs/labfile.md says how to write them"
}

// writeReport prints the report or, if file is not empty, writes it there and
// prints it for people.
func (a *app) writeReport(id lab.ID, report verify.Report, format, file string) error {
	if file == "" {
		return formatReport(a.Out, id, report, format, a.ui.ColorOut)
	}
	if err := a.writeFile(id, report, format, file); err != nil {
		return err
	}
	return formatReport(a.Out, id, report, "human", a.ui.ColorOut)
}

// formatReport prints a report in one of the reportFormats.
func formatReport(w io.Writer, id lab.ID, report verify.Report, format string, color bool) error {
	switch format {
	case "json":
		return ui.JSON(w, ui.NewVerifyJSON(id, report))
	case "tap":
		return ui.TAP(w, report)
	case "junit":
		return ui.JUnit(w, id, report)
	}
	return ui.Verify(w, report, color)
}

// writeFile writes a report to a file, which a relative path finds from here.
func (a *app) writeFile(id lab.ID, report verify.Report, format, file string) error {
	var b bytes.Buffer
	if err := formatReport(&b, id, report, format, false); err != nil {
		return err
	}
	file, err := a.output(file)
	if err != nil {
		return err
	}
	if err := os.WriteFile(file, b.Bytes(), 0o644); err != nil {
		return fmt.Errorf("writing the report: %w", err)
	}
	return nil
}
