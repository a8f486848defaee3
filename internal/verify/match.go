// SPDX-License-Identifier: Apache-2.0

package verify

import (
	"fmt"
	"math/big"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/labfile/lab/internal/lab"
)

// Fact is the value that an attribute was found to have. At most one of List and
// Lines is set.
type Fact struct {
	Text   string   // the value; of lines, all of them
	Items  []string // of a list
	List   bool     // Items hold the value
	Lines  bool     // Text is output, a file's content or the like, which is read by lines
	Number bool     // Text is a number, whatever way it is written
	None   bool     // there is no such thing, as there is no mode without a file
}

// maxFound is how much of a value is shown, in bytes.
const maxFound = 300

// String renders the value for people.
func (f Fact) String() string {
	switch {
	case f.None:
		return "nothing"
	case f.List:
		quoted := make([]string, len(f.Items))
		for i, item := range f.Items {
			quoted[i] = strconv.Quote(item)
		}
		return shorten("[" + strings.Join(quoted, ", ") + "]")
	}
	return strconv.Quote(shorten(f.Text))
}

func shorten(s string) string {
	if len(s) <= maxFound {
		return s
	}
	return strings.ToValidUTF8(s[:maxFound], "") + "…"
}

// elements are the value as a list: of text, its lines.
func (f Fact) elements() []string {
	switch {
	case f.List:
		return f.Items
	case f.Text == "":
		return nil
	}
	return strings.Split(strings.TrimSuffix(f.Text, "\n"), "\n")
}

// element is one of the elements as a value of its own.
func element(s string) Fact { return Fact{Text: s} }

// Match reports whether the value meets the condition. What does not exist meets
// none, not even a negated one. The error says what is wrong with the condition.
func Match(f Fact, m lab.Matcher) (bool, error) {
	if f.None {
		return false, nil
	}
	switch m.Op {
	case lab.MatchIs:
		return is(f, m.Value), nil
	case lab.MatchEqual:
		return !f.List && f.Text == m.Value, nil
	case lab.MatchPrefix, lab.MatchSuffix, lab.MatchSubstring, lab.MatchRegexp:
		return matchText(f, m)
	case lab.MatchGreater, lab.MatchGreaterOrEqual, lab.MatchLess, lab.MatchLessOrEqual:
		return compare(f, m)
	case lab.MatchLen:
		n, err := strconv.Atoi(m.Value)
		if err != nil {
			return false, fmt.Errorf("%s: %q is not a whole number", m.Op, m.Value)
		}
		if f.List {
			return len(f.Items) == n, nil
		}
		return len([]rune(strings.TrimSuffix(f.Text, "\n"))) == n, nil
	}
	return matchItems(f, m)
}

func is(f Fact, want string) bool {
	if f.List {
		return slices.Contains(f.Items, want)
	}
	if f.Number {
		a, okA := number(f.Text)
		b, okB := number(want)
		return okA && okB && a.Cmp(b) == 0
	}
	return f.Text == want || strings.TrimSuffix(f.Text, "\n") == strings.TrimSuffix(want, "\n")
}

// maxNumber is the length of the longest number, in bytes: an exponent is never
// read.
const maxNumber = 40

var numeric = regexp.MustCompile(`^[+-]?[0-9]+(\.[0-9]+)?$`)

func number(s string) (*big.Rat, bool) {
	s = strings.TrimSpace(s)
	if len(s) > maxNumber || !numeric.MatchString(s) {
		return nil, false
	}
	// Rat takes a leading 0 as decimal where there is no prefix, as is wanted.
	return new(big.Rat).SetString(s)
}

func matchText(f Fact, m lab.Matcher) (bool, error) {
	if f.List {
		// A list meets it with any of its elements.
		for _, item := range f.Items {
			if ok, err := matchText(element(item), m); ok || err != nil {
				return ok, err
			}
		}
		return false, nil
	}
	text := f.Text
	switch m.Op {
	case lab.MatchPrefix:
		return strings.HasPrefix(text, m.Value), nil
	case lab.MatchSuffix:
		return strings.HasSuffix(text, m.Value) || strings.HasSuffix(strings.TrimSuffix(text, "\n"), m.Value), nil
	case lab.MatchSubstring:
		return strings.Contains(text, m.Value), nil
	}
	re, err := regexp.Compile(m.Value)
	if err != nil {
		return false, fmt.Errorf("%s: %w", m.Op, err)
	}
	return re.MatchString(text), nil
}

