// SPDX-License-Identifier: Apache-2.0

package labfile

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"regexp"
	"slices"
	"sort"
	"strconv"
	"strings"
	"unicode/utf8"

	"gopkg.in/yaml.v3"
)

// bom is a byte order mark. Some editors put it at the beginning of a file.
const bom = "\ufeff"

// parseYAML reads the one document in data and returns its root, or nil after it
// noted what keeps data from being one YAML document. The tree may hold aliases
// as references; they are never expanded.
func parseYAML(r *report, data []byte) *yaml.Node {
	data = bytes.TrimPrefix(data, []byte(bom))
	if !readable(r, data) {
		return nil
	}
	doc, next, err := load(data)
	switch {
	case err != nil:
		syntaxProblem(r, data, err)
	case doc == nil:
		r.add(place{line: 1, column: 1}, "the file is empty")
	case next != nil:
		r.add(place{line: next.Line, column: next.Column}, "a second YAML document begins here; the file must be a single one")
	default:
		return doc.Content[0]
	}
	return nil
}

// load returns the first document in data and the second, nil where there is none.
func load(data []byte) (doc, next *yaml.Node, err error) {
	// The package answers with a panic where it doubts itself.
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("yaml: %v", p)
		}
	}()
	decoder := yaml.NewDecoder(bytes.NewReader(data))
	for _, into := range []**yaml.Node{&doc, &next} {
		var n yaml.Node
		if err := decoder.Decode(&n); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return nil, nil, err
		}
		*into = &n
	}
	return doc, next, nil
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
		case column == 1 && c == '%':
			// The parser takes long over many of them.
			r.add(at, "YAML directives, such as %%YAML, are not supported")
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

// complaint is the form of the YAML parser's errors.
var complaint = regexp.MustCompile(`(?s)^yaml: (?:line ([0-9]+): )?(.*)$`)

// syntaxProblem notes the error of the YAML parser, in the words of somebody who
// does not know its grammar where that helps.
func syntaxProblem(r *report, data []byte, err error) {
	upTo, err := culprit(data, err)
	m := complaint.FindStringSubmatch(err.Error())
	if m == nil {
		m = []string{"", "", err.Error()}
	}
	words := m[2]
	message := "not YAML: " + shorten(words)
	at := placeAfter(upTo)
	last, _ := utf8.DecodeLastRune(upTo)
	line, column := leadingTab(data, at.line)
	cannotStart := strings.Contains(words, "cannot start any token")
	switch {
	case line > 0:
		r.add(place{line: line, column: column}, "%s", tabbed)
	case last == '\t' && (cannotStart || strings.Contains(words, "a tab character")):
		r.add(at, "%s", tabbed)
	case cannotStart:
		r.add(at, "not YAML: a value cannot begin with %q; quote it", last)
	case strings.Contains(words, "mapping values are not allowed"):
		r.add(at, "%s; quote a value that holds \": \"", message)
	case strings.HasPrefix(words, "found unexpected end of stream"):
		r.add(at, "%s; the quote that begins here is not closed", message)
	case strings.HasPrefix(words, "did not find expected ','") && strings.Contains(lineOf(data, at.line), "${"):
		before, _, _ := strings.Cut(lineOf(data, at.line), "${")
		at.column = utf8.RuneCountInString(before) + 1
		r.add(at, "%s; quote a value that holds \"${\" inside of { } or [ ]", message)
	case strings.HasPrefix(words, "did not find expected"):
		// The line is that on which the list or mapping begins.
		if begin, err := strconv.Atoi(m[1]); err == nil && begin < at.line {
			message += fmt.Sprintf(" in what begins on line %d", begin)
		}
		r.add(placeAfter(beforeWord(upTo)), "%s", message)
	case strings.HasPrefix(words, "unknown anchor"):
		r.add(placeAfter(beforeWord(upTo)), "%s", message)
	default:
		r.add(at, "%s", message)
	}
}

const tabbed = "a tab; YAML is indented with spaces only"

// culprit returns the beginning of data up to the character that makes the parser
// complain, and what it complains of. The parser itself names a line at best, often
// that of the list or mapping around it. This takes at most some twenty times as
// long as reading data did.
func culprit(data []byte, err error) ([]byte, error) {
	// It tells the first line, which it numbers 0, from no line as little as a
	// list's line from the error's. After an empty line there is no line 0, and the
	// numbers of its grammar's errors are right; those of its scanner's, one more.
	shifted := slices.Concat([]byte("\n"), data)
	if _, _, again := load(shifted); again != nil {
		err = again
	}
	n := sort.Search(len(data), func(n int) bool {
		_, _, other := load(shifted[:1+n])
		return other != nil && other.Error() == err.Error()
	})
	for n < len(data) && !utf8.RuneStart(data[n]) {
		n++
	}
	return data[:n], err
}

// placeAfter returns the place of the last character of text.
func placeAfter(text []byte) place {
	begin := 0
	if len(text) > 0 {
		begin = bytes.LastIndexByte(text[:len(text)-1], '\n') + 1
	}
	return place{line: bytes.Count(text[:begin], []byte("\n")) + 1, column: max(utf8.RuneCount(text[begin:]), 1)}
}

// beforeWord returns text up to the first character of the word that it ends in.
func beforeWord(text []byte) []byte {
	if len(text) == 0 {
		return text
	}
	_, size := utf8.DecodeLastRune(text)
	begin := bytes.LastIndexAny(text[:len(text)-size], " \t\n,[]{}") + 1
	_, size = utf8.DecodeRune(text[begin:])
	return text[:begin+size]
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
