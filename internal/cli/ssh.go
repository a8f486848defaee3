// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"bytes"
	"context"
	"io"
	"net"
	"os"
	"os/signal"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/urfave/cli/v2"
	"golang.org/x/term"

	"github.com/labfile/lab/internal/engine"
	"github.com/labfile/lab/internal/guest"
)

func (a *app) sshCommand() *command {
	return &command{
		name: "ssh", group: groupDaily, args: "MACHINE [-- COMMAND...]", min: 1, max: 1, tail: afterName, lab: true,
		short: "log in to a machine, or run a command there",
		long: `Opens a login shell on the machine or, with a command, runs that: its words are
joined with spaces and go to the machine's shell, as ssh does it. The exit code
is the command's own. The machine's key is verified, from the first time on.`,
		flags: []cli.Flag{
			userFlag(),
			&cli.BoolFlag{Name: "tty", Aliases: []string{"t"}, Usage: "give the command a terminal"},
		},
		complete: a.completeMachines,
		examples: []string{
			"lab ssh web", "a shell",
			"lab ssh web -- uname -a", "one command",
			"lab ssh web -t -- top", "one that needs a terminal",
		},
		run: func(ctx context.Context, r request) error {
			cmd := guest.Command{Shell: strings.Join(r.tail, " ")}
			return a.attach(ctx, r, "ssh", r.args[0], cmd, len(r.tail) == 0 || r.Bool("tty"))
		},
	}
}

func userFlag() cli.Flag {
	return &cli.StringFlag{Name: "user", Aliases: []string{"l"}, Usage: "log in as `USER` (default: the machine's own)"}
}

// attach connects a command on a machine with our own streams. With tty, and if
// In is a terminal, the command gets one, and ours is raw meanwhile.
func (a *app) attach(ctx context.Context, r request, how, machine string, cmd guest.Command, tty bool) error {
	client, err := a.connect(ctx, machine, r.String("user"), how, r.tail)
	if err != nil {
		return err
	}
	defer client.Close()
	cmd.Stdin, cmd.Stdout, cmd.Stderr = a.In, a.Out, a.Err
	if f, ok := a.In.(*os.File); tty && ok && term.IsTerminal(int(f.Fd())) {
		raw, err := a.raw(f)
		if err != nil {
			return err
		}
		defer raw.restore()
		cmd.TTY = raw.tty
		keys := typedKeys(f, a.silent.Load, func() { client.Close() })
		cmd.Stdin = keys
		err = passOn(client.Run(ctx, cmd))
		if keys.interrupted.Load() {
			return exitCode(ExitInterrupted)
		}
		return err
	} else if tty && r.Bool("tty") {
		a.ui.Note("there is no terminal to give to the command")
	}
	return passOn(client.Run(ctx, cmd))
}

// typing is what is typed into a raw terminal.
type typing struct {
	read        chan []byte
	rest        []byte
	interrupted atomic.Bool
}

// ctrlC is what a raw terminal sends in place of a signal.
const ctrlC = 3

// typedKeys reads what is typed, which goes to the guest. While the guest is silent,
// Ctrl-C calls stop: the guest, which would heed it, does not. Keys are read before
// anybody asks for them, because a silent guest may have taken none yet.
func typedKeys(in io.Reader, silent func() bool, stop func()) *typing {
	k := &typing{read: make(chan []byte, 256)}
	go func() {
		defer close(k.read)
		for {
			buf := make([]byte, 4096)
			n, err := in.Read(buf)
			if bytes.IndexByte(buf[:n], ctrlC) >= 0 && silent() {
				k.interrupted.Store(true)
				stop()
				return
			}
			if n > 0 {
				k.read <- buf[:n]
			}
			if err != nil {
				return
			}
		}
	}()
	return k
}

func (k *typing) Read(p []byte) (int, error) {
	if len(k.rest) == 0 {
		var ok bool
		if k.rest, ok = <-k.read; !ok {
			return 0, io.EOF
		}
	}
	n := copy(p, k.rest)
	k.rest = k.rest[n:]
	return n, nil
}

