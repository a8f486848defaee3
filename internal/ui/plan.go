// SPDX-License-Identifier: Apache-2.0

package ui

import (
	"fmt"
	"io"
	"slices"
	"strconv"
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
		return fmt.Sprintf("generation %d -> %d", s.Generation, s.Next)
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
	case s.Action != plan.Replace:
	case s.Strategy == lab.BlueGreen || s.Strategy == lab.Rolling:
		return string(s.Strategy)
	case s.StrategyWhy != "" && s.StrategyWhy != plan.NotRunning:
		return string(s.Strategy) + ": " + Clean(s.StrategyWhy)
	}
	return ""
}

// Plan prints what is going to be done and why. Replicas to which the same happens for
// the same reasons are told together.
func Plan(w io.Writer, p plan.Plan, page Page) error {
	var b strings.Builder
	fmt.Fprintf(&b, "lab %s\n\n", p.Lab)
	for _, line := range p.Changed {
		hanging(&b, "  ~    ", Clean(line), 2+3+2, page)
	}
	var groups []stepGroup
	wide := 0
	for i := 0; i < len(p.Steps); {
		g := group(p.Steps[i:])
		i += g.steps
		groups = append(groups, g)
		for _, h := range g.heads {
			wide = max(wide, width(h.names))
		}
	}
	for _, g := range groups {
		sym, c := symbol(g.first)
		indent := 2 + 3 + 2 + wide + 2
		if page.Width > 0 && indent > page.Width/2 {
			indent = 2 + 3 + 2
		}
		body, how := g.body, strategy(g.first)
		column := 2 + 3 + 2 + wide + 2 + len(plan.Replace) + 2
		if how != "" && page.Width > 0 && column+width(g.heads[0].generations+", "+how) > page.Width {
			body, how = append([]string{how}, body...), ""
		}
		for _, h := range g.heads {
			action := pad(string(g.first.Action), len(plan.Replace))
			head := fmt.Sprintf("  %s  %s  %s  ", c.paint(pad(sym, 3), page.Color), pad(h.names, wide), action)
			text := h.generations
			if how != "" {
				text += ", " + how
			}
			hanging(&b, head, text, column, page)
		}
		for _, line := range body {
			hanging(&b, strings.Repeat(" ", indent), line, indent+2, page)
		}
	}
	if len(p.Changed)+len(p.Steps) > 0 {
		b.WriteByte('\n')
	}
	hanging(&b, "", summary(p), 2, page)
	_, err := io.WriteString(w, b.String())
	return err
}

// stepGroup is what is told of steps together.
type stepGroup struct {
	first plan.Step
	steps int // how many
	heads []stepHead
	body  []string
}

// stepHead is machines whose generations are the same.
type stepHead struct{ names, generations string }

// group returns the group that the first of the steps begins: the replicas behind it
// to which the same happens.
func group(steps []plan.Step) stepGroup {
	g := stepGroup{first: steps[0], body: body(steps[0])}
	var names []string
	flush := func(generations string) {
		if len(names) > 0 {
			g.heads = append(g.heads, stepHead{together(names), generations})
		}
		names = nil
	}
	before := generations(g.first)
	for _, s := range steps {
		if g.steps > 0 && (role(s.Machine) == "" || role(s.Machine) != role(g.first.Machine) || s.Action != g.first.Action || strategy(s) != strategy(g.first) || !slices.Equal(body(s), g.body)) {
			break
		}
		if now := generations(s); now != before {
			flush(before)
			before = now
		}
		names = append(names, string(s.Machine))
		g.steps++
	}
	flush(before)
	return g
}

// together names replicas; those whose numbers follow each other as "web-1 to -3".
func together(names []string) string {
	first, last := names[0], names[len(names)-1]
	if len(names) > 2 && number(last)-number(first) == len(names)-1 {
		return first + " to " + last[strings.LastIndexByte(last, '-'):]
	}
	return strings.Join(names, ", ")
}

// number is that of a replica.
func number(name string) int {
	n, _ := strconv.Atoi(name[strings.LastIndexByte(name, '-')+1:])
	return n
}

// role is what replicas of one role are called alike; empty if it is none's name.
func role(name lab.Name) string {
	i := strings.LastIndexByte(string(name), '-')
	if i <= 0 {
		return ""
	}
	if _, err := strconv.Atoi(string(name[i+1:])); err != nil {
		return ""
	}
	return string(name[:i])
}

// body is what a plan says below a step.
func body(s plan.Step) []string {
	var lines []string
	say := func(format string, a ...any) { lines = append(lines, Clean(fmt.Sprintf(format, a...))) }
	if s.Undone != "" {
		say("%s", s.Undone)
	}
	for _, r := range s.Reasons {
		say("%s", r)
	}
	for _, r := range s.Bake {
		say("bake %s", r)
	}
	for _, r := range s.Changes {
		say("~ %s", r)
	}
	for _, g := range s.Retire {
		say("~ generation %d is stopped and kept", g)
	}
	for _, g := range s.Leftovers {
		if g == s.Generation && s.Action != plan.Keep {
			continue // it is what is replaced or destroyed
		}
		switch {
		case !slices.Contains(s.Pruned, g):
			say("~ generation %d is removed", g)
		case s.Kept == 0:
			say("~ generation %d is removed (none are kept)", g)
		case s.Kept == 1:
			say("~ generation %d is removed (1 is kept)", g)
		default:
			say("~ generation %d is removed (%d are kept)", g, s.Kept)
		}
	}
	return lines
}

// summary is the plan in one sentence.
func summary(p plan.Plan) string {
	if !p.Changes() {
		return "Nothing to do: " + Count(len(p.Steps), "machine") + " as wanted."
	}
	var parts []string
	if len(p.Changed) > 0 {
		parts = append(parts, "the lab to change in place")
	}
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
