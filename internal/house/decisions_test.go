// SPDX-License-Identifier: Apache-2.0

package house

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// decision is the form of a page of docs/decisions: its number, title and date.
var decision = regexp.MustCompile(`^# (\d{4})\. (.+)\n\nDecided: (\d{4}-\d\d-\d\d)\n(?:\nSuperseded by \d{4}\.\n)?` +
	`\n## Context\n\n(?s:.+?)\n\n## Decision\n\n(?s:.+?)\n\n## Alternatives\n\n(?s:.+?)\n\n## Consequences\n\n(?s:.+)\n$`)

// TestDecisions checks that the decisions have their form, are numbered without a gap, and
// are listed in the order of their numbers.
func TestDecisions(t *testing.T) {
	dir := filepath.Join(root, "docs/decisions")
	pages, err := filepath.Glob(filepath.Join(dir, "[0-9]*.md"))
	if err != nil {
		t.Fatal(err)
	}
	if len(pages) < 10 {
		t.Errorf("found %d decisions, want 10 or more", len(pages))
	}
	var list strings.Builder
	for i, page := range pages {
		name := filepath.Base(page)
		text, err := os.ReadFile(page)
		if err != nil {
			t.Fatal(err)
		}
		m := decision.FindStringSubmatch(string(text))
		if m == nil {
			t.Errorf("%s has not the form that README.md shows", name)
			continue
		}
		if want := fmt.Sprintf("%04d", i+1); m[1] != want || !strings.HasPrefix(name, want+"-") {
			t.Errorf("%s is number %s, want %s", name, m[1], want)
		}
		for _, section := range []string{"Context", "Decision", "Alternatives", "Consequences"} {
			if n := strings.Count(string(text), "\n## "+section+"\n"); n != 1 {
				t.Errorf("%s has the section %q %d times", name, section, n)
			}
		}
		fmt.Fprintf(&list, "| [%s. %s](%s) | %s |\n", m[1], m[2], name, m[3])
	}
	readme, err := os.ReadFile(filepath.Join(dir, "README.md"))
	if err != nil {
		t.Fatal(err)
	}
	if !strings.HasSuffix(string(readme), "\n| --- | --- |\n"+list.String()) {
		t.Errorf("the list at the end of README.md must be\n%s", list.String())
	}
}
