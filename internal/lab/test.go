// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"fmt"
	"strconv"
	"strings"
	"time"
)

// TestKind says what a test looks at.
type TestKind string

// The kinds of tests, and the attributes that each can be asked for.
const (
	TestRun     TestKind = "run"     // a command line: exit-status, stdout, stderr
	TestPort    TestKind = "port"    // "tcp:80": listening, ip
	TestHTTP    TestKind = "http"    // a URL: status, body, headers
	TestFile    TestKind = "file"    // a path: exists, mode, owner, group, size, filetype, linked-to, contents, sha256
	TestPackage TestKind = "package" // installed, versions
	TestService TestKind = "service" // enabled, running
	TestProcess TestKind = "process" // running, count
	TestUser    TestKind = "user"    // exists, uid, gid, groups, home, shell
	TestDNS     TestKind = "dns"     // resolvable, addrs
)

// Test is one of the Labfile's checks on one machine: what lab verify looks at and
// what a new generation must pass. It is plain data: two that are deeply equal ask
// for the same, and it can be written as JSON and read back.
type Test struct {
	Name     string        `json:"name,omitempty"` // title; empty for what String says
	Kind     TestKind      `json:"kind"`
	Subject  string        `json:"subject"`            // what it is about: see the kinds
	Insecure bool          `json:"insecure,omitempty"` // http: take any certificate
	Want     []Want        `json:"want"`               // in the order of the Labfile; never empty
	Hint     string        `json:"hint,omitempty"`     // what to do if it fails
	Skip     string        `json:"skip,omitempty"`     // why it is not carried out; empty if it is
	Timeout  time.Duration `json:"timeout"`            // of one attempt
	Retries  int           `json:"retries,omitempty"`  // further attempts
	Interval time.Duration `json:"interval"`           // between two attempts
}

// Want is what one attribute must be.
type Want struct {
	Attribute string  `json:"attribute"`
	Match     Matcher `json:"match"`
}

// MatchOp says how a Matcher compares.
type MatchOp string

// The operations. All but the first and the third are called as in a Labfile, where
// a plain value is MatchIs and a list MatchContainElements.
const (
	MatchIs               MatchOp = "is"                // Value; numbers by their value, text without its last newline
	MatchEqual            MatchOp = "equal"             // Value, to the letter
	MatchEqualList        MatchOp = "equal-list"        // Items, in their order
	MatchPrefix           MatchOp = "have-prefix"       // Value
	MatchSuffix           MatchOp = "have-suffix"       // Value
	MatchRegexp           MatchOp = "match-regexp"      // Value, RE2 syntax
	MatchSubstring        MatchOp = "contain-substring" // Value
	MatchGreater          MatchOp = "gt"                // Value, a number
	MatchGreaterOrEqual   MatchOp = "ge"                // Value, a number
	MatchLess             MatchOp = "lt"                // Value, a number
	MatchLessOrEqual      MatchOp = "le"                // Value, a number
	MatchLen              MatchOp = "have-len"          // Value, a number
	MatchNot              MatchOp = "not"               // Items, one
	MatchAnd              MatchOp = "and"               // Items
	MatchOr               MatchOp = "or"                // Items
	MatchContainElement   MatchOp = "contain-element"   // Items, one
	MatchContainElements  MatchOp = "contain-elements"  // Items, each by an element of its own
	MatchContainsPatterns MatchOp = "contain-patterns"  // Items: patterns of text, each of which a line has
	MatchConsistOf        MatchOp = "consist-of"        // Items, in any order, and nothing else
)

// Matcher is a condition on a value. Which fields it has depends on Op.
type Matcher struct {
	Op    MatchOp   `json:"op"`
	Value string    `json:"value,omitempty"`
	Items []Matcher `json:"items,omitempty"`
}

// String renders the condition for people: `have-prefix "x"`.
func (m Matcher) String() string {
	switch m.Op {
	case MatchIs:
		return strconv.Quote(m.Value)
	case MatchGreater, MatchGreaterOrEqual, MatchLess, MatchLessOrEqual, MatchLen:
		return fmt.Sprintf("%s %s", m.Op, m.Value)
	case MatchEqual, MatchPrefix, MatchSuffix, MatchRegexp, MatchSubstring:
		return fmt.Sprintf("%s %q", m.Op, m.Value)
	}
	items := make([]string, len(m.Items))
	for i, item := range m.Items {
		items[i] = item.String()
	}
	list := "[" + strings.Join(items, ", ") + "]"
	switch m.Op {
	case MatchContainElements, MatchContainsPatterns:
		return list
	case MatchEqualList:
		return "equal " + list
	case MatchNot, MatchContainElement:
		return string(m.Op) + " " + strings.Join(items, ", ")
	}
	return string(m.Op) + " " + list
}

// String is the title of the test: its name, or else what it is about.
func (t Test) String() string {
	if t.Name != "" {
		return t.Name
	}
	return string(t.Kind) + " " + t.Subject
}
