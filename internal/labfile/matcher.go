// SPDX-License-Identifier: Apache-2.0

package labfile

import (
	"errors"
	"fmt"
	"reflect"
	"regexp"
	"regexp/syntax"
	"strconv"
	"strings"

	"gopkg.in/yaml.v3"

	"github.com/labfile/lab/internal/lab"
)

// matcher is a condition on a value: a plain value, a list, or a mapping from
// operations, all of which must hold.
type matcher struct {
	place
	value lab.Matcher
	given bool  // the key is there, if with a value that was refused
	at    place // of the key
}

// maxNesting is how deep conditions can stand in one another.
const maxNesting = 8

// matchOps are the operations by the names that a Labfile has for them.
var matchOps = []string{
	string(lab.MatchEqual), string(lab.MatchPrefix), string(lab.MatchSuffix), string(lab.MatchRegexp), string(lab.MatchSubstring),
	string(lab.MatchGreater), string(lab.MatchGreaterOrEqual), string(lab.MatchLess), string(lab.MatchLessOrEqual), string(lab.MatchLen),
	string(lab.MatchNot), string(lab.MatchAnd), string(lab.MatchOr),
	string(lab.MatchContainElement), string(lab.MatchContainElements), string(lab.MatchContainsPatterns), string(lab.MatchConsistOf),
}

func (m *matcher) decode(d *decoder, n *yaml.Node, at place, tag reflect.StructTag) {
	m.given, m.at = true, at
	r := matchReader{decoder: d, fact: tag.Get("fact")}
	if v, ok := r.condition(n, at, r.fact, 0); ok {
		m.value = v
		m.locate(at)
	}
}

func (m *matcher) schema(tag reflect.StructTag) *schema {
	s := &schema{
		Type:          []string{"string", "number", "boolean", "object"},
		PropertyNames: &schema{Enum: matchOps}, MinProperties: 1,
	}
	if fact := tag.Get("fact"); fact == "list" || fact == "lines" {
		s.Type = []string{"string", "number", "boolean", "object", "array"}
	}
	return s
}

// matchReader reads the condition on one attribute.
type matchReader struct {
	*decoder
	fact string // what the attribute's value is: see testEntry
}

// element is the fact that is one element of a list, or one line.
const element = "element"

// condition reads n, a condition on a value that is what fact says.
func (r matchReader) condition(n *yaml.Node, at place, fact string, depth int) (lab.Matcher, bool) {
	if depth > maxNesting {
		r.add(at, "conditions stand in one another deeper than %d times", maxNesting)
		return lab.Matcher{}, false
	}
	if !r.plain(n, at.path) {
		return lab.Matcher{}, false
	}
	switch n.Kind {
	case yaml.MappingNode:
		return r.operations(n, at, fact, depth)
	case yaml.SequenceNode:
		op := lab.MatchContainElements
		switch fact {
		case "list":
		case "lines":
			op = lab.MatchContainsPatterns
		default:
			r.add(at, "wants one value or condition, not a list; write {or: [...]} if it may be one of several")
			return lab.Matcher{}, false
		}
		items, ok := r.items(n, at, element, depth)
		return lab.Matcher{Op: op, Items: items}, ok && (op != lab.MatchContainsPatterns || r.patterns(n, at, items))
	}
	text, ok := r.word(n, at)
	if !ok {
		return lab.Matcher{}, false
	}
	switch {
	case fact == "bool" && text != "true" && text != "false":
		r.add(at, "%q is not true or false", shorten(text))
		return lab.Matcher{}, false
	case fact == "number" || fact == "mode":
		if text, ok = r.number(text, at, fact); !ok {
			return lab.Matcher{}, false
		}
	}
	return lab.Matcher{Op: lab.MatchIs, Value: text}, true
}

// number returns text, which must be a number, in the form that facts are compared
// in: a mode as four octal digits.
func (r matchReader) number(text string, at place, fact string) (string, bool) {
	if fact == "mode" {
		mode, err := parseMode(text)
		if err != nil {
			r.add(at, "%v", err)
		}
		return mode, err == nil
	}
	if !numberForm.MatchString(text) {
		r.add(at, "%q is not a number", shorten(text))
		return "", false
	}
	return text, true
}

// numberForm is what the comparison of numbers understands.
var numberForm = regexp.MustCompile(`^[+-]?[0-9]{1,30}(\.[0-9]{1,9})?$`)

// word reads a scalar.
func (r matchReader) word(n *yaml.Node, at place) (string, bool) {
	var t anyText
	r.value(n, at, &t, "")
	return t.value, t.set()
}

// items reads a list of conditions; of none it is nil.
func (r matchReader) items(n *yaml.Node, at place, fact string, depth int) ([]lab.Matcher, bool) {
	if !r.plain(n, at.path) {
		return nil, false
	}
	if n.Kind != yaml.SequenceNode {
		r.add(at, "wants a list, not %s", describe(n))
		return nil, false
	}
	if len(n.Content) > maxItems {
		r.add(at, "has %d items; at most %d are allowed", len(n.Content), maxItems)
		return nil, false
	}
	var items []lab.Matcher
	all := true
	for i, item := range n.Content {
		m, ok := r.condition(item, itemAt(item, at, i), fact, depth+1)
		items, all = append(items, m), all && ok
	}
	return items, all
}

