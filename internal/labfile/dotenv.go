// SPDX-License-Identifier: Apache-2.0

package labfile

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"unicode/utf8"
)

// dotenv is the file .env beside a Labfile. It is read when a variable is first
// looked for in it, so that one which is there for something else disturbs nobody.
type dotenv struct {
	path string // empty for none
	read bool
	vars map[string]string
	list []Problem
}

// get returns what the file says of a variable.
func (d *dotenv) get(name string) (string, bool) {
	if !d.read && d.path != "" {
		d.load()
	}
	d.read = true
	value, ok := d.vars[name]
	return value, ok
}

func (d *dotenv) load() {
	data, err := readFile(d.path)
	var bad *Problems
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case errors.As(err, &bad):
		d.list = bad.List
	case err != nil:
		d.list = []Problem{{File: display(d.path), Message: err.Error()}}
	default:
		d.vars, d.list = parseDotenv(display(d.path), data)
	}
}

// parseDotenv reads lines of NAME=VALUE, maybe after "export". A value in single
// quotes is taken as it stands, one in double quotes knows \n, \t, \r, \", \\ and \$;
// both can have several lines. Any other value ends with its line, or before " #",
// which begins a comment. No variable is filled in: where a shell would do that, the
// value is refused. Of a name that stands twice, the last value counts. file names the
// file in problems.
func parseDotenv(file string, data []byte) (map[string]string, []Problem) {
	p := dotenvParser{file: file, vars: map[string]string{}, line: 1}
	data = bytes.TrimPrefix(data, []byte(bom))
	if !utf8.Valid(data) || bytes.IndexByte(data, 0) >= 0 {
		return nil, []Problem{{File: file, Message: "not UTF-8 text"}}
	}
	p.rest = strings.ReplaceAll(string(data), "\r\n", "\n")
	for p.rest != "" && len(p.list) < maxProblems {
		p.entry()
	}
	return p.vars, p.list
}

type dotenvParser struct {
	file string
	rest string
	line int // of the beginning of rest
	vars map[string]string
	list []Problem
}

func (p *dotenvParser) add(line, column int, format string, args ...any) {
	p.list = append(p.list, Problem{File: p.file, Line: line, Column: column, Message: fmt.Sprintf(format, args...)})
}

// next takes the first n bytes of the rest.
func (p *dotenvParser) next(n int) string {
	taken := p.rest[:n]
	p.rest = p.rest[n:]
	p.line += strings.Count(taken, "\n")
	return taken
}

// entry reads one line, or more if its value is quoted.
func (p *dotenvParser) entry() {
	line, _, more := strings.Cut(p.rest, "\n")
	whole := len(line)
	if more {
		whole++
	}
	begin := len(line) - len(strings.TrimLeft(line, " \t"))
	text := strings.TrimRight(line[begin:], " \t\r")
	at := p.line
	if text == "" || text[0] == '#' {
		p.next(whole)
		return
	}
	if after, ok := strings.CutPrefix(text, "export"); ok && strings.TrimLeft(after, " \t") != after {
		after = strings.TrimLeft(after, " \t")
		begin += len(text) - len(after)
		text = after
	}
	column := utf8.RuneCountInString(line[:begin]) + 1
	name, value, ok := strings.Cut(text, "=")
	switch {
	case !ok:
		p.add(at, column, "%q is not a variable; write NAME=VALUE", shorten(text))
	case name != strings.TrimRight(name, " \t") || value != strings.TrimLeft(value, " \t"):
		p.add(at, column, "write %s=VALUE, without spaces around the =", shorten(strings.TrimSpace(name)))
	case !variableName.MatchString(name):
		p.add(at, column, "%q is not the name of a variable", shorten(name))
	case value != "" && (value[0] == '"' || value[0] == '\''):
		p.next(begin + len(name) + 1)
		p.quoted(name, column+len(name)+1)
		return
	default:
		if i := strings.Index(value, " #"); i >= 0 {
			value = strings.TrimRight(value[:i], " \t")
		} else if strings.HasPrefix(value, "#") {
			value = ""
		}
		if p.plain(value, at, column+len(name)+1) {
			p.vars[name] = value
		}
	}
	p.next(whole)
}

// plain reports whether value has nothing that a shell would fill in.
func (p *dotenvParser) plain(value string, line, column int) bool {
	for i := 0; i+1 < len(value); i++ {
		switch next := value[i+1]; {
		case value[i] == '\\':
			i++
		case value[i] == '$' && (next == '{' || next == '(' || variableName.MatchString(string(next))):
			line, column := line, column+utf8.RuneCountInString(value[:i])
			if n := strings.Count(value[:i], "\n"); n > 0 {
				line, column = line+n, utf8.RuneCountInString(value[strings.LastIndexByte(value[:i], '\n')+1:i])+1
			}
			p.add(line, column, "no variable is filled in here; put a value with a dollar into single quotes")
			return false
		}
	}
	return true
}

// quoted reads the value of a variable from its first quote on, and what is behind it
// on its line.
func (p *dotenvParser) quoted(name string, column int) {
	at, quote := p.line, p.rest[0]
	end := 1
	for end < len(p.rest) && p.rest[end] != quote {
		if quote == '"' && p.rest[end] == '\\' {
			end++
		}
		end++
	}
	if end >= len(p.rest) {
		p.add(at, column, "the quote that begins here is not closed")
		p.next(len(p.rest))
		return
	}
	value := p.next(end + 1)[1:end]
	behind, _, more := strings.Cut(p.rest, "\n")
	if more {
		p.next(len(behind) + 1)
	} else {
		p.next(len(behind))
	}
	if b := strings.TrimLeft(behind, " \t"); b != "" && (b[0] != '#' || b == behind) {
		p.add(at, column, "there is more behind the closing quote: %q", shorten(strings.TrimSpace(b)))
		return
	}
	if quote == '"' {
		if !p.plain(value, at, column+1) {
			return
		}
		value = unescaper.Replace(value)
	}
	p.vars[name] = value
}

var unescaper = strings.NewReplacer(`\n`, "\n", `\t`, "\t", `\r`, "\r", `\"`, `"`, `\\`, `\`, `\$`, "$")
