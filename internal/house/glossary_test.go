// SPDX-License-Identifier: Apache-2.0

package house

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// glossaryRow is a row of docs/glossary.md: the term, its meaning, and the declaration.
var glossaryRow = regexp.MustCompile("^\\| ([^|]+) \\| [^|]+[.] \\| `([a-z][a-z0-9/]*)[.]([A-Za-z.]+)` \\|$")

// TestGlossary looks up the declaration that each term of the glossary names.
func TestGlossary(t *testing.T) {
	const file = "docs/glossary.md"
	text, err := os.ReadFile(filepath.Join(root, file))
	if err != nil {
		t.Fatal(err)
	}
	declared := map[string]map[string]bool{}
	seen := map[string]int{}
	for i, line := range strings.Split(string(text), "\n") {
		if !strings.HasPrefix(line, "| ") || line == "| term | meaning | code |" || strings.HasPrefix(line, "| --- ") {
			continue
		}
		m := glossaryRow.FindStringSubmatch(line)
		if m == nil {
			t.Errorf("%s:%d: want a row \"| term | Meaning. | `folder.Name` |\", got %s", file, i+1, line)
			continue
		}
		term, dir, name := m[1], m[2], m[3]
		if first := seen[term]; first > 0 {
			t.Errorf("%s:%d: %s stands in line %d too", file, i+1, term, first)
		}
		seen[term] = i + 1
		if declared[dir] == nil {
			declared[dir] = declarations(t, filepath.Join(root, dir))
		}
		if !declared[dir][name] {
			t.Errorf("%s:%d: %s: %s declares no %s", file, i+1, term, dir, name)
		}
	}
	if len(seen) < 40 {
		t.Errorf("%s has %d terms, want 40 or more", file, len(seen))
	}
}

// declarations returns the names that the Go files of a folder declare: Name for a declaration
// at the top, and Type.Member for methods, fields of structs, and methods of interfaces.
func declarations(t *testing.T, dir string) map[string]bool {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "*.go"))
	if err != nil {
		t.Fatal(err)
	}
	names := map[string]bool{}
	for _, path := range files {
		if strings.HasSuffix(path, "_test.go") {
			continue
		}
		f, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range f.Decls {
			switch d := d.(type) {
			case *ast.FuncDecl:
				names[receiver(d)+d.Name.Name] = true
			case *ast.GenDecl:
				for _, s := range d.Specs {
					declare(names, s)
				}
			}
		}
	}
	return names
}

// declare adds what a specification of a constant, variable or type declares.
func declare(names map[string]bool, s ast.Spec) {
	switch s := s.(type) {
	case *ast.ValueSpec:
		for _, n := range s.Names {
			names[n.Name] = true
		}
	case *ast.TypeSpec:
		names[s.Name.Name] = true
		var members *ast.FieldList
		switch of := s.Type.(type) {
		case *ast.StructType:
			members = of.Fields
		case *ast.InterfaceType:
			members = of.Methods
		default:
			return
		}
		for _, m := range members.List {
			for _, n := range m.Names {
				names[s.Name.Name+"."+n.Name] = true
			}
		}
	}
}

// receiver returns the name of a method's type with a dot behind it; nothing of a function.
func receiver(d *ast.FuncDecl) string {
	if d.Recv == nil || len(d.Recv.List) == 0 {
		return ""
	}
	of := d.Recv.List[0].Type
	if p, ok := of.(*ast.StarExpr); ok {
		of = p.X
	}
	return fmt.Sprint(of) + "."
}
