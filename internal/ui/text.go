// SPDX-License-Identifier: Apache-2.0

// Package ui turns plans, events, reports and errors into what people and
// programs read: plain text, live progress on a terminal, and JSON.
package ui

import (
	"fmt"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/labfile/lab/internal/lab"
)

// Clean makes text from a stranger safe to print on a terminal and keeps it on
// one line: control characters, invalid UTF-8 and the characters that reorder
// text are written as escapes. A tab becomes a space.
func Clean(s string) string {
	if !strings.ContainsFunc(s, harmful) && utf8.ValidString(s) {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); {
		r, size := utf8.DecodeRuneInString(s[i:])
		switch {
		case r == utf8.RuneError && size == 1:
			fmt.Fprintf(&b, `\x%02x`, s[i])
		case r == '\n':
			b.WriteString(`\n`)
		case r == '\r':
			b.WriteString(`\r`)
		case r == '\t':
			b.WriteByte(' ')
		case !harmful(r):
			b.WriteRune(r)
		case r < 0x80:
			fmt.Fprintf(&b, `\x%02x`, r)
		default:
			fmt.Fprintf(&b, `\u%04x`, r)
		}
		i += size
	}
	return b.String()
}

// CleanLines is Clean for text of several lines: its line breaks stay.
func CleanLines(s string) string {
	lines := strings.Split(s, "\n")
	for i, l := range lines {
		lines[i] = Clean(strings.TrimSuffix(l, "\r"))
	}
	return strings.Join(lines, "\n")
}

// harmful reports whether r can move the cursor or change how its neighbours
// look. unicode.Cf holds the bidirectional overrides and zero-width characters.
func harmful(r rune) bool {
	return unicode.IsControl(r) || unicode.In(r, unicode.Cf, unicode.Zl, unicode.Zp)
}

// Size renders a number of bytes for people, with binary units: "1.5 GiB".
func Size(n int64) string {
	const unit = 1024
	if n < unit {
		return fmt.Sprintf("%d B", max(n, 0))
	}
	f, units := float64(n)/unit, "KMGTPE"
	for f >= unit-0.05 && len(units) > 1 { // 1023.96 would round to 1024.0
		f /= unit
		units = units[1:]
	}
	return fmt.Sprintf("%.1f %ciB", f, units[0])
}

// Duration renders how long something took: "0.4s", "12.3s", "2m05s", "3h12m",
// "5d02h".
func Duration(d time.Duration) string {
	d = max(d, 0)
	switch {
	case d < time.Minute-50*time.Millisecond:
		return fmt.Sprintf("%.1fs", d.Seconds())
	case d < time.Hour-500*time.Millisecond:
		d = d.Round(time.Second)
		return fmt.Sprintf("%dm%02ds", d/time.Minute, d%time.Minute/time.Second)
	}
	d = d.Round(time.Second)
	if d < 24*time.Hour {
		return fmt.Sprintf("%dh%02dm", d/time.Hour, d%time.Hour/time.Minute)
	}
	return fmt.Sprintf("%dd%02dh", d/(24*time.Hour), d%(24*time.Hour)/time.Hour)
}

// elapsed is Duration in whole seconds, for what still runs.
func elapsed(d time.Duration) string {
	if d < time.Minute {
		return fmt.Sprintf("%ds", max(d, 0)/time.Second)
	}
	return Duration(d.Truncate(time.Second))
}

// Names joins the names of machines for a sentence: "db, web-1 and web-2".
func Names(names []lab.Name) string {
	words := make([]string, len(names))
	for i, n := range names {
		words[i] = string(n)
	}
	if len(words) < 2 {
		return strings.Join(words, "")
	}
	last := len(words) - 1
	return strings.Join(words[:last], ", ") + " and " + words[last]
}

// Count renders a number with its noun: "1 machine", "2 machines".
func Count(n int, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return fmt.Sprintf("%d %ss", n, noun)
}

// width is the number of columns that s takes, all characters being one wide.
func width(s string) int { return utf8.RuneCountInString(s) }

// cut shortens s to at most n columns.
func cut(s string, n int) string {
	if n <= 0 {
		return ""
	}
	if width(s) <= n {
		return s
	}
	r := []rune(s)
	if n < 4 {
		return string(r[:n])
	}
	return string(r[:n-3]) + "..."
}

// pad fills s with spaces up to n columns.
func pad(s string, n int) string {
	return s + strings.Repeat(" ", max(n-width(s), 0))
}

// Color is a colour of a terminal.
type Color string

// The colours, by the parameter of SGR (ECMA-48, section 8.3.117).
const (
	Plain  Color = ""
	Red    Color = "31"
	Green  Color = "32"
	Yellow Color = "33"
	Dim    Color = "2"
	Bold   Color = "1"
)

func (c Color) paint(s string, on bool) string {
	if !on || c == Plain || s == "" {
		return s
	}
	return "\x1b[" + string(c) + "m" + s + "\x1b[0m"
}
