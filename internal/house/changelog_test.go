// SPDX-License-Identifier: Apache-2.0

package house

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"unicode/utf8"
)

// change is the form of a file of docs/changelog: kind and title, text, links.
var change = regexp.MustCompile(`^(?:Security|Change|Enhancement|Bugfix): [A-Z].{0,78}[^.\n]\n\n(?s:[^\s].*?)\n(?:\n(?:https://\S+\n)+)?$`)

// changeProblem returns what is wrong with the text of such a file; nothing if it has the form.
func changeProblem(text string) string {
	if !change.MatchString(text) {
		return "it has not the form of docs/changelog/README.md"
	}
	for i, line := range strings.Split(text, "\n") {
		if n := utf8.RuneCountInString(line); n > 100 && !strings.HasPrefix(line, "https://") {
			return fmt.Sprintf("line %d has %d characters, more than 100", i+1, n)
		}
		if strings.TrimRight(line, " \t") != line {
			return fmt.Sprintf("line %d has spaces at its end", i+1)
		}
	}
	return ""
}

// TestChangelog checks the form of every file, and that the printed changelog has each once.
func TestChangelog(t *testing.T) {
	files, err := filepath.Glob(filepath.Join(root, "docs/changelog/*/*"))
	if err != nil {
		t.Fatal(err)
	}
	if len(files) == 0 {
		t.Fatal("there is no change in docs/changelog")
	}
	printed := map[string]string{}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		dir, name := filepath.Base(filepath.Dir(file)), filepath.Base(file)
		if why := changeProblem(string(text)); why != "" {
			t.Errorf("%s/%s: %s", dir, name, why)
			continue
		}
		if _, ok := printed[dir]; !ok {
			out, err := exec.Command(filepath.Join(root, "tools/changelog"), dir).Output()
			if err != nil {
				t.Fatalf("tools/changelog %s: %v", dir, err)
			}
			printed[dir] = string(out)
		}
		first, _, _ := strings.Cut(string(text), "\n")
		_, title, _ := strings.Cut(first, ": ")
		if n := strings.Count(printed[dir], "- **"+title+".**\n"); n != 1 {
			t.Errorf("%s/%s: tools/changelog prints it %d times", dir, name, n)
		}
	}
}

// TestChangeProblem shows that each rule can fail.
func TestChangeProblem(t *testing.T) {
	const form = "it has not the form of docs/changelog/README.md"
	for _, tt := range []struct{ name, text, want string }{
		{"with links", "Bugfix: Do it\n\nIt was not done.\n\nTwice.\n\nhttps://example.com/1\nhttps://example.com/2\n", ""},
		{"without", "Security: Do it\n\nIt was not done.\n", ""},
		{"unknown kind", "Feature: Do it\n\nIt was not done.\n", form},
		{"full stop", "Change: Do it.\n\nIt was not done.\n", form},
		{"title too long", "Change: D" + strings.Repeat("o", 80) + "\n\nIt was not done.\n", form},
		{"no text", "Change: Do it\n", form},
		{"no empty line", "Change: Do it\nIt was not done.\n", form},
		{"no end of line", "Change: Do it\n\nIt was not done.", form},
		{"line too long", "Change: Do it\n\n" + strings.Repeat("x", 101) + "\n", "line 3 has 101 characters, more than 100"},
		{"space at the end", "Change: Do it\n\nIt was \nnot done.\n", "line 3 has spaces at its end"},
	} {
		if got := changeProblem(tt.text); got != tt.want {
			t.Errorf("%s: got %q, want %q", tt.name, got, tt.want)
		}
	}
}
