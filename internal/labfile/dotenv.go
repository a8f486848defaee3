// SPDX-License-Identifier: Apache-2.0

package labfile

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"syscall"
	"unicode/utf8"
)

// dotenv is the file .env beside a Labfile. It may be there for another program, so it is
// read when a variable is first looked for in it, and what is wrong with it counts only
// where the Labfile needs it.
type dotenv struct {
	path  string // empty for none
	owner int    // of the Labfile, whom the user trusts with more than variables
	read  bool
	vars  map[string]string
	list  []Problem
	names []string        // of the variables that the problems in list are about; "" for none
	asked map[string]bool // variables that were looked for and are not in vars
	unset bool            // one of them has no value at all
}

// get returns what the file says of a variable.
func (d *dotenv) get(name string) (string, bool) {
	if !d.read && d.path != "" {
		d.load()
	}
	d.read = true
	value, ok := d.vars[name]
	if !ok {
		if d.asked == nil {
			d.asked = map[string]bool{}
		}
		d.asked[name] = true
	}
	return value, ok
}

func (d *dotenv) load() {
	switch fi, err := os.Stat(d.path); {
	case err != nil:
	case fi.IsDir():
		return // a virtual environment of Python, for example
	default:
		if st, ok := fi.Sys().(*syscall.Stat_t); ok && !d.trusts(int(st.Uid)) {
			d.list = []Problem{{File: display(d.path), Message: fmt.Sprintf("it belongs to another user (uid %d) and is not read; remove it, or use --var", st.Uid)}}
			return
		}
	}
	data, err := readFile(d.path)
	var bad *Problems
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case errors.As(err, &bad):
		d.list = bad.List
	case err != nil:
		d.list = []Problem{{File: display(d.path), Message: err.Error()}}
	default:
		d.vars, d.list, d.names = parseDotenv(display(d.path), data)
	}
}

// trusts reports whether a file of that user is read: the user's own, root's, or one of the
// Labfile's owner. In a folder that many can write to, such as /tmp, any user can make one.
func (d *dotenv) trusts(uid int) bool { return uid == 0 || uid == os.Geteuid() || uid == d.owner }

// problems are those about variables that were looked for, and all of them if a variable
// has no value.
func (d *dotenv) problems() []Problem {
	var out []Problem
	for i, p := range d.list {
		if d.unset || i < len(d.names) && d.asked[d.names[i]] {
			out = append(out, p)
		}
	}
	return out
}

// parseDotenv reads lines of NAME=VALUE, maybe after "export". A value in single
// quotes is taken as it stands, one in double quotes knows \n, \t, \r, \", \\ and \$;
// both can have several lines. Any other value ends with its line, or before " #",
// which begins a comment. No variable is filled in: where a shell would do that, the
// value is refused. Of a name that stands twice, the last value counts. file names the
// file in problems; names are those of the variables that the problems are about, "" if
// a problem is about none.
func parseDotenv(file string, data []byte) (vars map[string]string, problems []Problem, names []string) {
	p := dotenvParser{file: file, vars: map[string]string{}, line: 1}
	data = bytes.TrimPrefix(data, []byte(bom))
	if !utf8.Valid(data) || bytes.IndexByte(data, 0) >= 0 {
		return nil, []Problem{{File: file, Message: "not UTF-8 text"}}, []string{""}
	}
	p.rest = strings.ReplaceAll(string(data), "\r\n", "\n")
	for p.rest != "" && len(p.list) < maxProblems {
		p.entry()
	}
	return p.vars, p.list, p.names
}

type dotenvParser struct {
	file string
	rest string
	line int // of the beginning of rest
	vars map[string]string
	list []Problem

	name  string // of the variable that is read; empty if there is none
	names []string
}

func (p *dotenvParser) add(line, column int, format string, args ...any) {
	p.names = append(p.names, p.name)
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
	p.name = strings.TrimSpace(name)
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
