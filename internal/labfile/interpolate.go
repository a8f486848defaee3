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

// variables fills in variables. It works on the values of a parsed document, so what
// a variable holds can never become YAML. In text for the guest, which has dollars of
// its own, a variable is ${{ NAME }} or ${{ NAME:-default }}; in any other value it is
// ${NAME} or ${NAME:-default}.
type variables struct {
	vars   map[string]string
	lookup func(string) (string, bool)
	dotenv *dotenv
	used   map[string]bool // of vars and of the environment alike
	shell  map[string]bool // names that text for the guest has as ${NAME}
	budget int             // bytes that interpolation may still produce
}

func newVariables(o Options) *variables {
	return &variables{
		vars: o.Vars, lookup: o.LookupEnv, dotenv: &dotenv{path: o.dotenv, owner: o.owner},
		used: map[string]bool{}, shell: map[string]bool{}, budget: maxFile,
	}
}

var (
	variableName = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*$`)
	shellForm    = regexp.MustCompile(`\$\{([A-Za-z_][A-Za-z0-9_]*)`)
)

// get returns the value of a variable. What was given on the command line comes
// first, then the environment, then the file .env.
func (v *variables) get(name string) (string, bool) {
	v.used[name] = true
	if value, ok := v.vars[name]; ok {
		return value, true
	}
	if v.lookup != nil {
		if value, ok := v.lookup(name); ok {
			return value, true
		}
	}
	return v.dotenv.get(name)
}

// flaw is what is wrong with a text, and where: a byte of the text.
type flaw struct {
	offset  int
	message string
}

// expansion is a text with its variables filled in.
type expansion struct {
	text   string
	pieces []piece // in order; none if the text is as written
	flaws  []flaw  // by place in the written text
}

// piece says where in the text as written the text from out on comes from.
type piece struct {
	out, in int
	value   bool // it is the value of the variable at in
}

// origin returns the place in the text as written that the byte at offset comes from.
func (e expansion) origin(offset int) int {
	i, found := slices.BinarySearchFunc(e.pieces, offset, func(p piece, offset int) int { return p.out - offset })
	if !found {
		i--
	}
	switch {
	case i < 0:
		return offset
	case e.pieces[i].value:
		return e.pieces[i].in
	}
	return e.pieces[i].in + offset - e.pieces[i].out
}

// notation is a way to write variables.
type notation struct{ open, end, example, escape string }

var (
	hostNotation  = notation{"${", "}", "${%s}", "$${"}
	guestNotation = notation{"${{", "}}", "${{ %s }}", "$${{"}
)

// write returns what a variable, maybe with a default, looks like.
func (n notation) write(inner string) string { return fmt.Sprintf(n.example, inner) }

// expand fills in the variables of s, which is a text for the guest or another value.
// In the latter, "$$" is a dollar. A dollar before anything else is just that.
func (v *variables) expand(s string, guest bool) expansion {
	if !strings.Contains(s, "$") {
		return expansion{text: s}
	}
	n := hostNotation
	if guest {
		n = guestNotation
		if len(v.vars) > 0 {
			for _, m := range shellForm.FindAllStringSubmatch(s, -1) {
				v.shell[m[1]] = true
			}
		}
	}
	var (
		e    expansion
		b    strings.Builder
		at   int // s is copied up to here
		take = func(to int) {
			e.pieces = append(e.pieces, piece{out: b.Len(), in: at})
			b.WriteString(s[at:to])
			at = to
		}
	)
	for i := 0; i < len(s) && len(e.flaws) < maxProblems; {
		rest := s[i:]
		switch {
		case rest[0] != '$':
			i++
		case guest && strings.HasPrefix(rest, n.escape), !guest && strings.HasPrefix(rest, "$$"):
			take(i + 1)
			at = i + 2 // without the second dollar
			i += len(n.escape)
			if !guest {
				i = at
			}
		case strings.HasPrefix(rest, n.open):
			take(i)
			line, _, _ := strings.Cut(rest, "\n")
			if !guest {
				line = rest
			}
			end := strings.Index(line, n.end)
			if end < 0 {
				e.flaws = append(e.flaws, flaw{i, fmt.Sprintf("%q is not closed; write %s, or %s for a literal %s", shorten(line), n.write("NAME"), n.escape, n.open)})
				i += len(line) // nothing on the rest of the line closes it either
				continue
			}
			ref := rest[:end+len(n.end)]
			value, err := v.reference(ref, n)
			if err != nil {
				e.flaws = append(e.flaws, flaw{i, err.Error()})
			}
			if v.budget -= len(value); v.budget < 0 {
				e.flaws = append(e.flaws, flaw{i, fmt.Sprintf("the variables of this file hold more than %d bytes together", maxFile)})
				return e
			}
			e.pieces = append(e.pieces, piece{out: b.Len(), in: i, value: true})
			b.WriteString(value)
			i += len(ref)
			at = i
		default:
			i++
		}
	}
	take(len(s))
	e.text = b.String()
	return e
}

// reference returns the value that ref stands for, which is written in notation n.
func (v *variables) reference(ref string, n notation) (string, error) {
	inner := ref[len(n.open) : len(ref)-len(n.end)]
	if n == guestNotation {
		inner = strings.Trim(inner, " \t")
	} else if strings.HasPrefix(inner, "{") {
		return "", fmt.Errorf("%s is for text that goes to the guest; write ${NAME} here", guestNotation.write("NAME"))
	}
	name, fallback, hasFallback := strings.Cut(inner, ":-")
	if n == guestNotation {
		name = strings.TrimRight(name, " \t")
	}
	if !variableName.MatchString(name) {
		return "", fmt.Errorf("%q is not a variable; write %s or %s, or %s for a literal %s", shorten(ref), n.write("NAME"), n.write("NAME:-default"), n.escape, n.open)
	}
	if strings.Contains(fallback, n.open) {
		return "", fmt.Errorf("the default of %s cannot hold another variable", n.write(name))
	}
	value, ok := v.get(name)
	if hasFallback && value == "" {
		if n == hostNotation {
			fallback = strings.ReplaceAll(fallback, "$$", "$")
		}
		return fallback, nil
	}
	if !ok {
		v.dotenv.unset = true
		return "", fmt.Errorf("%s is not set; use --var %s=VALUE, or give a default with %s, or write $%s to keep it as it is", name, name, n.write(name+":-default"), n.write(name))
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
