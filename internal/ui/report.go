// SPDX-License-Identifier: Apache-2.0

package ui

import (
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/labfile/lab/internal/engine"
	"github.com/labfile/lab/internal/ledger"
	"github.com/labfile/lab/providers"
)

// stateColor is the colour of a machine's state.
func stateColor(state engine.MachineState) Color {
	switch state {
	case engine.StateReady:
		return Green
	case engine.StateFailed, engine.StateExited, engine.StateBroken, engine.StatePaused, engine.StateMissing, engine.StateUnreachable:
		return Red
	case engine.StateStarting:
		return Yellow
	}
	return Plain
}

// Status prints a lab's machines. now is what uptimes are counted to.
func Status(w io.Writer, s engine.Status, now time.Time, page Page) error {
	fmt.Fprintf(w, "lab %s (%s)\n", s.ID, s.Provider)
	if len(s.Machines) == 0 {
		_, err := fmt.Fprintln(w, "no machines")
		return err
	}
	fmt.Fprintln(w)
	t := Table{squeezes: []squeeze{
		{how: fold, column: 4},
		{how: drop, column: 6},
		{how: drop, column: 7},
		{how: drop, column: 8},
		{how: drop, column: 5},
		{how: drop, column: 9},
		{how: drop, column: 10},
		{how: under, column: 4},
	}}
	t.Row("NAME", "GEN", "STATE", "ADDRESS", "PORTS", "BOX", "CPUS", "MEMORY", "DISK", "WRITTEN", "UPTIME")
	for _, m := range s.Machines {
		var ports []string
		for _, p := range m.Ports {
			ports = append(ports, fmt.Sprintf("%d->%d%s", p.Host, p.Guest, p.Protocol()))
		}
		gen, cpus, memory, disk, drift, uptime := "", "", "", "", "", ""
		if m.Generation > 0 {
			gen = strconv.Itoa(m.Generation)
		}
		if m.CPUs > 0 {
			cpus = strconv.Itoa(m.CPUs)
		}
		if m.Memory > 0 {
			memory = m.Memory.String()
		}
		if m.DiskUsed > 0 {
			disk = Size(int64(m.DiskUsed))
		}
		if m.Ready != nil && m.DiskUsed > 0 {
			drift = Size(int64(m.Written))
		}
		if m.Running != nil {
			uptime = elapsed(now.Sub(*m.Running))
		}
		t.Row(string(m.Name), gen, string(m.State), m.Address, strings.Join(ports, " "), m.Box, cpus, memory, disk, drift, uptime)
		t.Paint(2, stateColor(m.State))
	}
	if err := t.Print(w, page); err != nil {
		return err
	}
	gap := "\n"
	say := func(what, text string) error {
		if text == "" {
			return nil
		}
		var b strings.Builder
		b.WriteString(gap)
		hanging(&b, "", what+": "+Clean(text), 2, page)
		gap = ""
		_, err := io.WriteString(w, b.String())
		return err
	}
	for _, m := range s.Machines {
		notes := []string{m.Reason}
		if len(m.Tainted) > 0 {
			notes = append(notes, "tainted: "+strings.Join(m.Tainted, "; "))
		}
		if m.Expired != "" {
			notes = append(notes, "expired: "+m.Expired)
		}
		for _, note := range notes {
			if err := say(string(m.Name), note); err != nil {
				return err
			}
		}
	}
	if s.Expires == nil {
		return nil
	}
	if left := s.Expires.Sub(now); left > 0 {
		return say("the lab", "it is destroyed in "+elapsed(left))
	}
	return say("the lab", "its time is over; its supervisor destroys it")
}

// Labs prints the labs of the user.
func Labs(w io.Writer, labs []engine.Summary, page Page) error {
	if len(labs) == 0 {
		_, err := fmt.Fprintln(w, "no labs")
		return err
	}
	t := Table{squeezes: []squeeze{
		{how: under, column: 6}, {how: under, column: 5}, {how: drop, column: 2}, {how: drop, column: 4},
	}}
	t.Row("LAB", "MACHINES", "RUNNING", "READY", "PROVIDER", "LABFILE", "NOTE")
	for _, s := range labs {
		note := s.Problem
		if note == "" && s.LabfileGone {
			note = "the Labfile is gone"
		}
		if note == "" && len(s.Volumes) > 0 {
			note = "destroyed; its volumes are kept: " + strings.Join(s.Volumes, ", ")
		}
		t.Row(string(s.ID), strconv.Itoa(s.Machines), strconv.Itoa(s.Running), strconv.Itoa(s.Ready), s.Provider, s.Labfile, note)
		t.Paint(6, Yellow)
	}
	return t.Print(w, page)
}

