// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"bytes"
	"context"
	"io"
	"os"
	"regexp"
	"time"

	"github.com/urfave/cli/v2"
	"golang.org/x/term"

	"github.com/labfile/lab/internal/engine"
	"github.com/labfile/lab/internal/ui"
	"github.com/labfile/lab/providers"
)

func (a *app) logsCommand() *command {
	return &command{
		name: "logs", group: groupDaily, args: "MACHINE[@N]", min: 1, max: 1, lab: true,
		short: "show what a machine printed on its console",
		long: `Prints the serial console's log of the machine's present generation: the kernel's
messages and whatever else goes there. NAME@N is another generation that still exists:
one that was retired, or that failed. On a terminal, control characters are shown
rather than obeyed.`,
		flags: []cli.Flag{
			&cli.BoolFlag{Name: "follow", Aliases: []string{"F"}, Usage: "go on as more is printed, until interrupted"},
			&cli.BoolFlag{Name: "hypervisor", Usage: "the hypervisor's own messages instead"},
			&cli.IntFlag{Name: "tail", Aliases: []string{"n"}, Value: -1, Usage: "only the last `N` lines"},
		},
		complete: a.completeMachines,
		examples: []string{
			"lab logs web", "everything so far",
			"lab logs web -F", "and what follows",
			"lab logs web --hypervisor", "why it did not start",
			"lab logs web@4", "of generation 4",
		},
		run: func(ctx context.Context, r request) error {
			name, number, err := generation(r.args[0])
			if err != nil {
				return err
			}
			if n := r.Int("tail"); r.IsSet("tail") && n < 0 {
				return usage("write a number of lines", "--tail cannot be negative")
			}
			which := providers.LogConsole
			if r.Bool("hypervisor") {
				which = providers.LogHypervisor
			}
			l, err := a.existing(ctx)
			if err != nil {
				return err
			}
			if name, err = l.One(name); err != nil {
				return err
			}
			log, err := l.OpenLog(ctx, name, number, which)
			if err != nil {
				return err
			}
			defer log.Close()
			out := a.guarded()
			if err := printTail(ctx, out, log, r.Int("tail")); err != nil {
				return err
			}
			if r.Bool("follow") && number == 0 && which == providers.LogConsole {
				defer a.attend(ctx, l, name, engine.Attention{})()
			}
			for r.Bool("follow") {
				select {
				case <-ctx.Done():
					return exitCode(ExitInterrupted)
				case <-time.After(followEvery):
				}
				if _, err := io.Copy(out, log); err != nil {
					return err
				}
			}
			return out.Close()
		},
	}
}

// followEvery is how often a followed log is looked at: it is a file, which
// tells nobody that it grew.
const followEvery = 100 * time.Millisecond

// printTail copies the last n lines of r, or all of it if n is negative.
func printTail(ctx context.Context, w io.Writer, r io.Reader, n int) error {
	if n < 0 {
		_, err := io.Copy(w, &stoppable{ctx, r})
		return err
	}
	var ring ringBuffer
	if _, err := io.Copy(&ring, &stoppable{ctx, r}); err != nil {
		return err
	}
	_, err := w.Write(lastLines(ring.bytes(), n))
	return err
}

// lastLines returns the last n lines of b.
func lastLines(b []byte, n int) []byte {
	if n == 0 {
		return nil
	}
	end := len(bytes.TrimSuffix(b, []byte("\n")))
	for i := 0; i < n; i++ {
		at := bytes.LastIndexByte(b[:end], '\n')
		if at < 0 {
			return b
		}
		end = at
	}
	return b[end+1:]
}

// ringBuffer keeps the end of what is written to it: maxTail bytes or more.
type ringBuffer struct{ buf []byte }

// maxTail bounds what --tail looks at, in bytes.
const maxTail = 4 << 20

func (r *ringBuffer) Write(p []byte) (int, error) {
	r.buf = append(r.buf, p...)
	if len(r.buf) > 2*maxTail {
		r.buf = append(r.buf[:0], r.buf[len(r.buf)-maxTail:]...)
	}
	return len(p), nil
}

func (r *ringBuffer) bytes() []byte { return r.buf }

// stoppable ends a copy when the context ends.
type stoppable struct {
	ctx context.Context
	r   io.Reader
}

func (s *stoppable) Read(p []byte) (int, error) {
	if err := s.ctx.Err(); err != nil {
		return 0, err
	}
	return s.r.Read(p)
}

// guarded returns Out or, if that is a terminal, a writer to it that shows
// control characters instead of passing them on: what a guest prints must not
// drive the terminal of somebody who only looks.
func (a *app) guarded() io.WriteCloser {
	if f, ok := a.Out.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
		return &cleaner{w: a.Out}
	}
	return plainCloser{a.Out}
}

type plainCloser struct{ io.Writer }

func (plainCloser) Close() error { return nil }

// colors are the escape sequences that colour text: left out rather than shown.
var colors = regexp.MustCompile("\x1b\\[[0-9;]*m")

// cleaner cleans whole lines.
type cleaner struct {
	w    io.Writer
	rest []byte
}

func (c *cleaner) Write(p []byte) (int, error) {
	c.rest = append(c.rest, p...)
	at := bytes.LastIndexByte(c.rest, '\n')
	if at < 0 && len(c.rest) < 64<<10 {
		return len(p), nil
	}
	if at < 0 {
		at = len(c.rest) - 1
	}
	whole := colors.ReplaceAllString(string(c.rest[:at+1]), "")
	c.rest = append(c.rest[:0], c.rest[at+1:]...)
	if _, err := io.WriteString(c.w, ui.CleanLines(whole)); err != nil {
		return 0, err
	}
	return len(p), nil
}

// Close writes a last line that has no end.
func (c *cleaner) Close() error {
	if len(c.rest) == 0 {
		return nil
	}
	_, err := io.WriteString(c.w, ui.CleanLines(colors.ReplaceAllString(string(c.rest), ""))+"\n")
	return err
}
