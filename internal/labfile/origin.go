// SPDX-License-Identifier: Apache-2.0

package labfile

import (
	"strconv"
	"strings"
	"unicode/utf8"

	"gopkg.in/yaml.v3"
)

// source is the text of a file, which says more about places than the nodes of YAML:
// those know where a value begins, but not where its parts are.
type source []string // lines, without their ends

func newSource(data []byte) source {
	return strings.Split(string(data), "\n")
}

// within returns the place of the byte at offset of the value of n, or else of n: of
// what is folded or escaped, only dollars are found.
func (s source) within(n *yaml.Node, offset int, path string) place {
	at := place{line: n.Line, column: n.Column, path: path}
	switch {
	case n.Kind != yaml.ScalarNode || offset > len(n.Value):
		return at
	case n.Style&yaml.LiteralStyle != 0:
		begin := strings.LastIndexByte(n.Value[:offset], '\n') + 1
		number := n.Line + strings.Count(n.Value[:begin], "\n") // of the line before
		line, _, _ := strings.Cut(n.Value[begin:], "\n")
		if number >= len(s) {
			return at
		}
		written := strings.TrimSuffix(s[number], "\r")
		indent, ok := strings.CutSuffix(written, line)
		if !ok || strings.Trim(indent, " ") != "" {
			return at
		}
		return place{line: number + 1, column: len(indent) + utf8.RuneCountInString(n.Value[begin:offset]) + 1, path: path}
	case offset < len(n.Value) && n.Value[offset] == '$':
		if found, ok := s.dollar(n, strings.Count(n.Value[:offset], "$")); ok {
			found.path = path
			return found
		}
	}
	return at
}

// dollar returns the place of the dollar of n before which there are count others.
func (s source) dollar(n *yaml.Node, count int) (place, bool) {
	line, column := n.Line-1, n.Column-1
	if n.Style&yaml.FoldedStyle != 0 {
		line, column = line+1, 0 // behind the header
	}
	for ; line < len(s); line, column = line+1, 0 {
		text := []rune(s[line])
		for ; column < len(text); column++ {
			is := text[column] == '$'
			at := place{line: line + 1, column: column + 1}
			if n.Style&yaml.DoubleQuotedStyle != 0 && text[column] == '\\' && column+1 < len(text) {
				column++
				is = escapedDollar(text[column:])
			}
			if is {
				if count == 0 {
					return at, true
				}
				count--
			}
		}
	}
	return place{}, false
}

// escapedDollar reports whether text, which follows a backslash, begins with the code
// of a dollar.
func escapedDollar(text []rune) bool {
	digits, ok := map[rune]int{'x': 2, 'u': 4, 'U': 8}[text[0]]
	if !ok || len(text) < 1+digits {
		return false
	}
	v, err := strconv.ParseUint(string(text[1:1+digits]), 16, 32)
	return err == nil && v == '$'
}
