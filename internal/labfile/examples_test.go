// SPDX-License-Identifier: Apache-2.0

package labfile

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestExamples validates every folder of examples as "lab validate" does, and with the
// schema. Each has a page, and a line in the list.
func TestExamples(t *testing.T) {
	const root = "../../examples"
	list := string(read(t, filepath.Join(root, "README.md")))
	entries, err := os.ReadDir(root)
	if err != nil {
		t.Fatal(err)
	}
	s := compiled(t)
	labs := map[string]string{}
	for _, e := range entries {
		if !e.IsDir() {
			continue
		}
		file := filepath.Join(root, e.Name(), "Labfile")
		l, err := Load(file, Options{HostFiles: true})
		if err != nil {
			t.Errorf("examples/%s: %v", e.Name(), err)
			continue
		}
		if err := s.Validate(instance(t, read(t, file))); err != nil {
			t.Errorf("examples/%s: the schema refuses it: %v", e.Name(), err)
		}
		if first := labs[l.Name]; first != "" {
			t.Errorf("examples/%s and examples/%s are both called %s", first, e.Name(), l.Name)
		}
		labs[l.Name] = e.Name()
		if page := string(read(t, filepath.Join(root, e.Name(), "README.md"))); !strings.HasPrefix(page, "# ") {
			t.Errorf("examples/%s/README.md has no title", e.Name())
		}
		if !strings.Contains(list, "| ["+e.Name()+"]("+e.Name()+") | ") {
			t.Errorf("examples/README.md does not list %s", e.Name())
		}
	}
	if len(labs) < 4 {
		t.Errorf("there are %d examples, want 4 or more", len(labs))
	}
}