func compare(f Fact, m lab.Matcher) (bool, error) {
	limit, ok := number(m.Value)
	if !ok {
		return false, fmt.Errorf("%s: %q is not a number", m.Op, m.Value)
	}
	value, ok := number(f.Text)
	if !ok || f.List {
		return false, nil
	}
	c := value.Cmp(limit)
	switch m.Op {
	case lab.MatchGreater:
		return c > 0, nil
	case lab.MatchGreaterOrEqual:
		return c >= 0, nil
	case lab.MatchLess:
		return c < 0, nil
	}
	return c <= 0, nil
}

func matchItems(f Fact, m lab.Matcher) (bool, error) {
	single := func() error {
		if len(m.Items) != 1 {
			return fmt.Errorf("%s: wants one condition, not %d", m.Op, len(m.Items))
		}
		return nil
	}
	switch m.Op {
	case lab.MatchNot:
		if err := single(); err != nil {
			return false, err
		}
		ok, err := Match(f, m.Items[0])
		return !ok && err == nil, err
	case lab.MatchAnd, lab.MatchOr:
		for _, item := range m.Items {
			ok, err := Match(f, item)
			if err != nil {
				return false, err
			}
			if ok == (m.Op == lab.MatchOr) {
				return ok, nil
			}
		}
		return m.Op == lab.MatchAnd, nil
	case lab.MatchContainElement:
		if err := single(); err != nil {
			return false, err
		}
		return assigned(f.elements(), m.Items)
	case lab.MatchContainElements:
		return assigned(f.elements(), m.Items)
	case lab.MatchConsistOf:
		if len(f.elements()) != len(m.Items) {
			return false, nil
		}
		return assigned(f.elements(), m.Items)
	case lab.MatchEqualList:
		elements := f.elements()
		for i, item := range m.Items {
			if i >= len(elements) || elements[i] != item.Value {
				return false, nil
			}
		}
		return len(elements) == len(m.Items), nil
	case lab.MatchContainsPatterns:
		return patterns(f.elements(), m.Items)
	}
	return false, fmt.Errorf("unknown condition %q", m.Op)
}

// assigned reports whether each condition can be given an element of its own that
// meets it: a maximum matching of a bipartite graph, by augmenting paths.
func assigned(elements []string, items []lab.Matcher) (bool, error) {
	meets := make([][]int, len(items))
	for i, item := range items {
		for j, e := range elements {
			ok, err := Match(element(e), item)
			if err != nil {
				return false, err
			}
			if ok {
				meets[i] = append(meets[i], j)
			}
			if len(meets[i]) == len(items) {
				break // with so many to choose from, one is left for it whatever the others get
			}
		}
	}
	owner := map[int]int{}
	var place func(i int, tried map[int]bool) bool
	place = func(i int, tried map[int]bool) bool {
		for _, j := range meets[i] {
			if tried[j] {
				continue
			}
			tried[j] = true
			if other, taken := owner[j]; !taken || place(other, tried) {
				owner[j] = i
				return true
			}
		}
		return false
	}
	for i := range items {
		if !place(i, map[int]bool{}) {
			return false, nil
		}
	}
	return true, nil
}

// patterns reports whether every pattern is met: "text" and "/regexp/" by some
// line, "!text" and "!/regexp/" by none. A backslash before a leading ! makes it
// text. An item that is no plain value is a condition that some line must meet.
func patterns(lines []string, items []lab.Matcher) (bool, error) {
	for _, item := range items {
		meets := func(line string) (bool, error) { return Match(element(line), item) }
		wanted := true
		if item.Op == lab.MatchIs {
			text := item.Value
			if rest, ok := strings.CutPrefix(text, "!"); ok {
				wanted, text = false, rest
			} else if strings.HasPrefix(text, `\!`) {
				text = text[1:]
			}
			meets = func(line string) (bool, error) { return strings.Contains(line, text), nil }
			if len(text) > 2 && text[0] == '/' && text[len(text)-1] == '/' {
				re, err := regexp.Compile(text[1 : len(text)-1])
				if err != nil {
					return false, fmt.Errorf("pattern %s: %w", text, err)
				}
				meets = func(line string) (bool, error) { return re.MatchString(line), nil }
			}
		}
		found := false
		for _, line := range lines {
			ok, err := meets(line)
			if err != nil {
				return false, err
			}
			if found = ok; found {
				break
			}
		}
		if found != wanted {
			return false, nil
		}
	}
	return true, nil
}
