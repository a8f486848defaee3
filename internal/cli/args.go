// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/labfile/lab/internal/ui"
)

// command is one command or, with subs, a group of them.
type command struct {
	name     string
	aliases  []string
	group    string // heading in the overview
	args     string // "MACHINE [-- COMMAND...]"
	short    string // one line
	long     string
	examples []string // pairs: command line, what it does
	flags    []cli.Flag
	min, max int    // arguments before "--"; max < 0 for any number
	asks     string // for the arguments, if they are missing: "name a machine to taint"
	tail     tail
	lab      bool // works on a lab: takes --file and its like
	reports  bool // takes --json
	hidden   bool
	complete func(context.Context, []string) []string // what the next argument may be
	run      func(context.Context, request) error

	subs   []*command
	parent *command
}

// tail says what "--" means to a command.
type tail int

const (
	noTail    tail = iota // what follows are ordinary arguments
	dashTail              // what follows is a command for a machine
	afterName             // likewise, and "--" may be left out behind the first argument
)

// path is how the command is called: "lab box add".
func (c *command) path() string {
	if c.parent == nil {
		return c.name
	}
	return c.parent.path() + " " + c.name
}

func (c *command) find(name string) *command {
	for _, s := range c.subs {
		if s.name == name || slices.Contains(s.aliases, name) {
			return s
		}
	}
	return nil
}

// allFlags are the command's own flags and those that it shares with others.
func (c *command) allFlags() []cli.Flag {
	flags := slices.Clone(c.flags)
	if c.reports {
		flags = append(flags, jsonFlag())
	}
	flags = append(flags, c.whichLab()...)
	return append(flags, outputFlags()...)
}

// whichLab are the flags that say which lab is meant.
func (c *command) whichLab() []cli.Flag {
	if !c.lab {
		return nil
	}
	return labFlags()
}

func jsonFlag() cli.Flag {
	return &cli.BoolFlag{Name: "json", Usage: "print JSON (docs/json.md)"}
}

// labFlags say which lab is meant.
func labFlags() []cli.Flag {
	return []cli.Flag{
		&cli.StringFlag{Name: "file", Aliases: []string{"f"}, Usage: "use `LABFILE` (default: found upwards from here; LAB_FILE)"},
		&cli.StringFlag{Name: "name", Usage: "name the lab `NAME`, for a second instance of its Labfile (LAB_NAME)"},
		&cli.StringFlag{Name: "lab", Usage: "address a lab by the `ID` that \"lab list\" shows, without its Labfile"},
		&cli.StringFlag{Name: "provider", Usage: "run machines with `NAME`, whatever the Labfile says (LAB_PROVIDER)"},
		&cli.StringFlag{Name: "uri", Usage: "of provider libvirt: the daemon at `URI`, whatever the Labfile says (LAB_LIBVIRT_URI)"},
		&cli.StringSliceFlag{Name: "var", Usage: "set a variable of the Labfile, before the environment and .env: `NAME=VALUE`; may be repeated"},
	}
}

func helpFlag() cli.Flag {
	return &cli.BoolFlag{Name: "help", Aliases: []string{"h"}, Usage: "print what the command does"}
}

// outputFlags are understood by every command.
func outputFlags() []cli.Flag {
	return []cli.Flag{
		&cli.BoolFlag{Name: "quiet", Aliases: []string{"q"}, Usage: "print errors and answers only"},
		&cli.BoolFlag{Name: "verbose", Aliases: []string{"v"}, Usage: "print what happens behind the scenes, to stderr"},
	}
}

// values are the flags as given, by their first name.
type values map[string][]string

func (v values) bool(name string) bool {
	given := v[name]
	if len(given) == 0 {
		return false
	}
	b, err := strconv.ParseBool(given[len(given)-1])
	return err == nil && b
}

func (v values) string(name string) string {
	if given := v[name]; len(given) > 0 {
		return given[len(given)-1]
	}
	return ""
}

// input is a parsed command line.
type input struct {
	path   []*command // from the root to the command
	values values
	order  []string // names of the flags in values, as they came
	args   []string
	tail   []string // what follows "--"
	help   bool
}