func itemAt(item *yaml.Node, at place, i int) place {
	return place{line: item.Line, column: item.Column, path: fmt.Sprintf("%s[%d]", at.path, i)}
}

// operations reads a mapping from operations to what they compare with.
func (r matchReader) operations(n *yaml.Node, at place, fact string, depth int) (lab.Matcher, bool) {
	var conditions []lab.Matcher
	all := true
	if len(n.Content) == 0 {
		r.add(at, "is empty; it wants a condition, such as {have-prefix: x}")
		return lab.Matcher{}, false
	}
	before := len(r.list) + r.more
	r.mapping(n, at, func(key string, keyAt place, value *yaml.Node) {
		m, ok := r.operation(lab.MatchOp(key), keyAt, at.path, value, fact, depth+1)
		conditions, all = append(conditions, m), all && ok
	})
	if !all || len(conditions) == 0 || len(r.list)+r.more > before {
		return lab.Matcher{}, false
	}
	if len(conditions) == 1 {
		return conditions[0], true
	}
	return lab.Matcher{Op: lab.MatchAnd, Items: conditions}, true
}

func (r matchReader) operation(op lab.MatchOp, at place, above string, n *yaml.Node, fact string, depth int) (lab.Matcher, bool) {
	m := lab.Matcher{Op: op}
	ok := false
	switch op {
	case lab.MatchEqual:
		if n.Kind == yaml.SequenceNode {
			m.Op = lab.MatchEqualList
			return r.exact(m, n, at)
		}
		if m.Value, ok = r.word(n, at); ok && fact == "mode" {
			m.Value, ok = r.number(m.Value, at, fact)
		}
	case lab.MatchPrefix, lab.MatchSuffix, lab.MatchSubstring:
		m.Value, ok = r.word(n, at)
	case lab.MatchRegexp:
		if m.Value, ok = r.word(n, at); ok {
			ok = r.regexp(m.Value, at)
		}
	case lab.MatchGreater, lab.MatchGreaterOrEqual, lab.MatchLess, lab.MatchLessOrEqual:
		if m.Value, ok = r.word(n, at); ok {
			m.Value, ok = r.number(m.Value, at, fact)
		}
	case lab.MatchLen:
		if m.Value, ok = r.word(n, at); ok {
			if v, err := strconv.Atoi(m.Value); err != nil || v < 0 {
				r.add(at, "%q is not a whole number", shorten(m.Value))
				ok = false
			}
		}
	case lab.MatchNot, lab.MatchContainElement:
		of := fact
		if op == lab.MatchContainElement {
			of = element
		}
		var item lab.Matcher
		item, ok = r.condition(n, at, of, depth)
		m.Items = []lab.Matcher{item}
	case lab.MatchAnd, lab.MatchOr:
		if m.Items, ok = r.items(n, at, fact, depth); ok && len(m.Items) == 0 {
			r.add(at, "wants at least one condition")
			ok = false
		}
	case lab.MatchContainElements, lab.MatchConsistOf:
		m.Items, ok = r.items(n, at, element, depth)
	case lab.MatchContainsPatterns:
		if m.Items, ok = r.items(n, at, element, depth); ok {
			ok = r.patterns(n, at, m.Items)
		}
	default:
		at.path = above
		r.add(at, "unknown condition %q%s", shorten(string(op)), didYouMean(string(op), matchOps, "; known ones are "+strings.Join(matchOps, ", ")))
	}
	return m, ok
}

// exact reads a list of plain values.
func (r matchReader) exact(m lab.Matcher, n *yaml.Node, at place) (lab.Matcher, bool) {
	if !r.plain(n, at.path) {
		return m, false
	}
	if len(n.Content) > maxItems {
		r.add(at, "has %d items; at most %d are allowed", len(n.Content), maxItems)
		return m, false
	}
	all := true
	for i, item := range n.Content {
		text, ok := r.word(item, itemAt(item, at, i))
		m.Items, all = append(m.Items, lab.Matcher{Op: lab.MatchIs, Value: text}), all && ok
	}
	return m, all
}

// patterns reports whether all patterns of a list can be read: "/regexp/" and
// "!/regexp/" are more than text. n is the list.
func (r matchReader) patterns(n *yaml.Node, at place, items []lab.Matcher) bool {
	all := true
	for i, item := range items {
		if item.Op != lab.MatchIs {
			continue
		}
		text := strings.TrimPrefix(item.Value, "!")
		if len(text) > 2 && text[0] == '/' && text[len(text)-1] == '/' {
			all = r.regexp(text[1:len(text)-1], itemAt(n.Content[i], at, i)) && all
		}
	}
	return all
}

// regexp reports whether the text is a regular expression, and notes why not.
func (r matchReader) regexp(text string, at place) bool {
	if len(text) > maxPattern {
		r.add(at, "the regular expression is longer than %d bytes", maxPattern)
		return false
	}
	_, err := syntax.Parse(text, syntax.Perl)
	var bad *syntax.Error
	switch {
	case err == nil:
		return true
	case errors.As(err, &bad):
		r.add(at, "not a regular expression: %s: %q", bad.Code, shorten(bad.Expr))
	default:
		r.add(at, "not a regular expression: %v", err)
	}
	return false
}
