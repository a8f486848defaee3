// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"fmt"
	"strings"

	"github.com/urfave/cli/v2"
)

// help renders the help of the command at the end of path.
func help(path []*command) string {
	c := path[len(path)-1]
	var b strings.Builder
	fmt.Fprintf(&b, "%s: %s\n", c.path(), c.short)
	if len(c.subs) > 0 {
		fmt.Fprintf(&b, "\nUsage: %s COMMAND\n", c.path())
	} else {
		fmt.Fprintf(&b, "\nUsage: %s\n", strings.TrimSpace(c.path()+" [FLAGS] "+c.args))
	}
	if len(c.aliases) > 0 {
		fmt.Fprintf(&b, "Also called: %s\n", strings.Join(c.aliases, ", "))
	}
	if c.long != "" {
		b.WriteString("\n" + strings.TrimSpace(c.long) + "\n")
	}
	overview(&b, c)
	if len(c.examples) > 0 {
		b.WriteString("\nExamples:\n")
		for i := 0; i+1 < len(c.examples); i += 2 {
			fmt.Fprintf(&b, "  %-40s  # %s\n", c.examples[i], c.examples[i+1])
		}
	}
	if len(c.subs) == 0 {
		own := c.flags
		if c.reports {
			own = append(own[:len(own):len(own)], jsonFlag())
		}
		flagList(&b, "Flags", own)
		flagList(&b, "Which lab", c.whichLab())
		flagList(&b, "Output", outputFlags())
	} else {
		fmt.Fprintf(&b, "\nRun %q for the flags and examples of a command.\n", c.path()+" COMMAND --help")
	}
	return b.String()
}

// overview lists the commands of a group under their headings, in the order in
// which the headings first appear.
func overview(b *strings.Builder, c *command) {
	var groups []string
	members := map[string][]*command{}
	wide := 0
	for _, s := range c.subs {
		if s.hidden {
			continue
		}
		if len(members[s.group]) == 0 {
			groups = append(groups, s.group)
		}
		members[s.group] = append(members[s.group], s)
		wide = max(wide, len(s.name))
	}
	for _, g := range groups {
		heading := g
		if heading == "" {
			heading = "Commands"
		}
		fmt.Fprintf(b, "\n%s:\n", heading)
		for _, s := range members[g] {
			also := ""
			if len(s.aliases) > 0 {
				also = " (also: " + strings.Join(s.aliases, ", ") + ")"
			}
			fmt.Fprintf(b, "  %-*s  %s%s\n", wide, s.name, s.short, also)
		}
	}
}

func flagList(b *strings.Builder, heading string, flags []cli.Flag) {
	var left, right []string
	wide := 0
	for _, f := range flags {
		doc, ok := f.(cli.DocGenerationFlag)
		if !ok {
			continue
		}
		value, text := unquote(doc.GetUsage())
		var names []string
		for _, n := range f.Names() {
			if len(n) == 1 {
				names = append([]string{"-" + n}, names...)
			} else {
				names = append(names, "--"+n)
			}
		}
		l := strings.Join(names, ", ")
		if value != "" {
			l += " " + value
		}
		left, right = append(left, l), append(right, text)
		wide = max(wide, len(l))
	}
	if len(left) == 0 {
		return
	}
	fmt.Fprintf(b, "\n%s:\n", heading)
	for i := range left {
		fmt.Fprintf(b, "  %-*s  %s\n", wide, left[i], right[i])
	}
}

// unquote finds the name of a flag's value, which stands in backquotes in its
// usage text, and returns both.
func unquote(s string) (value, text string) {
	before, rest, ok := strings.Cut(s, "`")
	if !ok {
		return "", s
	}
	value, after, ok := strings.Cut(rest, "`")
	if !ok {
		return "", s
	}
	return value, before + value + after
}
