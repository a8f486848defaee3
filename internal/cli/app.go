// SPDX-License-Identifier: Apache-2.0

// Package cli is the command line: one file per command, each of which turns
// flags into one call and renders what comes back.
package cli

import (
	"context"
	"io"
	"log/slog"
	"strings"
	"sync/atomic"

	"github.com/urfave/cli/v2"

	"github.com/labfile/lab/boxes"
	"github.com/labfile/lab/boxes/source"
	"github.com/labfile/lab/internal/engine"
	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/ui"
)

// Config is what main wires. Functions are called when a command needs what they
// return and not before: most commands need little, and starting must be cheap.
type Config struct {
	In       io.Reader
	Out, Err io.Writer
	Getenv   func(string) string
	Dir      func() (string, error) // the working directory
	Program  string                 // absolute path of this program, for ssh's ProxyCommand
	Version  func() Version

	// Host opens what all labs of the user share.
	Host func(*slog.Logger) (*engine.Host, error)
	// Boxes opens the box store and what fills it.
	Boxes func(*slog.Logger) (Boxes, error)
	// Supervise is the main loop of a lab's supervisor.
	Supervise func(ctx context.Context, id lab.ID, log *slog.Logger) error
}

// Boxes is what the box commands work with.
type Boxes struct {
	Store    *boxes.Store
	Resolver *source.Resolver
	Builtin  []string // names of the boxes that can be built, without "builtin/"
	// Build builds a built-in box, whether or not the store has one, and names it.
	Build func(ctx context.Context, name string, progress func(text string, done, total int64)) (boxes.Box, error)
}

// Version says what this program was built from.
type Version struct {
	Version  string `json:"version"`
	Commit   string `json:"commit,omitempty"`
	Go       string `json:"go"`
	Platform string `json:"platform"` // "linux/amd64"
	Agent    bool   `json:"agent"`    // built-in boxes get lab-agent
}

// app is one run of the program.
type app struct {
	Config
	ui      *ui.UI
	typed   string // what the user typed, for the ledger and the lab's lock
	asJSON  bool
	verbose bool
	set     values

	completing bool // nothing is to be changed or said
	root       *command
	silent     atomic.Bool // the machine that was entered does not answer
}

// Run carries out one command line, without the program's name, and returns the
// exit code. It prints the error, if there is one.
func Run(ctx context.Context, cfg Config, args []string) int {
	a := &app{Config: cfg, ui: ui.New(cfg.Out, cfg.Err, cfg.Getenv), typed: typed(args)}
	a.root = a.commands()
	err := a.run(ctx, args)
	return a.fail(ctx, err)
}

func (a *app) run(ctx context.Context, args []string) error {
	in, err := parse(a.root, args)
	if err != nil {
		return err
	}
	if in.help {
		_, err := io.WriteString(a.Out, help(in.path))
		return err
	}
	a.set = in.values
	for _, other := range []string{"name", "file"} {
		if a.set.string("lab") != "" && a.set.string(other) != "" {
			return usage("leave one of them out", "--lab says which lab is meant, and so does --%s", other)
		}
	}
	a.ui.Quiet = in.values.bool("quiet")
	a.verbose = in.values.bool("verbose")
	a.ui.Verbose = a.verbose
	a.asJSON = in.values.bool("json")
	return a.urfave(in).RunContext(ctx, in.argv())
}

// urfave hands the command line, which is in a regular order by now, to the
// library, which converts and checks the values of flags.
func (a *app) urfave(in input) *cli.App {
	leaf := in.path[len(in.path)-1]
	fail := func(_ *cli.Context, err error, _ bool) error {
		return usage("run \""+leaf.path()+" --help\" for what it takes", "%v", err)
	}
	lib := &cli.App{
		Name: "lab", HideHelp: true, HideVersion: true, HideHelpCommand: true,
		Writer: a.Err, ErrWriter: a.Err, OnUsageError: fail,
		DisableSliceFlagSeparator: true,
		ExitErrHandler:            func(*cli.Context, error) {},
	}
	lib.Commands = []*cli.Command{{
		Name: leaf.name, Flags: leaf.allFlags(), HideHelp: true, OnUsageError: fail,
		Action: func(c *cli.Context) error {
			return leaf.run(c.Context, request{Context: c, args: in.args, tail: in.tail})
		},
	}}
	return lib
}

// request is what a command is asked for: its flags, and its arguments before
// and after "--".
type request struct {
	*cli.Context
	args []string
	tail []string
}

// log returns the logger for debugging: everything on -v, nothing otherwise.
func (a *app) log() *slog.Logger {
	if !a.verbose {
		return slog.New(slog.DiscardHandler)
	}
	return slog.New(slog.NewTextHandler(a.Err, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

// host opens the labs of this user.
func (a *app) host() (*engine.Host, error) { return a.Host(a.log()) }

// typed renders the command line for others to read, without the values of
// variables, which may be secrets.
func typed(args []string) string {
	words := []string{"lab"}
	for i := 0; i < len(args); i++ {
		w := args[i]
		switch {
		case w == "--var" && i+1 < len(args):
			name, _, _ := strings.Cut(args[i+1], "=")
			words = append(words, w, ui.Clean(name)+"=...")
			i++
			continue
		case strings.HasPrefix(w, "--var="):
			name, _, _ := strings.Cut(strings.TrimPrefix(w, "--var="), "=")
			w = "--var=" + name + "=..."
		}
		if w == "" || strings.ContainsAny(w, " \t\n\"'") {
			w = "'" + strings.ReplaceAll(w, "'", `'\''`) + "'"
		}
		words = append(words, ui.Clean(w))
	}
	return strings.Join(words, " ")
}
