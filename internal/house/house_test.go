// SPDX-License-Identifier: Apache-2.0

package house

import (
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const root = "../.."

// TestHouse checks the project itself.
func TestHouse(t *testing.T) {
	pkgs := list(t)
	for _, b := range Check(pkgs) {
		t.Error(b)
	}
	ours := 0
	for _, p := range pkgs {
		if _, ok := rel(p.ImportPath); ok {
			ours++
		}
	}
	if ours < 5 {
		t.Errorf("go list found %d packages of ours: the rules were checked against next to nothing", ours)
	}
}

// TestLicense checks that every Go file says under which licence it stands.
func TestLicense(t *testing.T) {
	seen := 0
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && path != root && strings.HasPrefix(d.Name(), "."):
			return fs.SkipDir
		case d.IsDir() || filepath.Ext(path) != ".go":
			return nil
		}
		src, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		seen++
		if !License(src) {
			t.Errorf("%s does not begin with the SPDX line", strings.TrimPrefix(path, root+"/"))
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if seen < 5 {
		t.Errorf("found %d Go files below %s", seen, root)
	}
}

// renames are the places outside of internal/fsutil that rename files, and why none of them
// replaces the content of a file.
var renames = map[string]string{
	"boxes/ingest.go":                   "publishes blobs that are synced already, then syncs the folder once",
	"boxes/build/tree.go":               "moves files of a build, which begins anew after a loss of power",
	"internal/bake/store.go":            "moves disks that are synced already, then syncs the folder once",
	"internal/guest/filestream/tree.go": "puts what was copied to the user in its place; cp promises no more than cp(1)",
	"internal/supervise/spawn.go":       "turns a log",
	"providers/local/make.go":           "moves a directory to the trash",
	"providers/local/run.go":            "a FIFO, and a console's log, of a machine that runs",
}

// TestOneWriter checks that files are replaced by internal/fsutil, which syncs the content and
// the name in the order that survives a loss of power.
func TestOneWriter(t *testing.T) {
	seen := map[string]bool{}
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || filepath.Ext(path) != ".go" || strings.HasSuffix(path, "_test.go") {
			return err
		}
		src, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		name := filepath.ToSlash(strings.TrimPrefix(path, root+"/"))
		if !strings.Contains(string(src), "os.Rename(") || strings.HasPrefix(name, "internal/fsutil/") {
			return nil
		}
		seen[name] = true
		if renames[name] == "" {
			t.Errorf("%s calls os.Rename: use fsutil.WriteFile, fsutil.Draft or fsutil.Rename, or say in renames why it need not", name)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for name := range renames {
		if !seen[name] {
			t.Errorf("%s renames nothing any more: take it out of renames", name)
		}
	}
}

// list returns the packages of the project and all that they depend on.
func list(t *testing.T) []Package {
	t.Helper()
	cmd := exec.Command("go", "list", "-deps", "-json=ImportPath,Doc,Standard,Imports,Deps", "./...")
	cmd.Dir = root
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	var pkgs []Package
	for dec := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p Package
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			return pkgs
		} else if err != nil {
			t.Fatal(err)
		}
		pkgs = append(pkgs, p)
	}
}

// TestCheck shows that each rule can fail.
func TestCheck(t *testing.T) {
	pkg := func(path string, imports ...string) Package {
		p := Package{ImportPath: Module + "/" + path, Doc: "Package x.", Imports: imports, Deps: imports}
		return p
	}
	for _, tt := range []struct {
		name string
		pkgs []Package
		want []string
	}{
		{
			name: "clean",
			pkgs: []Package{
				{ImportPath: "fmt", Standard: true},
				{ImportPath: "example.com/x"},
				pkg("internal/lab", "fmt"),
				pkg("internal/cli", Module+"/internal/engine", "example.com/x"),
				pkg("cmd/lab", Module+"/internal/cli", Module+"/providers/qemu"),
			},
		},
		{
			name: "core imports a module",
			pkgs: []Package{{ImportPath: "example.com/x"}, pkg("internal/lab", "example.com/x")},
			want: []string{"internal/lab depends on example.com/x: the core imports the standard library only"},
		},
		{
			name: "core imports one of ours",
			pkgs: []Package{pkg("internal/lab", Module+"/internal/dirs")},
			want: []string{
				"internal/lab depends on internal/dirs: the core imports the standard library only",
				"internal/lab imports internal/dirs: imports go down only",
			},
		},
		{
			name: "plan reaches a provider through another package",
			pkgs: []Package{{
				ImportPath: Module + "/internal/plan", Doc: "Package plan.",
				Imports: []string{Module + "/internal/ledger"},
				Deps:    []string{Module + "/internal/ledger", Module + "/providers"},
			}},
			want: []string{"internal/plan depends on providers: a plan is a value: it knows no provider"},
		},
		{
			name: "provider imports the ledger",
			pkgs: []Package{pkg("providers/qemu", Module+"/internal/ledger")},
			want: []string{
				"providers/qemu depends on internal/ledger: a provider keeps its own truth",
				"providers/qemu imports internal/ledger: imports go down only",
			},
		},
		{
			name: "engine names a provider and prints",
			pkgs: []Package{pkg("internal/engine", Module+"/providers/qemu", Module+"/internal/ui")},
			want: []string{
				"internal/engine depends on internal/ui: libraries return values, only ui prints",
				"internal/engine imports internal/ui: imports go down only",
				"internal/engine imports providers/qemu: only cmd/lab and tests name a concrete provider",
			},
		},
		{
			name: "one provider imports another",
			pkgs: []Package{pkg("providers/libvirt", Module+"/providers/qemu/x")},
			want: []string{"providers/libvirt imports providers/qemu/x: only cmd/lab and tests name a concrete provider"},
		},
		{
			name: "no comment, no place",
			pkgs: []Package{{ImportPath: Module + "/internal/utils"}},
			want: []string{
				"internal/utils has no package comment",
				"internal/utils has no place in the house: give it a rank",
			},
		},
		{
			name: "the agent grows",
			pkgs: []Package{pkg("cmd/lab-agent", Module+"/boxes")},
			want: []string{"cmd/lab-agent depends on boxes: the agent stays small"},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if diff := cmp.Diff(tt.want, Check(tt.pkgs)); diff != "" {
				t.Errorf("breaches (-want +got):\n%s", diff)
			}
		})
	}
}

func TestLicenseLine(t *testing.T) {
	for _, tt := range []struct {
		src  string
		want bool
	}{
		{"// SPDX-License-Identifier: Apache-2.0\n\npackage x\n", true},
		{"package x\n", false},
		{"\n// SPDX-License-Identifier: Apache-2.0\n", false},
		{"// SPDX-License-Identifier: MIT\n", false},
	} {
		if got := License([]byte(tt.src)); got != tt.want {
			t.Errorf("License(%q) = %v, want %v", tt.src, got, tt.want)
		}
	}
}
