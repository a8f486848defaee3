// SPDX-License-Identifier: Apache-2.0

// Package house holds the rules of the house, those of its architecture that a
// machine can check: who may import whom, and what every package and file carries.
package house

import (
	"fmt"
	"slices"
	"sort"
	"strings"
)

// Module is the import path that all packages of the project begin with.
const Module = "github.com/labfile/lab"

// Package is what the rules need to know of a package; the fields are those of
// `go list -json`.
type Package struct {
	ImportPath string
	Doc        string
	Standard   bool
	Imports    []string // direct
	Deps       []string // direct and indirect
}

// rank orders the layers of the project from the bottom up: a package may import
// its own rank and those below it. Packages are named relative to Module; the
// longest prefix counts. A package that is not listed is an error: a new folder
// is an architectural decision, and this is where it is written down.
var rank = map[string]int{
	"internal/lab":       0,
	"internal/dirs":      1,
	"internal/fsutil":    1,
	"internal/program":   1,
	"providers":          1,
	"internal/network":   1,
	"internal/proxy":     1,
	"internal/drift":     1,
	"boxes":              2,
	"internal/plan":      2,
	"internal/ledger":    2,
	"internal/labfile":   2,
	"internal/volume":    2,
	"internal/guest":     2,
	"internal/bake":      2,
	"internal/verify":    2,
	"internal/share":     2,
	"internal/house":     2,
	"internal/e2e":       2,
	"internal/engine":    3,
	"internal/ui":        4,
	"internal/web":       4,
	"internal/cli":       5,
	"cmd":                6,
	"labtest":            6,
	"internal/supervise": 2,
}

// never lists what a package must not reach, not even through others.
var never = []struct {
	from, to, why string
}{
	{"internal/plan", "providers", "a plan is a value: it knows no provider"},
	{"providers", "internal/ledger", "a provider keeps its own truth"},
	{"providers", "internal/engine", "a provider carries out, it does not decide"},
	{"providers", "internal/labfile", "a provider knows no Labfile"},
	{"internal/engine", "internal/ui", "libraries return values, only ui prints"},
	{"internal/engine", "internal/cli", "imports go down only"},
	{"cmd/lab-agent", "internal/engine", "the agent stays small"},
	{"cmd/lab-agent", "boxes", "the agent stays small"},
	{"cmd/lab-agent", "providers/qemu", "the agent stays small"},
}

// only lists packages that just a few others may import directly.
var only = []struct {
	to  string
	by  []string
	why string
}{
	{"providers/qemu", []string{"cmd/lab", "providers/qemu"}, "only cmd/lab and tests name a concrete provider"},
	{"providers/libvirt", []string{"cmd/lab", "providers/libvirt"}, "only cmd/lab and tests name a concrete provider"},
	{"providers/memory", []string{"cmd/lab", "providers/memory"}, "only cmd/lab and tests name a concrete provider"},
	{"internal/cli", []string{"cmd/lab", "internal/cli"}, "imports go down only"},
}

// Check returns every breach of the rules among pkgs, one line each, sorted. The
// packages that pkgs depend on must be among them.
func Check(pkgs []Package) []string {
	var found []string
	breach := func(format string, a ...any) { found = append(found, fmt.Sprintf(format, a...)) }
	standard := map[string]bool{}
	for _, p := range pkgs {
		standard[p.ImportPath] = p.Standard
	}
	for _, p := range pkgs {
		path, ours := rel(p.ImportPath)
		if !ours {
			continue
		}
		if p.Doc == "" {
			breach("%s has no package comment", path)
		}
		own, ok := rankOf(path)
		if !ok {
			breach("%s has no place in the house: give it a rank", path)
		}
		for _, imp := range p.Imports {
			to, ours := rel(imp)
			if !ours {
				continue
			}
			if r, ok := rankOf(to); ok && r > own {
				breach("%s imports %s: imports go down only", path, to)
			}
			for _, o := range only {
				allowed := slices.ContainsFunc(o.by, func(by string) bool { return under(path, by) })
				if under(to, o.to) && !allowed {
					breach("%s imports %s: %s", path, to, o.why)
				}
			}
		}
		for _, dep := range p.Deps {
			to, ours := rel(dep)
			if !ours {
				if path == "internal/lab" && !standard[dep] {
					breach("%s depends on %s: the core imports the standard library only", path, dep)
				}
				continue
			}
			if path == "internal/lab" {
				breach("%s depends on %s: the core imports the standard library only", path, to)
			}
			for _, n := range never {
				if under(path, n.from) && under(to, n.to) {
					breach("%s depends on %s: %s", path, to, n.why)
				}
			}
		}
	}
	sort.Strings(found)
	return slices.Compact(found)
}

// License reports whether a Go file begins with the project's licence line.
func License(src []byte) bool {
	return strings.HasPrefix(string(src), "// SPDX-License-Identifier: Apache-2.0\n")
}

// rel returns the path of a package within the project, and whether it is one of ours.
func rel(path string) (string, bool) {
	if path == Module {
		return ".", true
	}
	return strings.CutPrefix(path, Module+"/")
}

// under reports whether path is dir or lies in it.
func under(path, dir string) bool {
	return path == dir || strings.HasPrefix(path, dir+"/")
}

func rankOf(path string) (int, bool) {
	best, r := "", 0
	for dir, n := range rank {
		if under(path, dir) && len(dir) > len(best) {
			best, r = dir, n
		}
	}
	return r, best != ""
}
