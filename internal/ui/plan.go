// SPDX-License-Identifier: Apache-2.0

package ui

import (
	"fmt"
	"io"
	"strings"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/plan"
)

// symbol is how an action is drawn, in a plan and nowhere else.
func symbol(s plan.Step) (string, Color) {
	switch s.Action {
	case plan.Create:
		return "+", Green
	case plan.Start:
		return ">", Green
	case plan.Replace:
		return "-/+", Yellow
	case plan.Destroy:
		return "-", Red
	}
	if s.InPlace() {
		return "~", Yellow
	}
	return "=", Dim
}

// generations says which generation goes and which comes.
func generations(s plan.Step) string {
	switch s.Action {
	case plan.Create:
		return fmt.Sprintf("generation %d", s.Next)
	case plan.Replace:
		return fmt.Sprintf("generation %d -> %d%s", s.Generation, s.Next, strategy(s))
	case plan.Destroy:
		if s.Generation == 0 {
			return ""
		}
	}
	return fmt.Sprintf("generation %d", s.Generation)
}

// strategy says in a few words how a machine is replaced, unless that goes without
// saying.
func strategy(s plan.Step) string {
	switch {
	case s.Strategy == lab.BlueGreen || s.Strategy == lab.Rolling:
		return ", " + string(s.Strategy)
	case s.StrategyWhy != "" && s.StrategyWhy != plan.NotRunning:
		return ", " + string(s.Strategy) + ": " + Clean(s.StrategyWhy)
	}
	return ""
}

// Plan prints what is going to be done and why.
func Plan(w io.Writer, p plan.Plan, color bool) error {
	var b strings.Builder
	fmt.Fprintf(&b, "lab %s\n\n", p.Lab)
	wide := 0
	for _, s := range p.Steps {
		wide = max(wide, width(string(s.Machine)))
	}
	for _, s := range p.Steps {
		sym, c := symbol(s)
		line := fmt.Sprintf("  %s  %s  %s  %s", c.paint(pad(sym, 3), color), pad(string(s.Machine), wide),
			pad(string(s.Action), len(plan.Replace)), generations(s))
		b.WriteString(strings.TrimRight(line, " ") + "\n")
		indent := strings.Repeat(" ", 2+3+2+wide+2)
		if s.Undone != "" {
			fmt.Fprintf(&b, "%s%s\n", indent, Clean(s.Undone))
		}
		for _, r := range s.Reasons {
			fmt.Fprintf(&b, "%s%s\n", indent, Clean(r))
		}
		for _, r := range s.Bake {
			fmt.Fprintf(&b, "%sbake %s\n", indent, Clean(r))
		}
		for _, r := range s.Changes {
			fmt.Fprintf(&b, "%s~ %s\n", indent, Clean(r))
		}
		for _, g := range s.Retire {
			fmt.Fprintf(&b, "%s~ generation %d gave way and is kept, stopped\n", indent, g)
		}
		for _, g := range s.Leftovers {
			if g == s.Generation && s.Action != plan.Keep {
				continue // it is what is replaced or destroyed
			}
			fmt.Fprintf(&b, "%s~ left-over generation %d is removed\n", indent, g)
		}
	}
	if len(p.Steps) > 0 {
		b.WriteByte('\n')
	}
	b.WriteString(summary(p) + "\n")
	_, err := io.WriteString(w, b.String())
	return err
}

// summary is the plan in one sentence.
func summary(p plan.Plan) string {
	if !p.Changes() {
		return "Nothing to do: " + Count(len(p.Steps), "machine") + " as wanted."
	}
	var parts []string
	for _, a := range []struct {
		action plan.Action
		verb   string
	}{
		{plan.Create, "create"}, {plan.Start, "start"}, {plan.Replace, "replace"}, {plan.Destroy, "destroy"},
	} {
		if n := p.Count(a.action); n > 0 {
			parts = append(parts, fmt.Sprintf("%d to %s", n, a.verb))
		}
	}
	changed, kept := 0, 0
	for _, s := range p.Steps {
		if s.Action != plan.Keep {
			continue
		}
		if s.InPlace() {
			changed++
		} else {
			kept++
		}
	}
	if changed > 0 {
		parts = append(parts, fmt.Sprintf("%d to change in place", changed))
	}
	if kept > 0 {
		parts = append(parts, fmt.Sprintf("%d unchanged", kept))
	}
	return "Plan: " + strings.Join(parts, ", ") + "."
}

// PlanJSON is the schema of a plan for programs.
type PlanJSON struct {
	Changes bool `json:"changes"`
	plan.Plan
}