// connect logs in by hand to a machine of the lab that is meant.
func (a *app) connect(ctx context.Context, machine, user, how string, command []string) (*guest.Client, error) {
	names, err := machines([]string{machine})
	if err != nil {
		return nil, err
	}
	l, err := a.existing(ctx)
	if err != nil {
		return nil, err
	}
	name, err := l.One(names[0])
	if err != nil {
		return nil, err
	}
	return a.enter(ctx, l, name, user, how, command)
}

// rawTerminal is our terminal while it belongs to a guest.
type rawTerminal struct {
	tty     *guest.TTY
	restore func()
}

// raw puts the terminal into raw mode and follows its size.
func (a *app) raw(f *os.File) (*rawTerminal, error) {
	fd := int(f.Fd())
	old, err := term.MakeRaw(fd)
	if err != nil {
		return nil, err
	}
	size := func() guest.Size {
		columns, rows, err := term.GetSize(fd)
		if err != nil {
			return guest.Size{Columns: 80, Rows: 24}
		}
		return guest.Size{Columns: columns, Rows: rows}
	}
	kind := a.Getenv("TERM")
	if kind == "" {
		kind = "xterm"
	}
	a.ui.SetRaw(true)
	resized := make(chan os.Signal, 1)
	signal.Notify(resized, syscall.SIGWINCH)
	sizes := make(chan guest.Size, 1)
	done := make(chan struct{})
	go func() {
		for {
			select {
			case <-done:
				return
			case <-resized:
				select {
				case sizes <- size():
				case <-done:
					return
				}
			}
		}
	}()
	return &rawTerminal{
		tty: &guest.TTY{Term: kind, Size: size(), Resize: sizes},
		restore: func() {
			signal.Stop(resized)
			close(done)
			_ = term.Restore(fd, old)
			a.ui.SetRaw(false)
		},
	}, nil
}

func (a *app) sshProxyCommand() *command {
	return &command{
		name: "ssh-proxy", hidden: true, args: "MACHINE", min: 1, max: 1, lab: true,
		short: "connect stdin and stdout to a machine's ssh server",
		long:  `For ssh's ProxyCommand: see "lab ssh-config".`,
		run: func(ctx context.Context, r request) error {
			l, name, err := a.one(ctx, r)
			if err != nil {
				return err
			}
			if err := l.Admit(name, "ssh"); err != nil {
				return err
			}
			heard := &traffic{began: time.Now()}
			defer a.attend(ctx, l, name, engine.Attention{Expected: true, Heard: heard.last, Sent: heard.sent})()
			conn, err := l.DialSSH(ctx, name)
			if err != nil {
				return err
			}
			defer conn.Close()
			conn = heard.of(conn)
			if err := a.entered(ctx, l, name, "ssh", nil); err != nil {
				return err
			}
			stop := context.AfterFunc(ctx, func() { conn.Close() })
			defer stop()
			go func() {
				// ssh is gone when our stdin ends: there is nobody left to serve.
				_, _ = io.Copy(conn, a.In)
				if half, ok := conn.(interface{ CloseWrite() error }); ok {
					_ = half.CloseWrite()
				} else {
					conn.Close()
				}
			}()
			_, err = io.Copy(a.Out, conn)
			if ctx.Err() != nil {
				return exitCode(ExitInterrupted) // ssh hangs up on its proxy like this
			}
			if isClosed(err) {
				return nil
			}
			return err
		},
	}
}

// traffic is what a connection carries, also before there is one.
type traffic struct {
	began time.Time
	pulse atomic.Pointer[guest.Pulse]
}

// of returns the connection that it is the traffic of from now on.
func (t *traffic) of(conn net.Conn) net.Conn {
	conn, p := guest.Hear(conn)
	t.pulse.Store(&p)
	return conn
}

// last is when something last came.
func (t *traffic) last() time.Time {
	if p := t.pulse.Load(); p != nil {
		if at := p.Heard(); at.After(t.began) {
			return at
		}
	}
	return t.began
}

// sent is how many bytes went out.
func (t *traffic) sent() int64 {
	if p := t.pulse.Load(); p != nil {
		return p.Sent()
	}
	return 0
}