// History prints the ledger, oldest record first, in local time: a command once, and
// below it what it did. What no command did, or a supervisor by itself, stands for itself.
func History(w io.Writer, records []ledger.Record, page Page) error {
	var b strings.Builder
	command, run := "", ""
	for _, r := range records {
		typed := r.Command != "" && r.Command != ledger.Supervisor
		if typed && (r.Command != command || r.Run != run) {
			hanging(&b, "", Clean(r.Command), 4, page)
		}
		head := r.Time.Local().Format(time.DateTime)
		if typed { // what a supervisor records stands between, and does not end it
			head, command, run = "  "+head, r.Command, r.Run
		}
		indent := width(head) + 2
		hanging(&b, Dim.paint(head, page.Color)+"  ", Clean(r.Summary()), indent, page)
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// Findings prints what lab needs of the host and what it found.
func Findings(w io.Writer, findings []providers.Finding, page Page) error {
	var b strings.Builder
	wide := 0
	for _, f := range findings {
		wide = max(wide, width(f.Topic))
	}
	errors, warnings := 0, 0
	for _, f := range findings {
		c := Green
		switch f.Level {
		case providers.LevelError:
			c, errors = Red, errors+1
		case providers.LevelWarning:
			c, warnings = Yellow, warnings+1
		}
		head := c.paint(pad(string(f.Level), len(providers.LevelWarning)), page.Color) + "  " + pad(Clean(f.Topic), wide) + "  "
		hanging(&b, head, Clean(f.Detail), len(providers.LevelWarning)+2+wide+2, page)
		if f.Cure != "" {
			fmt.Fprintf(&b, "%s  -> %s\n", strings.Repeat(" ", len(providers.LevelWarning)+2+wide), Clean(f.Cure))
		}
	}
	b.WriteByte('\n')
	switch {
	case errors > 0:
		fmt.Fprintf(&b, "%s: machines cannot run here yet.\n", Count(errors, "problem"))
	case warnings > 0:
		fmt.Fprintf(&b, "Machines can run here; %s above.\n", Count(warnings, "warning"))
	default:
		b.WriteString("Machines can run here.\n")
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// Garbage prints what gc removed, or would remove.
func Garbage(w io.Writer, found []engine.Garbage, dry bool, page Page) error {
	if len(found) == 0 {
		_, err := fmt.Fprintln(w, "nothing to remove")
		return err
	}
	t := Table{squeezes: []squeeze{{how: fold, column: 3, least: 24}, {how: under, column: 3}, {how: under, column: 1}}}
	t.Row("KIND", "NAME", "SIZE", "WHY")
	var total int64
	for _, g := range found {
		size := ""
		if g.Bytes > 0 {
			size = Size(int64(g.Bytes))
		}
		total += int64(g.Bytes)
		t.Row(g.Kind, g.Name, size, g.Why)
	}
	if err := t.Print(w, page); err != nil {
		return err
	}
	verb := "removed"
	if dry {
		verb = "would be removed"
	}
	_, err := fmt.Fprintf(w, "\n%s %s, %s\n", Count(len(found), "thing"), verb, Size(total))
	return err
}

// LockChanges prints how the lock file moved.
func LockChanges(w io.Writer, changes []engine.LockChange, page Page) error {
	if len(changes) == 0 {
		_, err := fmt.Fprintln(w, "the lock file is up to date")
		return err
	}
	t := Table{squeezes: []squeeze{{how: under, column: 1}}}
	t.Row("BOX", "FROM", "OLD", "NEW")
	for _, c := range changes {
		t.Row(c.Box, c.From, ShortDigest(c.Old), ShortDigest(c.New))
	}
	return t.Print(w, page)
}

// ShortDigest shortens "sha256:<64 hex digits>" to what tells boxes apart.
func ShortDigest(d string) string {
	_, hex, found := strings.Cut(d, ":")
	if !found || len(hex) < 12 {
		return d
	}
	return hex[:12]
}