// argv is the command line in the one order that the flag library reads.
func (in input) argv() []string {
	out := []string{"lab", in.path[len(in.path)-1].name}
	seen := map[string]int{}
	for _, name := range in.order {
		out = append(out, "--"+name+"="+in.values[name][seen[name]])
		seen[name]++
	}
	return append(append(out, "--"), in.args...)
}

// parse reads a command line. Flags may stand anywhere before "--", also before
// the command they belong to: users type them where they think of them.
func parse(root *command, args []string) (input, error) {
	in := input{path: []*command{root}, values: values{}}
	leaf := find(root, args)
	for i := 0; i < len(args); i++ {
		word := args[i]
		here := in.path[len(in.path)-1]
		switch {
		case word == "--":
			if leaf.tail == noTail {
				in.args = append(in.args, args[i+1:]...)
			} else {
				in.tail = slices.Clone(args[i+1:])
				if in.tail == nil {
					in.tail = []string{}
				}
			}
			i = len(args)
		case len(word) > 1 && word[0] == '-':
			used, err := in.flag(leaf, word, args[i+1:])
			if err != nil {
				return in, err
			}
			i += used
		case len(here.subs) > 0:
			if word == "help" {
				in.help = true
				continue
			}
			sub := here.find(word)
			if sub == nil {
				return in, unknownCommand(here, word)
			}
			in.path = append(in.path, sub)
		case here.tail == afterName && len(in.args) == here.max:
			in.tail = slices.Clone(args[i:])
			i = len(args)
		default:
			in.args = append(in.args, word)
		}
	}
	here := in.path[len(in.path)-1]
	if in.help || len(here.subs) > 0 && here.parent == nil {
		in.help = true
		return in, nil
	}
	return in, in.check(here)
}

// find returns the command that args name, ignoring flags, so that flags before
// it can be told from its arguments. Flags that take a value are known by name.
func find(root *command, args []string) *command {
	here := root
	for i := 0; i < len(args) && len(here.subs) > 0; i++ {
		word := args[i]
		if word == "--" {
			break
		}
		if strings.HasPrefix(word, "-") {
			name := strings.TrimLeft(word, "-")
			if f := lookup(append(labFlags(), outputFlags()...), name); f != nil && !isBool(f) {
				i++
			}
			continue
		}
		if sub := here.find(word); sub != nil {
			here = sub
		}
	}
	return here
}

// check sees to it that the command has the arguments it needs.
func (in input) check(c *command) error {
	hint := fmt.Sprintf("usage: %s %s", c.path(), c.args)
	switch n := len(in.args); {
	case len(c.subs) > 0:
		return usage(fmt.Sprintf("run %q for the list", c.path()+" --help"), "%q needs a command", c.path())
	case n < c.min && c.asks != "":
		return usage(hint, "%s", c.asks)
	case n < c.min && strings.HasPrefix(c.args, "MACHINE"):
		return usage(hint, "name a machine")
	case n < c.min:
		return usage(hint, "%q needs %s", c.path(), c.args)
	case c.max == 0 && n > 0:
		return usage(hint, "%q takes no arguments, got %q", c.path(), in.args[0])
	case c.max > 0 && n > c.max:
		return usage(hint, "%q is too much: %q takes only %s", in.args[c.max], c.path(), c.args)
	}
	return nil
}

// flag takes one flag, with its value if it has one, and returns how many of the
// words behind it that used.
func (in *input) flag(c *command, word string, rest []string) (int, error) {
	name, value, given := strings.Cut(strings.TrimLeft(word, "-"), "=")
	switch {
	case name == "h" || name == "help":
		in.help = true
		return 0, nil
	case name == "version" && c.parent == nil:
		in.path = append(in.path, c.find("version"))
		return 0, nil
	}
	flags := c.allFlags()
	if c.run == nil { // no command: only what all of them understand can be known
		flags = append(append(labFlags(), jsonFlag()), outputFlags()...)
	}
	f := lookup(flags, name)
	if f == nil && !strings.HasPrefix(word, "--") && len(word) > 2 {
		return in.short(c, flags, word, rest)
	}
	if f == nil {
		return 0, unknownFlag(c, flags, word)
	}
	used := 0
	switch {
	case !given && isBool(f):
		value = "true"
	case !given && len(rest) == 0:
		hint := fmt.Sprintf("run %q for what it takes", c.path()+" --help")
		if name == "f" && lookup(flags, "follow") != nil {
			hint = fmt.Sprintf("-f is --file; \"%s -F\" follows", c.path())
		}
		return 0, usage(hint, "flag %s needs a value", word)
	case !given:
		value, used = rest[0], 1
	}
	return used, in.put(f, value)
}

