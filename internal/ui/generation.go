// SPDX-License-Identifier: Apache-2.0

package ui

import (
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/ledger"
)

// Generation prints what is known of one generation.
func Generation(w io.Writer, g ledger.Generation, now time.Time, color bool) error {
	var b strings.Builder
	c := Dim
	switch g.Phase {
	case ledger.PhaseReady:
		c = Green
	case ledger.PhaseFailed, ledger.PhaseExited:
		c = Red
	}
	fmt.Fprintf(&b, "%s  %s\n", g, c.paint(string(g.Phase), color))
	line := func(name, format string, a ...any) {
		fmt.Fprintf(&b, "  %s  %s\n", pad(name, 8), Clean(fmt.Sprintf(format, a...)))
	}
	moment := func(name string, t time.Time, more string) {
		line(name, "%s (%s ago)%s", t.Local().Format(time.DateTime), Duration(max(0, now.Sub(t))), more)
	}
	for i, why := range g.Why {
		name := "why"
		if i > 0 {
			name = ""
		}
		line(name, "%s", why)
	}
	if g.Rollback > 0 {
		line("rollback", "to generation %d", g.Rollback)
	}
	if g.Command != "" {
		line("command", "%s", g.Command)
	}
	moment("created", g.Created, "")
	if g.Born != nil {
		moment("born", *g.Born, ", ready after "+Duration(g.Took))
	}
	if g.Trouble != "" {
		line("trouble", "%s", g.Trouble)
	}
	if g.Ended != nil {
		moment("ended", *g.Ended, "")
		for _, why := range g.End {
			line("", "%s", why)
		}
	}
	from := g.Spec.Box
	if g.From != "" && g.From != g.Spec.Box {
		from += ", " + g.From
	}
	line("box", "%s", from)
	line("image", "%s", g.Image)
	for _, l := range g.Layers {
		line("", "%s  %s", ShortDigest(l.Key), l.Text)
	}
	for i, s := range g.Spec.Boot {
		name := "boot"
		if i > 0 {
			name = ""
		}
		line(name, "%s", lab.Provision(s.Provision))
	}
	if g.Boot != nil {
		line("", "%s  ran in %s", ShortDigest(g.Boot.Digest), Duration(g.Boot.Took))
	}
	line("spec", "%s", g.SpecDigest)
	size := fmt.Sprintf("%s, %s of memory", Count(g.Spec.CPUs, "processor"), g.Spec.Memory)
	if g.Spec.Disk > 0 {
		size += fmt.Sprintf(", disk of %s", g.Spec.Disk)
	}
	line("", "%s", size)
	if g.Address != "" {
		line("address", "%s", g.Address)
	}
	if g.Direct != "" {
		line("", "%s, where it runs", g.Direct)
	}
	for _, p := range g.Ports {
		line("port", "127.0.0.1:%d -> %d%s", p.Host, p.Guest, p.Protocol())
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// Generations prints the generations of machines as a table.
func Generations(w io.Writer, all []ledger.Generation, now time.Time, page Page) error {
	t := Table{squeezes: []squeeze{{how: fold, column: 4, least: 30}, {how: drop, column: 3}, {how: under, column: 4}}}
	t.Row("GENERATION", "STATE", "BORN", "IMAGE", "WHY")
	for _, g := range all {
		born := "never"
		if g.Born != nil {
			born = Duration(max(0, now.Sub(*g.Born))) + " ago"
		}
		t.Row(g.String(), string(g.Phase), born, ShortDigest(g.Image), Clean(strings.Join(g.Why, "; ")))
	}
	return t.Print(w, page)
}
