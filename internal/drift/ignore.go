// SPDX-License-Identifier: Apache-2.0

package drift

import (
	_ "embed"
	"fmt"
	"regexp"
	"strings"
)

//go:embed ignore.txt
var defaults string

// Defaults is the list of what every running system touches, with its comments.
func Defaults() string { return defaults }

// Ignore is a list of patterns in the manner of .gitignore. The last one that
// matches counts. A nil list matches nothing.
type Ignore struct {
	rules []rule
}

type rule struct {
	re  *regexp.Regexp
	dir bool // folders only, and what lies in them
	not bool
}

// ParseIgnore reads lists of patterns, one a line. Comments begin with #, and a
// pattern with ! takes a path back.
func ParseIgnore(lists ...string) (*Ignore, error) {
	ig := &Ignore{}
	for _, list := range lists {
		for n, line := range strings.Split(list, "\n") {
			line = strings.TrimSpace(line)
			if line == "" || line[0] == '#' {
				continue
			}
			r, err := parseRule(line)
			if err != nil {
				return nil, fmt.Errorf("line %d: ignore pattern %q: %w", n+1, line, err)
			}
			ig.rules = append(ig.rules, r)
		}
	}
	return ig, nil
}

func parseRule(s string) (rule, error) {
	var r rule
	s, r.not = strings.CutPrefix(s, "!")
	s, r.dir = strings.CutSuffix(s, "/")
	if !strings.Contains(s, "/") {
		s = "/**/" + s
	}
	s = "/" + strings.TrimPrefix(s, "/")
	var b strings.Builder
	b.WriteString("(?s)^")
	for len(s) > 0 {
		switch {
		case s == "/**":
			b.WriteString("/.+")
			s = ""
		case strings.HasPrefix(s, "/**/"):
			b.WriteString("(?:/[^/]+)*/")
			s = s[4:]
		case s[0] == '*':
			b.WriteString("[^/]*")
			s = strings.TrimLeft(s, "*")
		case s[0] == '?':
			b.WriteString("[^/]")
			s = s[1:]
		case s[0] == '\\' && len(s) > 1:
			b.WriteString(regexp.QuoteMeta(s[1:2]))
			s = s[2:]
		default:
			n := max(1, strings.IndexAny(s[1:], "/*?\\")+1)
			if !strings.ContainsAny(s[1:], "/*?\\") {
				n = len(s)
			}
			b.WriteString(regexp.QuoteMeta(s[:n]))
			s = s[n:]
		}
	}
	b.WriteString("(/.*)?$") // what lies in a folder goes with it
	re, err := regexp.Compile(b.String())
	r.re = re
	return r, err
}

// Match reports whether the list hides an absolute path.
func (ig *Ignore) Match(path string, dir bool) bool {
	if ig == nil {
		return false
	}
	for i := len(ig.rules) - 1; i >= 0; i-- {
		r := ig.rules[i]
		m := r.re.FindStringSubmatchIndex(path)
		if m == nil || r.dir && !dir && m[2] < 0 {
			continue
		}
		return !r.not
	}
	return false
}
