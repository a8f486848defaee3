// SPDX-License-Identifier: Apache-2.0

package labfile

import (
	"bytes"
	"errors"
	"io"
	"strings"
	"unicode/utf8"

	"go.yaml.in/yaml/v4"
)

// parseYAML reads the one document in data and returns its root, or nil after it
// noted what keeps data from being one YAML document. The tree may hold aliases
// as references; they are never expanded.
func parseYAML(r *report, data []byte) *yaml.Node {
	if !readable(r, data) {
		return nil
	}
	loader, err := yaml.NewLoader(bytes.NewReader(data))
	if err != nil {
		r.add(place{}, "%v", err)
		return nil
	}
	var doc, next yaml.Node
	switch err := loader.Load(&doc); {
	case errors.Is(err, io.EOF):
		r.add(place{line: 1, column: 1}, "the file is empty")
		return nil
	case err != nil:
		syntaxProblem(r, data, err)
		return nil
	}
	switch err := loader.Load(&next); {
	case errors.Is(err, io.EOF):
		return doc.Content[0]
	case err != nil:
		syntaxProblem(r, data, err)
	default:
		r.add(place{line: next.Line, column: next.Column}, "a second YAML document begins here; the file must be a single one")
	}
	return nil
}

// maxSeparators bounds how many characters a file may have that can make YAML
// nodes, each of which takes some hundred times the memory of its text.
const maxSeparators = 1 << 17

// readable notes bytes that YAML text cannot have (YAML 1.2, section 5.1),
// the markers that an unfinished merge leaves behind, and more structure than any
// Labfile has.
func readable(r *report, data []byte) bool {
	line, column := 1, 1
	separators := 0
	for i := 0; i < len(data); {
		c, size := utf8.DecodeRune(data[i:])
		at := place{line: line, column: column}
		switch {
		case c == utf8.RuneError && size == 1:
			r.add(at, "not UTF-8 text")
			return false
		case c == '\n':
			line, column = line+1, 0
		case c < 0x20 && c != '\t' && c != '\r', c == 0x7f, c == 0xfffe, c == 0xffff, c >= 0x80 && c < 0xa0 && c != 0x85:
			r.add(at, "control character %U is not allowed", c)
			return false
		case column == 1 && (bytes.HasPrefix(data[i:], []byte("<<<<<<< ")) || bytes.HasPrefix(data[i:], []byte(">>>>>>> "))):
			r.add(at, "an unfinished merge; resolve the conflict first")
			return false
		}
		if strings.ContainsRune(",:-?[{", c) {
			if separators++; separators > maxSeparators {
				r.add(at, "too much structure for one file: more than %d of the characters , : - ? [ {", maxSeparators)
				return false
			}
		}
		i += size
		column++
	}
	return true
}

// syntaxProblem notes the error of the YAML parser, in the words of somebody who
// does not know its grammar where that helps.
func syntaxProblem(r *report, data []byte, err error) {
	var le *yaml.LoadError
	if !errors.As(err, &le) {
		r.add(place{line: 1, column: 1}, "not YAML: %v", err)
		return
	}
	at := place{line: max(le.Mark.Line, 1), column: max(le.Mark.Column, 1)}
	if line, column := leadingTab(data, at.line); line > 0 {
		r.add(place{line: line, column: column}, "a tab; YAML is indented with spaces only")
		return
	}
	if first := strings.TrimSpace(after(data, at)); strings.Contains(le.Message, "cannot start any token") && first != "" {
		r.add(at, "not YAML: a value cannot begin with %q; quote it", []rune(first)[0])
		return
	}
	message := "not YAML: " + le.Message
	if le.ContextMsg != "" {
		message += " " + le.ContextMsg
	}
	if strings.HasPrefix(le.Message, "did not find expected ','") && strings.Contains(lineOf(data, at.line), "${") {
		r.add(at, "%s; quote a value that holds \"${\" inside of { } or [ ]", message)
		return
	}
	if le.ContextMark.Line > 0 && le.ContextMark.Line != le.Mark.Line {
		r.add(at, "%s that begins on line %d", message, le.ContextMark.Line)
		return
	}
	if strings.Contains(le.Message, "mapping values are not allowed") {
		message += "; quote a value that holds \": \""
	}
	r.add(at, "%s", message)
}

// after returns what follows a place on its line.
func after(data []byte, at place) string {
	text := []rune(lineOf(data, at.line))
	return string(text[min(at.column-1, len(text)):])
}

// lineOf returns the numbered line, or "" if there is none.
func lineOf(data []byte, number int) string {
	lines := bytes.SplitN(data, []byte("\n"), number+1)
	if number > len(lines) {
		return ""
	}
	return string(lines[number-1])
}

// leadingTab finds a tab in the indentation of the numbered line, or of the one
// before it: that is where the parser notices.
func leadingTab(data []byte, number int) (line, column int) {
	lines := bytes.SplitN(data, []byte("\n"), number+1)
	for n := max(number-1, 1); n <= min(number, len(lines)); n++ {
		text := lines[n-1]
		indent := text[:len(text)-len(bytes.TrimLeft(text, " \t"))]
		if i := bytes.IndexByte(indent, '\t'); i >= 0 && len(bytes.TrimSpace(text)) > 0 {
			return n, i + 1
		}
	}
	return 0, 0
}
