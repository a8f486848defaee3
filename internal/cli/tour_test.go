// SPDX-License-Identifier: Apache-2.0

package cli_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// README's tour works as it is typed, on what "lab init" writes. What needs a real
// machine ("cp", "diff") or never ends ("logs -F") must name a machine that is there;
// internal/e2e tries these commands.
func TestTheTourWorks(t *testing.T) {
	readme, err := os.ReadFile(filepath.Join("..", "..", "README.md"))
	must(t, err)
	_, tour, ok := strings.Cut(string(readme), "\n## A tour\n\n```console\n")
	tour, _, end := strings.Cut(tour, "```\n")
	if !ok || !end {
		t.Fatal("README.md has no tour")
	}
	d := newAnsweringDesk(t, "")
	d.env["HOME"] = t.TempDir()
	must(t, os.Remove(filepath.Join(d.folder, "Labfile")))
	defer func() { _, _, _ = d.run("destroy", "--yes") }()
	tried := 0
	for line := range strings.Lines(tour) {
		line, _, _ = strings.Cut(strings.TrimPrefix(line, "$ "), "#")
		for command := range strings.SplitSeq(line, "&&") {
			args := strings.Fields(command)
			if args[0] != "lab" {
				t.Errorf("not a command of lab: %q", line)
				continue
			}
			args = args[1:]
			switch args[0] {
			case "cp", "diff", "logs":
				words := strings.FieldsFunc(strings.Join(args[1:], " "), func(r rune) bool { return r == ' ' || r == ':' })
				named := false
				for _, w := range words {
					named = named || w == "db" || w == "web"
				}
				if !named {
					t.Errorf("lab %v names no machine of the starter", args)
				}
				continue
			case "burn":
				args = append(args, "--yes") // there is no terminal to ask on
			}
			if code, out, errOut := d.run(args...); code != 0 {
				t.Fatalf("lab %v: exit code %d\n%s%s", args, code, out, errOut)
			}
			tried++
			if args[0] == "init" { // a box that needs no download and no processor
				text, err := os.ReadFile(filepath.Join(d.folder, "Labfile"))
				must(t, err)
				d.write("Labfile", "provider: memory\nboxes: {own: {from: answering}}\n"+strings.ReplaceAll(string(text), "builtin/tiny", "own"))
			}
		}
	}
	if tried < 15 {
		t.Errorf("the tour has %d commands", tried)
	}
}
