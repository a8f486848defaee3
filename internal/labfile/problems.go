// SPDX-License-Identifier: Apache-2.0

package labfile

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
)

// Problem is one thing that is wrong with a Labfile or a lock file.
type Problem struct {
	File    string
	Line    int    // from 1; 0 if the problem has no place in the file
	Column  int    // in characters, from 1
	Path    string // of the key: "machines.web.ports[0]"; empty for the whole file
	Message string
}

// String renders the problem as "Labfile:12:5: machines.web.memory: what is wrong".
func (p Problem) String() string {
	var b strings.Builder
	b.WriteString(p.File)
	if p.Line > 0 {
		fmt.Fprintf(&b, ":%d:%d", p.Line, p.Column)
	}
	b.WriteString(": ")
	if p.Path != "" {
		b.WriteString(p.Path + ": ")
	}
	b.WriteString(p.Message)
	return b.String()
}

// Problems is the error for a file that was read and refused: everything that
// is wrong with it, by place.
type Problems struct {
	List []Problem // sorted by line, column and path; never empty
	More int       // problems beyond the first maxProblems, which are not listed
}

// maxProblems bounds how many problems are kept: nobody reads more, and a
// hostile file must not cost memory.
const maxProblems = 100

// Error renders one problem per line.
func (p *Problems) Error() string {
	lines := make([]string, 0, len(p.List)+1)
	for _, problem := range p.List {
		lines = append(lines, problem.String())
	}
	if p.More > 0 {
		lines = append(lines, fmt.Sprintf("%s: %d more problems", p.List[0].File, p.More))
	}
	return strings.Join(lines, "\n")
}

// place is where a value stands: what a message about it begins with. A place
// with line 0 belongs to a value that the file does not have.
type place struct {
	line, column int
	path         string
}

// set reports whether the file has the value.
func (p place) set() bool { return p.line > 0 }

// locate notes where the value stands that the place is part of.
func (p *place) locate(at place) { *p = at }

// report collects problems.
type report struct {
	file string
	list []Problem
	more int

	others []Problem // of another file, which this one leads to
}

// full reports whether further problems would only be counted, so that nobody
// needs to word them.
func (r *report) full() bool { return len(r.list) >= maxProblems }

// add notes a problem.
func (r *report) add(at place, format string, args ...any) {
	if r.full() {
		r.more++
		return
	}
	r.list = append(r.list, Problem{
		File: r.file, Line: at.line, Column: at.column, Path: at.path,
		Message: fmt.Sprintf(format, args...),
	})
}

// noted reports whether there is a problem with a value, or with a part of it.
func (r *report) noted(path string) bool {
	return slices.ContainsFunc(r.list, func(p Problem) bool {
		rest, ok := strings.CutPrefix(p.Path, path)
		return ok && (rest == "" || rest[0] == '.' || rest[0] == '[')
	})
}

// err returns the problems as an error, or nil if there are none.
func (r *report) err() error {
	if len(r.list)+len(r.others) == 0 {
		return nil
	}
	slices.SortStableFunc(r.list, func(a, b Problem) int {
		return cmp.Or(cmp.Compare(a.Line, b.Line), cmp.Compare(a.Column, b.Column), cmp.Compare(a.Path, b.Path))
	})
	return &Problems{List: slices.Concat(r.list, r.others), More: r.more}
}
