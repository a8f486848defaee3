// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"errors"
	"io"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/urfave/cli/v2"
)

func testApp() *app {
	a := &app{Config: Config{Out: io.Discard, Err: io.Discard}}
	a.root = a.commands()
	return a
}

func TestParse(t *testing.T) {
	type result struct {
		Path   string
		Values values
		Args   []string
		Tail   []string
		Help   bool
	}
	for _, tc := range []struct {
		line string
		want result
	}{
		{"", result{Path: "lab", Help: true}},
		{"help", result{Path: "lab", Help: true}},
		{"--help", result{Path: "lab", Help: true}},
		{"help up", result{Path: "lab up", Help: true}},
		{"up --help", result{Path: "lab up", Help: true}},
		{"help box add", result{Path: "lab box add", Help: true}},
		{"box help add", result{Path: "lab box add", Help: true}},
		{"--version", result{Path: "lab version"}},
		{"up", result{Path: "lab up"}},
		{"-f X up", result{Path: "lab up", Values: values{"file": {"X"}}}},
		{"up -f X", result{Path: "lab up", Values: values{"file": {"X"}}}},
		{"up -fX", result{Path: "lab up", Values: values{"file": {"X"}}}},
		{"up --file=X web", result{Path: "lab up", Values: values{"file": {"X"}}, Args: []string{"web"}}},
		{"destroy web --yes", result{Path: "lab destroy", Values: values{"yes": {"true"}}, Args: []string{"web"}}},
		{"down -y", result{Path: "lab destroy", Values: values{"yes": {"true"}}}},
		{"up -qy web db", result{Path: "lab up", Values: values{"quiet": {"true"}, "yes": {"true"}}, Args: []string{"web", "db"}}},
		{"up --var A=1 --var B=2,3", result{Path: "lab up", Values: values{"var": {"A=1", "B=2,3"}}}},
		{"status --name two --json", result{Path: "lab status", Values: values{"name": {"two"}, "json": {"true"}}}},
		{"destroy -- --yes", result{Path: "lab destroy", Args: []string{"--yes"}}},
		{"exec web db -- ls -l --", result{Path: "lab exec", Args: []string{"web", "db"}, Tail: []string{"ls", "-l", "--"}}},
		{"exec web --", result{Path: "lab exec", Args: []string{"web"}, Tail: []string{}}},
		{"exec web --user u -- id", result{Path: "lab exec", Values: values{"user": {"u"}}, Args: []string{"web"}, Tail: []string{"id"}}},
		{"ssh web uname -a --help", result{Path: "lab ssh", Args: []string{"web"}, Tail: []string{"uname", "-a", "--help"}}},
		{"ssh web -l u -- uname", result{Path: "lab ssh", Values: values{"user": {"u"}}, Args: []string{"web"}, Tail: []string{"uname"}}},
		{"ssh help", result{Path: "lab ssh", Args: []string{"help"}}},
		{"-f X logs web -F", result{Path: "lab logs", Values: values{"file": {"X"}, "follow": {"true"}}, Args: []string{"web"}}},
		{"logs web -f X", result{Path: "lab logs", Values: values{"file": {"X"}}, Args: []string{"web"}}},
		{"logs web --file X", result{Path: "lab logs", Values: values{"file": {"X"}}, Args: []string{"web"}}},
		{"cp -r a web:/x", result{Path: "lab cp", Values: values{"recursive": {"true"}}, Args: []string{"a", "web:/x"}}},
		{"cp - web:/x", result{Path: "lab cp", Args: []string{"-", "web:/x"}}},
		{"stop --grace=5s", result{Path: "lab stop", Values: values{"grace": {"5s"}}}},
	} {
		t.Run(tc.line, func(t *testing.T) {
			in, err := parse(testApp().root, strings.Fields(tc.line))
			if err != nil {
				t.Fatal(err)
			}
			got := result{in.path[len(in.path)-1].path(), in.values, in.args, in.tail, in.help}
			if tc.want.Values == nil {
				tc.want.Values = values{}
			}
			if diff := cmp.Diff(tc.want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestParseRefuses(t *testing.T) {
	for _, tc := range []struct{ line, text, hint string }{
		{"upp", `unknown command "lab upp"`, `did you mean "lab up"?`},
		{"destory", `unknown command "lab destory"`, `did you mean "lab destroy"?`},
		{"frobnicate", `unknown command "lab frobnicate"`, `run "lab --help" for the list`},
		{"box lst", `unknown command "lab box lst"`, `did you mean "lab box list"?`},
		{"box", `"lab box" needs a command`, `run "lab box --help" for the list`},
		{"up --dryrun", `"lab up" has no flag --dryrun`, `did you mean --dry-run?`},
		{"up --xyzzy=1", `"lab up" has no flag --xyzzy`, `run "lab up --help" for what it takes`},
		{"up -Q", `"lab up" has no flag -Q`, `run "lab up --help" for what it takes`},
		{"version --file X", `"lab version" has no flag --file`, `run "lab version --help" for what it takes`},
		{"up --file", `flag --file needs a value`, `run "lab up --help" for what it takes`},
		{"up -qf", `flag -f needs a value`, `run "lab up --help" for what it takes`},
		{"ssh", `name a machine`, `usage: lab ssh MACHINE [-- COMMAND...]`},
		{"cp x", `"lab cp" needs SOURCE... TARGET`, `usage: lab cp SOURCE... TARGET`},
		{"list x", `"lab list" takes no arguments, got "x"`, `usage: lab list `},
		{"logs a b", `"b" is too much: "lab logs" takes only MACHINE[@N]`, `usage: lab logs MACHINE[@N]`},
	} {
		t.Run(tc.line, func(t *testing.T) {
			_, err := parse(testApp().root, strings.Fields(tc.line))
			var wrong *usageError
			if !errors.As(err, &wrong) {
				t.Fatalf("got %v, want a usage error", err)
			}
			if wrong.text != tc.text || wrong.hint != tc.hint {
				t.Errorf("got %q, %q, want %q, %q", wrong.text, wrong.hint, tc.text, tc.hint)
			}
		})
	}
}

// Every command must be explained, and its flags must not collide.
func TestCommandsAreComplete(t *testing.T) {
	var walk func(path []*command)
	walk = func(path []*command) {
		c := path[len(path)-1]
		name := c.path()
		if c.short == "" || strings.HasSuffix(c.short, ".") || strings.ToUpper(c.short[:1]) == c.short[:1] {
			t.Errorf("%s: the summary %q is not a lower-case phrase", name, c.short)
		}
		if (c.run == nil) == (len(c.subs) == 0) {
			t.Errorf("%s: is neither a command nor a group", name)
		}
		if len(c.examples)%2 != 0 || len(c.examples) == 0 && !c.hidden {
			t.Errorf("%s: has %d strings of examples", name, len(c.examples))
		}
		seen := map[string]bool{}
		for _, f := range c.allFlags() {
			for _, n := range f.Names() {
				if seen[n] {
					t.Errorf("%s: flag %s is there twice", name, n)
				}
				seen[n] = true
			}
			if doc, ok := f.(cli.DocGenerationFlag); !ok || doc.GetUsage() == "" {
				t.Errorf("%s: flag %s has no text", name, f.Names()[0])
			}
		}
		text := help(path)
		for line := range strings.Lines(text) {
			if n := len(strings.TrimRight(line, "\n")); n > 120 {
				t.Errorf("%s: a line of its help has %d columns: %s", name, n, line)
			}
		}
		for _, s := range c.subs {
			walk(append(path[:len(path):len(path)], s))
		}
	}
	walk([]*command{testApp().root})
}

func TestNearest(t *testing.T) {
	names := []string{"up", "status", "destroy", "web-1", "web-2", "q"}
	for in, want := range map[string]string{
		"pu": "up", "statsu": "status", "web1": "web-1", "web3": "web-1", "dest": "destroy", "xyz": "", "u": "", "": "",
	} {
		if got := nearest(in, names); got != want {
			t.Errorf("nearest(%q) = %q, want %q", in, got, want)
		}
	}
}

func TestTyped(t *testing.T) {
	got := typed([]string{"up", "--var", "TOKEN=secret", "--var=B=x", "-f", "my file", "", "a\x1b'b"})
	want := `lab up --var TOKEN=... --var=B=... -f 'my file' '' 'a\x1b'\''b'`
	if got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

func FuzzParse(f *testing.F) {
	f.Add("up\x00-f\x00x")
	f.Add("exec\x00web\x00--\x00ls")
	f.Fuzz(func(t *testing.T, line string) {
		in, err := parse(testApp().root, strings.Split(line, "\x00"))
		if err == nil && len(in.argv()) < 3 {
			t.Errorf("parse(%q) made %q", line, in.argv())
		}
	})
}
