// SPDX-License-Identifier: Apache-2.0

package labfile

import (
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
	"unicode/utf8"
)

// variables fills in ${NAME}, ${NAME:-default} and $$. It works on the values
// of a parsed document, so what a variable holds can never become YAML.
type variables struct {
	vars   map[string]string
	lookup func(string) (string, bool)
	used   map[string]bool // of vars and of the environment alike
	budget int             // bytes that interpolation may still produce
}

func newVariables(o Options) *variables {
	return &variables{vars: o.Vars, lookup: o.LookupEnv, used: map[string]bool{}, budget: maxFile}
}

var variableName = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*$`)

// get returns the value of a variable: what was given on the command line comes
// before the environment.
func (v *variables) get(name string) (string, bool) {
	v.used[name] = true
	if value, ok := v.vars[name]; ok {
		return value, true
	}
	if v.lookup == nil {
		return "", false
	}
	return v.lookup(name)
}

// expand returns s with its variables filled in. A dollar that stands before
// anything but "{" or "$" is an ordinary character.
func (v *variables) expand(s string) (string, error) {
	var b strings.Builder
	for {
		i := strings.IndexByte(s, '$')
		if i < 0 || i == len(s)-1 {
			b.WriteString(s)
			return b.String(), nil
		}
		b.WriteString(s[:i])
		switch s = s[i:]; s[1] {
		case '$':
			b.WriteByte('$')
			s = s[2:]
		case '{':
			end := strings.IndexByte(s, '}')
			if end < 0 {
				return "", fmt.Errorf("%q is not closed; write ${NAME}, or $${ for a literal ${", shorten(s))
			}
			value, err := v.reference(s[:end+1])
			if err != nil {
				return "", err
			}
			if v.budget -= len(value); v.budget < 0 {
				return "", fmt.Errorf("the variables of this file hold more than %d bytes together", maxFile)
			}
			b.WriteString(value)
			s = s[end+1:]
		default:
			b.WriteByte('$')
			s = s[1:]
		}
	}
}

// reference returns the value that ref, "${…}", stands for.
func (v *variables) reference(ref string) (string, error) {
	name, fallback, hasFallback := strings.Cut(ref[2:len(ref)-1], ":-")
	if !variableName.MatchString(name) {
		return "", fmt.Errorf("%q is not a variable; write ${NAME} or ${NAME:-default}, or $${ for a literal ${", shorten(ref))
	}
	if strings.Contains(fallback, "${") {
		return "", fmt.Errorf("the default of ${%s} cannot hold another variable", name)
	}
	value, ok := v.get(name)
	if hasFallback && value == "" {
		return strings.ReplaceAll(fallback, "$$", "$"), nil
	}
	if !ok {
		return "", fmt.Errorf("%s is not set; use --var %s=VALUE, or give a default with ${%s:-default}, or write $${%s} to keep it as it is", name, name, name, name)
	}
	if !utf8.ValidString(value) || strings.ContainsRune(value, 0) {
		return "", fmt.Errorf("the value of %s is not UTF-8 text", name)
	}
	return value, nil
}

// unused returns the names given on the command line that no value asked for.
func (v *variables) unused() []string {
	names := slices.Sorted(maps.Keys(v.vars))
	return slices.DeleteFunc(names, func(name string) bool { return v.used[name] })
}

// asked returns the names of the variables that the file uses.
func (v *variables) asked() []string { return slices.Sorted(maps.Keys(v.used)) }

// shorten cuts s to what fits in a message.
func shorten(s string) string {
	const most = 60
	if len(s) <= most {
		return s
	}
	cut := most
	for cut > 0 && !utf8.RuneStart(s[cut]) {
		cut--
	}
	return s[:cut] + "…"
}
