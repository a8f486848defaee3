// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/urfave/cli/v2"

	"github.com/labfile/lab/internal/lab"
)

// scripts connect shells with "lab complete", which gets the words before the
// cursor and prints what the last of them may become, and behind a tab what that is if
// the shell shows it. When it prints nothing, the shell completes names of files.
var scripts = map[string]string{
	"bash": `# bash completion for lab: source <(lab completion bash)
_lab() {
  local cur="${COMP_WORDS[COMP_CWORD]}" line
  COMPREPLY=()
  while IFS= read -r line; do
    [[ "$line" == "$cur"* ]] && COMPREPLY+=("$line")
  done < <("${COMP_WORDS[0]}" complete -- "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null)
}
complete -o default -o bashdefault -F _lab lab
`,
	"zsh": `#compdef lab
# zsh completion for lab: source <(lab completion zsh)
_lab() {
  local -a lines described
  local line
  lines=("${(@f)$("${words[1]}" complete --describe -- "${(@)words[2,CURRENT]}" 2>/dev/null)}")
  lines=("${(@)lines:#}")
  if (( ! ${#lines} )); then
    _files
    return
  fi
  for line in "${lines[@]}"; do
    if [[ $line == *$'\t'* ]]; then
      described+=("${${line%%$'\t'*}//:/\\:}:${line#*$'\t'}")
    else
      described+=("${line//:/\\:}")
    fi
  done
  _describe -V lab described
}
if [ "$funcstack[1]" = "_lab" ]; then _lab "$@"; else compdef _lab lab; fi
`,
	"fish": `# fish completion for lab: lab completion fish | source
function __lab_complete
  set -l words (commandline -opc) (commandline -ct)
  $words[1] complete --describe -- $words[2..-1] 2>/dev/null
end
complete -c lab -f -n 'count (__lab_complete) >/dev/null' -a '(__lab_complete)'
`,
}

func (a *app) completionCommand() *command {
	return &command{
		name: "completion", group: groupTools, args: "bash | zsh | fish", min: 1, max: 1,
		short:    "print the completion script for a shell",
		long:     `It completes commands, flags, and the names of machines and boxes.`,
		complete: func(context.Context, []string) []string { return []string{"bash", "fish", "zsh"} },
		examples: []string{
			"source <(lab completion bash)", "in ~/.bashrc",
			"source <(lab completion zsh)", "in ~/.zshrc, behind compinit",
			"lab completion fish | source", "in config.fish",
		},
		run: func(_ context.Context, r request) error {
			script, ok := scripts[r.args[0]]
			if !ok {
				return usage("bash, zsh and fish are known", "there is no completion for %q", r.args[0])
			}
			_, err := io.WriteString(a.Out, script)
			return err
		},
	}
}

func (a *app) completeCommand() *command {
	return &command{
		name: "complete", hidden: true, args: "-- WORD...", max: -1, tail: dashTail,
		short: "print what the last word may become",
		long:  `For the scripts of "lab completion".`,
		flags: []cli.Flag{&cli.BoolFlag{Name: "describe", Usage: "print what each is, too, behind a tab"}},
		run: func(ctx context.Context, r request) error {
			for _, c := range a.candidates(ctx, r.tail) {
				line := c.word
				if c.about != "" && r.Bool("describe") {
					line += "\t" + c.about
				}
				if _, err := fmt.Fprintln(a.Out, line); err != nil {
					return err
				}
			}
			return nil
		},
	}
}

// candidate is what a word may become, and what that is; about may be empty.
type candidate struct{ word, about string }

// candidates returns what the last of the words may become, sorted.
func (a *app) candidates(ctx context.Context, words []string) []candidate {
	if len(words) == 0 {
		words = []string{""}
	}
	before, word := words[:len(words)-1], words[len(words)-1]
	leaf := find(a.root, before)
	if slices.Contains(before, "--") {
		return nil
	}
	in, _ := parse(a.root, before) // as far as it goes: the line is not finished
	a.set, a.ui.Quiet, a.completing = in.values, true, true
	var all []candidate
	add := func(word, about string) { all = append(all, candidate{word, about}) }
	last := ""
	if len(before) > 0 {
		last = before[len(before)-1]
	}
	f := lookup(leaf.allFlags(), strings.TrimLeft(last, "-"))
	switch {
	case f != nil && strings.HasPrefix(last, "-") && !isBool(f):
		for _, value := range a.completeFlag(ctx, f.Names()[0]) {
			add(value, "")
		}
	case strings.HasPrefix(word, "-"):
		for _, f := range append(leaf.allFlags(), helpFlag()) {
			about := ""
			if doc, ok := f.(cli.DocGenerationFlag); ok {
				_, about = unquote(doc.GetUsage())
			}
			add("--"+f.Names()[0], about)
		}
	case len(leaf.subs) > 0:
		for _, s := range leaf.subs {
			if !s.hidden {
				add(s.name, s.short)
			}
		}
	case leaf.complete != nil && (leaf.max < 0 || len(in.args) < leaf.max):
		for _, c := range leaf.complete(ctx, in.args) {
			if !slices.Contains(in.args, c) {
				add(c, "")
			}
		}
	}
	all = slices.DeleteFunc(all, func(c candidate) bool { return !strings.HasPrefix(c.word, word) })
	slices.SortFunc(all, func(x, y candidate) int { return strings.Compare(x.word, y.word) })
	return slices.CompactFunc(all, func(x, y candidate) bool { return x.word == y.word })
}

// completeFlag returns what the value of a flag may be.
func (a *app) completeFlag(ctx context.Context, flag string) []string {
	var all []string
	h, err := a.host()
	if err != nil {
		return nil
	}
	switch flag {
	case "lab":
		labs, err := h.List(ctx)
		if err != nil {
			return nil
		}
		for _, s := range labs {
			all = append(all, string(s.ID))
		}
	case "format":
		all = slices.Clone(reportFormats)
	case "provider":
		for name := range h.Providers {
			if name != "memory" { // for tests: its machines end with the command
				all = append(all, name)
			}
		}
	}
	return all
}

// completeLabs returns the IDs of all labs.
func (a *app) completeLabs(ctx context.Context, args []string) []string {
	if len(args) > 0 {
		return nil
	}
	return a.completeFlag(ctx, "lab")
}

// completeMachines returns the machines of the Labfile and of the lab itself.
func (a *app) completeMachines(ctx context.Context, _ []string) []string {
	var names []string
	if path, err := a.labfilePath(); err == nil && a.set.string("lab") == "" {
		if want, err := a.load(path); err == nil {
			for _, m := range want.Machines {
				names = append(names, string(m.Name))
			}
		}
	}
	if l, err := a.existing(ctx); err == nil {
		for _, n := range l.MachineNames() {
			names = append(names, string(n))
		}
	}
	return names
}

// completeCopy returns what may stand before the colon of a path on a machine.
func (a *app) completeCopy(ctx context.Context, args []string) []string {
	var out []string
	for _, n := range a.completeMachines(ctx, args) {
		out = append(out, n+":")
	}
	return out
}

// completeBoxes returns the names of the boxes in the store.
func (a *app) completeBoxes(ctx context.Context, _ []string) []string {
	b, err := a.boxes()
	if err != nil {
		return nil
	}
	entries, err := b.Store.List(ctx)
	if err != nil {
		return nil
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Names...)
	}
	return names
}

// isMachine reports whether s looks like the name of a machine.
func isMachine(s string) bool { return lab.ValidLabel(s) }
