// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"
	"errors"
	"slices"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/labfile/lab/internal/engine"
	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/plan"
	"github.com/labfile/lab/internal/verify"
)

func junitFlag() cli.Flag {
	return &cli.StringFlag{Name: "junit", Usage: "write what became of the machines and their checks to `FILE`, as JUnit, also if some fail"}
}

// checked collects what an operation found out about machines, for a report.
type checked struct {
	began   time.Time
	results map[lab.Name][]verify.Result // of births, in the order of the Labfile
}

func newChecked() *checked { return &checked{time.Now(), map[lab.Name][]verify.Result{}} }

// add takes all results of a machine's birth.
func (c *checked) add(m lab.Name, results []verify.Result) { c.results[m] = results }

// readyName is the case of a report that says whether a machine became ready.
const readyName = "ready"

// report makes a report of a plan that was carried out, with err if it failed: for each
// machine whether it is ready, then its checks. Those of machines that were not born
// are carried out now.
func (a *app) report(ctx context.Context, l *engine.Lab, want *lab.Lab, p plan.Plan, c *checked, err error) verify.Report {
	var rest []lab.Name
	for _, s := range p.Steps {
		if c.results[s.Machine] == nil && s.Action != plan.Destroy {
			rest = append(rest, s.Machine)
		}
	}
	if len(rest) > 0 && ctx.Err() == nil {
		if now, err := l.Verify(ctx, want, engine.VerifyOptions{Machines: rest}); err == nil {
			for _, r := range now.Results {
				c.results[r.Machine] = append(c.results[r.Machine], r)
			}
		}
	}
	why := map[lab.Name]string{}
	var up *engine.UpError
	if errors.As(err, &up) {
		for _, f := range up.Failed {
			var checks *verify.FailedError
			if !errors.As(f.Err, &checks) || f.Instead != 0 {
				why[f.Machine] = f.Error()
			}
		}
		for _, name := range up.Skipped {
			why[name] = "not tried, because of what failed"
		}
	} else if err != nil {
		for _, s := range p.Steps {
			why[s.Machine] = err.Error()
		}
	}
	report := verify.Report{Results: []verify.Result{}, Took: time.Since(c.began)}
	for _, m := range want.Machines {
		if !slices.ContainsFunc(p.Steps, func(s plan.Step) bool { return s.Machine == m.Name && s.Action != plan.Destroy }) {
			continue
		}
		ready := verify.Result{Machine: m.Name, Name: readyName, Outcome: verify.Passed, Attempts: 1}
		if text := why[m.Name]; text != "" {
			ready.Outcome, ready.Reason = verify.Failed, text
		}
		report.Results = append(append(report.Results, ready), c.results[m.Name]...)
	}
	return report
}

// unbegun is the report of a plan of which nothing was carried out because of err: none
// of its machines is ready, or none of the Labfile's if there was no plan yet. Without it,
// a CI server would read the report of the run before.
func unbegun(want *lab.Lab, p plan.Plan, c *checked, err error) verify.Report {
	report := verify.Report{Results: []verify.Result{}, Took: time.Since(c.began)}
	for _, m := range want.Machines {
		if len(p.Steps) == 0 || slices.ContainsFunc(p.Steps, func(s plan.Step) bool { return s.Machine == m.Name }) {
			report.Results = append(report.Results, notReady(m.Name, err))
		}
	}
	return report
}

func notReady(m lab.Name, err error) verify.Result {
	return verify.Result{Machine: m, Name: readyName, Outcome: verify.Failed, Reason: err.Error(), Attempts: 1}
}

// unreadable writes the report that is wanted if not even the machines are known, because
// of err, which it returns: one failed case for the lab as a whole.
func (a *app) unreadable(r request, err error) error {
	if file := r.String("junit"); file != "" {
		report := verify.Report{Results: []verify.Result{notReady("lab", err)}}
		if werr := a.writeFile("lab", report, "junit", file); werr != nil {
			a.ui.Note("%v", werr)
		}
	}
	return err
}

// reported is carryOut for an operation whose report may be wanted in a file.
func (a *app) reported(ctx context.Context, r request, l *engine.Lab, want *lab.Lab, c *checked, do func(*shown) (plan.Plan, error)) error {
	file := r.String("junit")
	if file != "" {
		if _, err := a.output(file); err != nil {
			return err // before anything is done
		}
	}
	var p plan.Plan
	err := a.carryOut(ctx, l, want, func(show *shown) (plan.Plan, error) {
		var err error
		p, err = do(show)
		return p, err
	})
	if file == "" {
		return err
	}
	var up *engine.UpError
	var report verify.Report
	if err != nil && (len(p.Steps) == 0 || ctx.Err() == nil && !errors.As(err, &up)) {
		report = unbegun(want, p, c, err)
	} else {
		report = a.report(ctx, l, want, p, c, err)
	}
	werr := a.writeFile(l.ID(), report, "junit", file)
	if werr != nil && err != nil {
		a.ui.Note("%v", werr)
		return err
	}
	if err != nil {
		return err
	}
	return werr
}
