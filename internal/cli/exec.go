// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"

	"github.com/urfave/cli/v2"

	"github.com/labfile/lab/internal/engine"
	"github.com/labfile/lab/internal/guest"
	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/ui"
)

func (a *app) execCommand() *command {
	return &command{
		name: "exec", group: groupDaily, args: "MACHINE... | --all -- COMMAND...", max: -1, tail: dashTail, lab: true,
		short: "run a command on one or more machines",
		long: `Runs a command and passes its exit code on. One word behind "--" is a line for
the machine's shell; several are a program and its arguments, passed on exactly.
On one machine the command gets stdin, stdout and stderr as they are. On several
it runs at the same time, without stdin; every line of output begins with the
machine's name and shows control characters as escapes. The exit code is the first
that is not 0, in the order in which the machines were named.`,
		flags: []cli.Flag{
			&cli.BoolFlag{Name: "all", Usage: "all machines that run"},
			userFlag(),
			&cli.BoolFlag{Name: "tty", Aliases: []string{"t"}, Usage: "give the command a terminal (one machine only)"},
		},
		complete: a.completeMachines,
		examples: []string{
			"lab exec db -- pg_dump shop > shop.sql", "output to a file",
			"lab exec web -- 'ps aux | wc -l'", "a line for the shell",
			"lab exec web-1 web-2 -- uptime", "on two machines at once",
			"lab exec --all -- hostname", "on all that run",
		},
		run: a.exec,
	}
}

func (a *app) exec(ctx context.Context, r request) error {
	const how = "usage: lab exec MACHINE... -- COMMAND..."
	if r.Bool("all") == (len(r.args) > 0) {
		return usage(how, "say which machines to run the command on, or --all")
	}
	if r.tail == nil {
		return usage(how, "put \"--\" between the machines and the command")
	}
	if len(r.tail) == 0 {
		return usage(how, "there is no command behind \"--\"")
	}
	cmd := guest.Command{Args: r.tail}
	if len(r.tail) == 1 {
		cmd = guest.Command{Shell: r.tail[0]}
	}
	l, err := a.existing(ctx)
	if err != nil {
		return err
	}
	names, err := several(r.args)
	if err != nil {
		return err
	}
	all := len(names) == 0 // by the flag or by the word
	if all {
		names, err = running(ctx, l)
	} else {
		names, err = l.Expand(names)
	}
	if err != nil {
		return err
	}
	if len(names) == 1 && !all {
		return a.attach(ctx, r, "exec", string(names[0]), cmd, r.Bool("tty"))
	}
	if r.Bool("tty") {
		return usage("name one machine", "--tty is for one machine only")
	}
	for _, name := range names { // all or none
		if err := l.Admit(name, "exec"); err != nil {
			return err
		}
	}
	return a.everywhere(ctx, l, names, r.String("user"), cmd, r.tail)
}

// running returns the machines that a command can run on.
func running(ctx context.Context, l *engine.Lab) ([]lab.Name, error) {
	st, err := l.Status(ctx)
	if err != nil {
		return nil, err
	}
	var names []lab.Name
	for _, m := range st.Machines {
		if m.Running != nil {
			names = append(names, m.Name)
		}
	}
	if len(names) == 0 {
		return nil, &hinted{errors.New("no machine of the lab runs"), "\"lab up\" starts them"}
	}
	return names, nil
}

// everywhere runs cmd on several machines at once.
func (a *app) everywhere(ctx context.Context, l *engine.Lab, names []lab.Name, user string, cmd guest.Command, typed []string) error {
	words := make([]string, len(names))
	for i, n := range names {
		words[i] = string(n)
	}
	prefix := ui.NewPrefixer(words)
	errs := make([]error, len(names))
	var wg sync.WaitGroup
	for i, name := range names {
		wg.Add(1)
		go func() {
			defer wg.Done()
			out, errOut := prefix.Writer(a.Out, words[i]), prefix.Writer(a.Err, words[i])
			defer out.Close()
			defer errOut.Close()
			client, err := a.enter(ctx, l, name, user, "exec", typed)
			if err == nil {
				defer client.Close()
				one := cmd
				one.Stdout, one.Stderr = out, errOut
				err = passOn(client.Run(ctx, one))
			}
			errs[i] = err
		}()
	}
	wg.Wait()
	return a.verdict(ctx, names, errs)
}

// verdict reports what went wrong and returns the first error, in the order of
// the machines: its exit code is that of the whole.
func (a *app) verdict(ctx context.Context, names []lab.Name, errs []error) error {
	var first error
	for i, err := range errs {
		if err == nil {
			continue
		}
		var quit *commandExit
		if errors.As(err, &quit) {
			a.ui.Note("%s: exit code %d", names[i], quit.code)
		} else {
			err = fmt.Errorf("%s: %w", names[i], err)
			if first != nil && ctx.Err() == nil {
				a.fail(ctx, err)
			}
		}
		if first == nil {
			first = err
		}
	}
	return first
}

// isClosed reports whether err says that the other side, or we, hung up.
func isClosed(err error) bool {
	return err == nil || errors.Is(err, net.ErrClosed) || errors.Is(err, io.EOF) ||
		errors.Is(err, io.ErrClosedPipe) || errors.Is(err, os.ErrClosed) || strings.Contains(err.Error(), "connection reset")
}
