// SPDX-License-Identifier: Apache-2.0

package ui

import (
	"fmt"
	"io"
	"strconv"
	"strings"

	"github.com/labfile/lab/internal/drift"
	"github.com/labfile/lab/internal/engine"
)

// Drift prints how two disks differ. Paths and texts come from a guest: what could
// steer a terminal is escaped.
func Drift(w io.Writer, d engine.Drift) error {
	var b strings.Builder
	for _, c := range d.Changes {
		fmt.Fprintf(&b, "%s  %s%s\n", c.Op, printable(c.Path), aspects(c))
	}
	for _, text := range d.Texts {
		b.WriteString("\n")
		for _, line := range strings.SplitAfter(text, "\n") {
			b.WriteString(printable(line))
		}
	}
	switch {
	case len(d.Changes) == 0:
		fmt.Fprintf(&b, "%s: no differences from %s", d.New, d.Old)
	default:
		fmt.Fprintf(&b, "\n%s: %d changed from %s", d.New, len(d.Changes), d.Old)
	}
	if d.Hidden > 0 {
		fmt.Fprintf(&b, "; %d hidden, see --all", d.Hidden)
	}
	b.WriteString("\n")
	_, err := io.WriteString(w, b.String())
	return err
}

// Provision prints the drift as steps for a Labfile; what is no step is a comment.
func Provision(w io.Writer, d engine.Drift) error {
	var b strings.Builder
	if len(d.Changes) == 0 {
		fmt.Fprintf(&b, "# %s: no differences from %s\n", d.New, d.Old)
	} else {
		fmt.Fprintf(&b, "      # What makes %s into %s. Goes below provision, after what stands there.\n", d.Old, d.New)
		for line := range strings.Lines(d.Provision) {
			b.WriteString(printable(line))
		}
	}
	_, err := io.WriteString(w, b.String())
	return err
}

func aspects(c drift.Change) string {
	var parts []string
	for _, what := range c.What {
		switch what {
		case drift.Mode:
			what = fmt.Sprintf("mode %s -> %s", c.Old.Mode, c.New.Mode)
		case drift.Owner:
			what = fmt.Sprintf("owner %d:%d -> %d:%d", c.Old.UID, c.Old.GID, c.New.UID, c.New.GID)
		case drift.Target:
			what = fmt.Sprintf("target %s -> %s", printable(c.Old.Target), printable(c.New.Target))
		case drift.Content:
			what = fmt.Sprintf("content, %d -> %d bytes", c.Old.Size, c.New.Size)
		case drift.XAttr:
			what = "xattr " + printable(strings.Join(c.XAttrs(), ", "))
		}
		parts = append(parts, what)
	}
	if c.Op == drift.Replaced {
		parts = append(parts, fmt.Sprintf("%s -> %s", c.Old.Kind, c.New.Kind))
	}
	if len(parts) == 0 {
		return ""
	}
	return "  (" + strings.Join(parts, "; ") + ")"
}

// printable escapes what is not printable but for tabs and line ends.
func printable(s string) string {
	var b strings.Builder
	for i, r := range s {
		switch {
		case r == '\t' || r == '\n' && i == len(s)-1 || strconv.IsPrint(r) && r != '\ufffd':
			b.WriteRune(r)
		default:
			q := strconv.QuoteToASCII(s[i : i+max(1, size(r, s[i:]))])
			b.WriteString(q[1 : len(q)-1])
		}
	}
	return b.String()
}

// size is how many bytes of s the rune r took: one if they are not UTF-8.
func size(r rune, s string) int {
	if r == '\ufffd' && !strings.HasPrefix(s, "\ufffd") {
		return 1
	}
	return len(string(r))
}
