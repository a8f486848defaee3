// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"bytes"
	"context"
	"io"
	"os"
	"time"

	"golang.org/x/term"

	"github.com/labfile/lab/internal/engine"
)

// quietEnd is how long a console must be silent after the end of stdin for nothing
// more to be expected from it.
const quietEnd = time.Second

// escapeKey leaves the console: Ctrl-].
const escapeKey = 0x1d

func (a *app) consoleCommand() *command {
	return &command{
		name: "console", group: groupLook, args: "MACHINE", min: 1, max: 1, lab: true,
		short: "open a machine's serial console",
		long: `Connects the terminal with the machine's serial console: it works when the network
does not, and from the first line of the boot. Ctrl-] leaves it; the machine runs
on. One user at a time. What the guest prints reaches your terminal as it is.
When stdin is a file or a pipe, it ends once that is sent and the machine has
printed nothing for a second; "lab logs -F" follows without an end.`,
		complete: a.completeMachines,
		examples: []string{
			"lab console web", "Enter may be needed to see a prompt",
			"echo help | lab console web", "send a line, print the answer",
		},
		run: func(ctx context.Context, r request) error {
			l, name, err := a.one(ctx, r)
			if err != nil {
				return err
			}
			if err := l.Admit(name, "console"); err != nil {
				return err
			}
			con, err := l.Console(ctx, name)
			if err != nil {
				return err
			}
			defer con.Close()
			if err := a.entered(ctx, l, name, "console", nil); err != nil {
				return err
			}
			if f, ok := a.In.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
				a.ui.Note("this is the console of %s; Ctrl-] leaves it", name)
				old, err := term.MakeRaw(int(f.Fd()))
				if err != nil {
					return err
				}
				a.ui.SetRaw(true)
				defer func() {
					_ = term.Restore(int(f.Fd()), old)
					a.ui.SetRaw(false)
					a.ui.Note("left the console of %s", name)
				}()
			}
			defer a.attend(ctx, l, name, engine.Attention{})()
			return bridge(ctx, a.In, a.Out, con, quietEnd)
		},
	}
}

// bridge connects the streams with the console until the escape key is read, the
// console ends, or ctx does. The end of in ends it once the console has been
// silent for quiet: a script may send something and wait for what the machine
// answers.
func bridge(ctx context.Context, in io.Reader, out io.Writer, con io.ReadWriteCloser, quiet time.Duration) error {
	left, eof, printed := make(chan struct{}), make(chan struct{}), make(chan struct{}, 1)
	go func() {
		buf := make([]byte, 4096)
		for {
			n, err := in.Read(buf)
			part, _, escaped := bytes.Cut(buf[:n], []byte{escapeKey})
			if _, werr := con.Write(part); werr != nil || escaped {
				close(left)
				return
			}
			if err != nil {
				close(eof)
				return
			}
		}
	}()
	ended := make(chan error, 1)
	go func() {
		_, err := io.Copy(&noticed{out, printed}, con)
		ended <- err
	}()
	var silence <-chan time.Time // nil until in has ended
	for {
		select {
		case <-left:
			return nil
		case <-ctx.Done():
			return exitCode(ExitInterrupted)
		case err := <-ended:
			if isClosed(err) {
				return nil
			}
			return err
		case <-silence:
			return nil
		case <-eof:
			eof, silence = nil, time.After(quiet)
		case <-printed:
			if silence != nil {
				silence = time.After(quiet)
			}
		}
	}
}

// noticed is a writer that tells when something was written.
type noticed struct {
	w       io.Writer
	written chan<- struct{}
}

func (n *noticed) Write(b []byte) (int, error) {
	select {
	case n.written <- struct{}{}:
	default: // it has not heard of the last time yet
	}
	return n.w.Write(b)
}