// short takes letters that were written together: "-qv", "-fLabfile".
func (in *input) short(c *command, flags []cli.Flag, word string, rest []string) (int, error) {
	for i, letter := range word[1:] {
		f := lookup(flags, string(letter))
		if f == nil {
			return 0, unknownFlag(c, flags, word)
		}
		if isBool(f) {
			if err := in.put(f, "true"); err != nil {
				return 0, err
			}
			continue
		}
		if value := word[1+i+len(string(letter)):]; value != "" {
			return 0, in.put(f, strings.TrimPrefix(value, "="))
		}
		if len(rest) == 0 {
			return 0, usage(fmt.Sprintf("run %q for what it takes", c.path()+" --help"), "flag -%c needs a value", letter)
		}
		return 1, in.put(f, rest[0])
	}
	return 0, nil
}

// put notes a flag's value, which must be of its kind.
func (in *input) put(f cli.Flag, value string) error {
	name := f.Names()[0]
	if err := fits(f, name, value); err != nil {
		return err
	}
	in.values[name] = append(in.values[name], value)
	in.order = append(in.order, name)
	return nil
}

// fits returns a usage error if the value is not one that the flag can have.
func fits(f cli.Flag, name, value string) error {
	shown := ui.Clean(value)
	switch f.(type) {
	case *cli.BoolFlag:
		if _, err := strconv.ParseBool(value); err != nil {
			return usage("write --"+name+" alone, or --"+name+"=false", "--%s takes no value, got %q", name, shown)
		}
	case *cli.IntFlag:
		if _, err := strconv.Atoi(value); err != nil {
			return usage("write digits, such as --"+name+" 3", "--%s needs a whole number, got %q", name, shown)
		}
	case *cli.DurationFlag:
		if _, err := time.ParseDuration(value); err == nil {
			return nil
		}
		if _, err := strconv.ParseFloat(value, 64); err == nil {
			return usage("s is for seconds, m for minutes, h for hours", "--%s needs a unit: %ss", name, shown)
		}
		return usage("write 30s, 10m or 1h30m", "--%s needs a time, got %q", name, shown)
	}
	return nil
}

func lookup(flags []cli.Flag, name string) cli.Flag {
	for _, f := range flags {
		if slices.Contains(f.Names(), name) {
			return f
		}
	}
	return nil
}

func isBool(f cli.Flag) bool {
	_, ok := f.(*cli.BoolFlag)
	return ok
}

func unknownCommand(c *command, word string) error {
	var names []string
	for _, s := range c.subs {
		if !s.hidden {
			names = append(append(names, s.name), s.aliases...)
		}
	}
	hint := fmt.Sprintf("run %q for the list", c.path()+" --help")
	if near := nearest(word, names); near != "" {
		hint = fmt.Sprintf("did you mean %q?", c.path()+" "+near)
	}
	return usage(hint, "unknown command %q", c.path()+" "+word)
}

func unknownFlag(c *command, flags []cli.Flag, word string) error {
	word, _, _ = strings.Cut(word, "=")
	var names []string
	for _, f := range flags {
		names = append(names, f.Names()...)
	}
	hint := fmt.Sprintf("run %q for what it takes", c.path()+" --help")
	if near := nearest(strings.TrimLeft(word, "-"), names); near != "" {
		dashes := "--"
		if len(near) == 1 {
			dashes = "-"
		}
		hint = fmt.Sprintf("did you mean %s%s?", dashes, near)
	}
	return usage(hint, "%q has no flag %s", c.path(), word)
}
