// SPDX-License-Identifier: Apache-2.0

package ui

import (
	"io"
	"strings"
)

// Page is what is printed on.
type Page struct {
	Color bool
	Width int // columns; 0 for as many as it takes, as in a file or a pipe
}

// Table is plain aligned text: columns two spaces apart, no lines. Nothing within a
// cell is cut. Where a page is too narrow, the squeezes make room.
type Table struct {
	rows   [][]string
	colors []map[int]Color

	squeezes []squeeze // tried one after the other until the table fits
}

// squeeze is one way to make a table narrower.
type squeeze struct {
	how    int
	column int
	least  int // of fold: columns that the text needs to be readable
}

const (
	fold  = iota // the column's cells get several lines
	drop         // the column is left out
	under        // the column's cells stand below their rows
)

// Row appends a row of cells, which are cleaned.
func (t *Table) Row(cells ...string) {
	for i, c := range cells {
		cells[i] = Clean(c)
	}
	t.rows = append(t.rows, cells)
	t.colors = append(t.colors, nil)
}

// Paint colours one cell of the last row.
func (t *Table) Paint(column int, c Color) {
	last := len(t.rows) - 1
	if t.colors[last] == nil {
		t.colors[last] = map[int]Color{}
	}
	t.colors[last][column] = c
}

// Print prints the table. Columns that are empty in every row but the first, the
// header, are left out.
func (t *Table) Print(w io.Writer, p Page) error {
	widths := t.widths()
	below := map[int]bool{}
	for _, s := range t.squeezes {
		excess := total(widths) - p.Width
		if p.Width == 0 || excess <= 0 {
			break
		}
		if s.column >= len(widths) || widths[s.column] == 0 {
			continue
		}
		switch s.how {
		case drop:
			widths[s.column] = 0
		case under:
			widths[s.column], below[s.column] = 0, true
		case fold:
			widths[s.column] = min(widths[s.column], max(widths[s.column]-excess, s.least, t.longestWord(s.column)))
		}
	}
	var b strings.Builder
	for i, row := range t.rows {
		t.line(&b, i, row, widths, p.Color)
		indent := "  "
		if len(row) > 0 {
			indent += row[0][:len(row[0])-len(strings.TrimLeft(row[0], " "))]
		}
		for j, cell := range row {
			if !below[j] || cell == "" || i == 0 {
				continue
			}
			for _, line := range wrap(cell, p.Width-len(indent)) {
				b.WriteString(indent + t.colors[i][j].paint(line, p.Color) + "\n")
			}
		}
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// widths are those of the columns; 0 for one that nothing stands in.
func (t *Table) widths() []int {
	var widths []int
	var used []bool
	for i, row := range t.rows {
		for j, cell := range row {
			if j == len(widths) {
				widths, used = append(widths, 0), append(used, false)
			}
			widths[j] = max(widths[j], width(cell))
			used[j] = used[j] || (i > 0 && cell != "")
		}
	}
	for j := range widths {
		if !used[j] && len(t.rows) > 1 {
			widths[j] = 0
		}
	}
	return widths
}

// total is how wide a table of such columns is.
func total(widths []int) int {
	sum := -2
	for _, w := range widths {
		if w > 0 {
			sum += w + 2
		}
	}
	return sum
}

// longestWord is the least that a column can be folded to.
func (t *Table) longestWord(column int) int {
	longest := 0
	for _, row := range t.rows {
		if column < len(row) {
			for _, word := range strings.Fields(row[column]) {
				longest = max(longest, width(word))
			}
		}
	}
	return longest
}

// line prints a row, on several lines if a cell does not fit its column.
func (t *Table) line(b *strings.Builder, i int, row []string, widths []int, color bool) {
	cells, lines := make([][]string, len(row)), 1
	for j, cell := range row {
		if widths[j] > 0 {
			cells[j] = []string{cell}
			if width(cell) > widths[j] {
				cells[j] = wrap(cell, widths[j])
			}
			lines = max(lines, len(cells[j]))
		}
	}
	for n := range lines {
		var line strings.Builder
		gap := ""
		for j := range row {
			if widths[j] == 0 {
				continue
			}
			cell := ""
			if n < len(cells[j]) {
				cell = cells[j][n]
			}
			line.WriteString(gap)
			fill := strings.Repeat(" ", max(0, widths[j]-width(cell)))
			line.WriteString(t.colors[i][j].paint(cell, color) + fill)
			gap = "  "
		}
		b.WriteString(strings.TrimRight(line.String(), " ") + "\n")
	}
}

// wrap breaks text into lines of at most n columns, at spaces and, where a word alone
// is too long, behind a slash or a comma of it. What has none of these stays whole.
func wrap(s string, n int) []string {
	if n <= 0 || width(s) <= n {
		return []string{s}
	}
	var lines []string
	line := ""
	for _, word := range strings.Fields(s) {
		switch {
		case line != "" && width(line)+1+width(word) <= n:
			line += " " + word
			continue
		case line != "":
			lines = append(lines, line)
		}
		for width(word) > n {
			runes := []rune(word)
			at := strings.LastIndexAny(string(runes[:n]), "/,")
			if at <= 0 {
				break
			}
			lines = append(lines, word[:at+1])
			word = word[at+1:]
		}
		line = word
	}
	return append(lines, line)
}

// hanging writes text behind head, and what does not fit on the line below it, indented.
func hanging(b *strings.Builder, head, text string, indent int, p Page) {
	lines := []string{text}
	if p.Width > 0 {
		lines = wrap(text, max(p.Width-indent, 20))
	}
	for i, line := range lines {
		if i > 0 {
			head = strings.Repeat(" ", indent)
		}
		b.WriteString(strings.TrimRight(head+line, " ") + "\n")
	}
}
