// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"bytes"
	"context"
	"io"
	"os"

	"golang.org/x/term"
)

// escapeKey leaves the console: Ctrl-].
const escapeKey = 0x1d

func (a *app) consoleCommand() *command {
	return &command{
		name: "console", group: groupLook, args: "MACHINE", min: 1, max: 1, lab: true,
		short: "open a machine's serial console",
		long: `Connects the terminal with the machine's serial console: it works when the network
does not, and from the first line of the boot. Ctrl-] leaves it; the machine runs
on. One user at a time. What the guest prints reaches your terminal as it is.`,
		complete: a.completeMachines,
		examples: []string{"lab console web", "Enter may be needed to see a prompt"},
		run: func(ctx context.Context, r request) error {
			names, err := machines(r.args)
			if err != nil {
				return err
			}
			l, err := a.existing(ctx)
			if err != nil {
				return err
			}
			con, err := l.Console(ctx, names[0])
			if err != nil {
				return err
			}
			defer con.Close()
			if f, ok := a.In.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
				a.ui.Note("this is the console of %s; Ctrl-] leaves it", names[0])
				old, err := term.MakeRaw(int(f.Fd()))
				if err != nil {
					return err
				}
				defer func() {
					_ = term.Restore(int(f.Fd()), old)
					a.ui.Note("left the console of %s", names[0])
				}()
			}
			return bridge(ctx, a.In, a.Out, con)
		},
	}
}

// bridge connects the streams with the console until the escape key is read, the
// console ends, or ctx does. The end of in alone does not end it: a script may
// send something and wait for what the machine answers.
func bridge(ctx context.Context, in io.Reader, out io.Writer, con io.ReadWriteCloser) error {
	left := make(chan struct{})
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
				return
			}
		}
	}()
	ended := make(chan error, 1)
	go func() {
		_, err := io.Copy(out, con)
		ended <- err
	}()
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
	}
}
