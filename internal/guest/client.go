// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/labfile/lab/internal/guest/agentapi"
)

// Sentinel errors of Connect.
var (
	// ErrHostKey says that whoever answered is not the machine that lab made.
	ErrHostKey = errors.New("the host key is not the one that lab gave the machine")
	// ErrLogin says that the machine let nobody in with the lab's key.
	ErrLogin = errors.New("login refused")
)

// Client is a login to a machine. Its methods may be called at the same time.
type Client struct {
	ssh     *ssh.Client
	conn    *heard
	machine string // its name

	env   []string // Target.Env
	unset []string // Target.Unset
	agent bool     // the server is lab-agent's, which takes every variable
}

// Connect logs in to a machine, which it takes only if it has the key that t names.
//
// Errors: ErrHostKey, ErrLogin, a *RefusedError if the agent does not serve ssh
// yet, and those of t's dialers.
func Connect(ctx context.Context, t Target) (*Client, error) {
	conn, err := DialSSH(ctx, t)
	if err != nil {
		return nil, err
	}
	c, err := login(ctx, conn, t)
	if err != nil {
		return nil, err
	}
	c.env, c.unset, c.agent = t.Env, t.Unset, t.Agent != nil
	return c, nil
}

// login speaks ssh on conn, which it owns.
func login(ctx context.Context, conn net.Conn, t Target) (*Client, error) {
	if t.HostKey == nil || t.Key == nil {
		conn.Close()
		return nil, fmt.Errorf("logging in to machine %q: its keys are not known", t.Machine)
	}
	var stranger, offered bool
	supported := ssh.SupportedAlgorithms().KeyExchanges
	const quick = "curve25519-sha256" // under emulation arithmetic is slow
	cc := &ssh.ClientConfig{
		Config: ssh.Config{
			KeyExchanges: append([]string{quick}, slices.DeleteFunc(supported, func(s string) bool { return s == quick })...),
		},
		User: t.User,
		Auth: []ssh.AuthMethod{ssh.PublicKeysCallback(func() ([]ssh.Signer, error) {
			offered = true
			return []ssh.Signer{t.Key}, nil
		})},
		HostKeyAlgorithms: []string{t.HostKey.Type()},
		HostKeyCallback: func(_ string, _ net.Addr, key ssh.PublicKey) error {
			if !bytes.Equal(key.Marshal(), t.HostKey.Marshal()) {
				stranger = true
				return ErrHostKey
			}
			return nil
		},
	}
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	h := &heard{Conn: conn}
	sc, chans, reqs, err := ssh.NewClientConn(h, string(t.Machine), cc)
	if !stop() {
		err = context.Cause(ctx)
	}
	if err != nil {
		conn.Close()
		switch {
		case stranger:
			err = ErrHostKey
		case offered && strings.Contains(err.Error(), "unable to authenticate"):
			err = fmt.Errorf("%w for user %q", ErrLogin, t.User)
		}
		return nil, fmt.Errorf("logging in to machine %q: %w", t.Machine, err)
	}
	c := &Client{ssh: ssh.NewClient(sc, chans, reqs), conn: h, machine: string(t.Machine)}
	if t.LoggedIn != nil {
		t.LoggedIn(c)
	}
	return c, nil
}

// Close ends the login and everything that still runs in it.
func (c *Client) Close() error { return c.ssh.Close() }

// Command is something to run in a guest: Args or Shell, or the user's login shell
// if both are empty.
type Command struct {
	Args  []string // a program and its arguments
	Shell string   // a command line for the user's shell
	Env   []string // "NAME=value", besides what a login sets

	// Stdin is read until the command ends; a read that blocks then is left
	// behind. Without Stdin the command reads an empty input, without Stdout or
	// Stderr that output is dropped.
	Stdin          io.Reader
	Stdout, Stderr io.Writer

	// TTY gives the command a terminal. Everything it prints goes to Stdout then.
	TTY *TTY
}

// TTY is a terminal.
type TTY struct {
	Term   string // what TERM is set to
	Size   Size
	Resize <-chan Size // new sizes; may be nil
}

// Size is a terminal's size in characters.
type Size struct{ Columns, Rows int }

// ExitError says that a command ran and did not succeed.
type ExitError struct {
	Code   int    // exit code; 0 if a signal ended it
	Signal string // signal that ended it, without SIG: "TERM"; empty if none
}

func (e *ExitError) Error() string {
	if e.Signal != "" {
		return "command was ended by signal SIG" + e.Signal
	}
	return fmt.Sprintf("command ended with exit code %d", e.Code)
}

// ErrDisconnected says that the connection was lost before a command had ended.
var ErrDisconnected = errors.New("connection to the machine was lost")

// mercy is how long a cancelled command gets to end by itself.
const mercy = 2 * time.Second

// Run runs a command and waits until it has ended and its output is delivered. If
// ctx ends before, the command gets SIGTERM, after two seconds SIGKILL, and the
// error is ctx's cause. A guest that heeds neither, or has not begun to run the command,
// costs the whole login.
//
// Errors: *ExitError, ErrDisconnected.
func (c *Client) Run(ctx context.Context, cmd Command) error {
	line, err := cmd.line()
	if err != nil {
		return err
	}
	// Until it runs, every step waits for an answer that a silent guest never gives.
	stop := context.AfterFunc(ctx, func() { c.Close() })
	s, err := c.begin(cmd, line)
	if !stop() {
		return fmt.Errorf("starting a command: %w", context.Cause(ctx))
	}
	if err != nil {
		return err
	}
	defer s.Close()
	done := make(chan error, 1)
	go func() { done <- s.Wait() }()
	var resize <-chan Size
	if cmd.TTY != nil {
		resize = cmd.TTY.Resize
	}
	for {
		select {
		case err := <-done:
			return ended(err)
		case size, ok := <-resize:
			if !ok {
				resize = nil
				continue
			}
			_ = s.WindowChange(size.Rows, size.Columns)
		case <-ctx.Done():
			c.cancel(s, done)
			return fmt.Errorf("running a command: %w", context.Cause(ctx))
		}
	}
}

// begin starts a command.
func (c *Client) begin(cmd Command, line string) (*ssh.Session, error) {
	s, err := c.ssh.NewSession()
	if err != nil {
		return nil, fmt.Errorf("starting a command: %w", lost(err))
	}
	s.Stdin, s.Stdout, s.Stderr = cmd.Stdin, cmd.Stdout, cmd.Stderr
	switch {
	case len(c.env)+len(c.unset) == 0:
	case c.agent:
		for _, v := range append([]string{agentapi.UnsetVariable + "=" + strings.Join(c.unset, " ")}, c.env...) {
			name, value, _ := strings.Cut(v, "=")
			if _, err := s.SendRequest("env", false, ssh.Marshal(struct{ Name, Value string }{name, value})); err != nil {
				s.Close()
				return nil, fmt.Errorf("starting a command: %w", lost(err))
			}
		}
	default:
		if line, err = within(c.unset, c.env, line); err != nil {
			s.Close()
			return nil, err
		}
	}
	if cmd.TTY != nil {
		modes := ssh.TerminalModes{ssh.TTY_OP_ISPEED: 38400, ssh.TTY_OP_OSPEED: 38400, ssh.IUTF8: 1}
		if err := s.RequestPty(cmd.TTY.Term, cmd.TTY.Size.Rows, cmd.TTY.Size.Columns, modes); err != nil {
			s.Close()
			return nil, fmt.Errorf("asking for a terminal: %w", lost(err))
		}
	}
	if line == "" {
		err = s.Shell()
	} else {
		err = s.Start(line)
	}
	if err != nil {
		s.Close()
		return nil, fmt.Errorf("starting a command: %w", lost(err))
	}
	return s, nil
}

// cancel ends a command step by step. Each step may hang, because the guest may be
// paused or our own output blocked; then the next one is taken.
func (c *Client) cancel(s *ssh.Session, done <-chan error) {
	for _, step := range []func(){
		func() { _ = s.Signal(ssh.SIGTERM) },
		func() { _ = s.Signal(ssh.SIGKILL); s.Close() },
		func() { c.Close() },
	} {
		go step()
		t := time.NewTimer(mercy)
		select {
		case <-done:
			t.Stop()
			return
		case <-t.C:
		}
	}
}

// line is the command line that goes to the user's shell.
func (cmd Command) line() (string, error) {
	if len(cmd.Args) > 0 && cmd.Shell != "" {
		return "", errors.New("running a command: both arguments and a command line were given")
	}
	line := cmd.Shell
	if len(cmd.Args) > 0 {
		line = Quote(cmd.Args)
	}
	if len(cmd.Env) == 0 {
		return line, nil
	}
	if line == "" {
		return "", errors.New("running a command: a login shell takes no environment")
	}
	// Many ssh servers take no variables from clients, but every shell does.
	set, err := export(cmd.Env)
	return set + line, err
}

// export sets variables in a shell.
func export(env []string) (string, error) {
	var b strings.Builder
	b.WriteString("export")
	for _, v := range env {
		name, value, ok := strings.Cut(v, "=")
		if !ok || !validName(name) {
			return "", fmt.Errorf("running a command: %q does not set a variable", v)
		}
		b.WriteString(" " + name + "=" + quote(value))
	}
	return b.String() + "; ", nil
}

// within returns a command line that has the user's own shell, whichever that is, run the
// line with the variables set or unset; without a line, a login shell.
func within(unset, env []string, line string) (string, error) {
	set := ""
	if len(unset) > 0 {
		set = "unset " + Quote(unset) + "; "
	}
	if len(env) > 0 {
		exports, err := export(env)
		if err != nil {
			return "", err
		}
		set += exports
	}
	if line == "" {
		return "exec " + Quote([]string{"/bin/sh", "-c", set + `exec "${SHELL:-/bin/sh}" -l`}), nil
	}
	return "exec " + Quote([]string{"/bin/sh", "-c", set + `exec "${SHELL:-/bin/sh}" -c "$1"`, "lab", line}), nil
}

func validName(s string) bool {
	for i, c := range []byte(s) {
		if !('a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || c == '_' || i > 0 && '0' <= c && c <= '9') {
			return false
		}
	}
	return s != ""
}

// ended translates the end of a command.
func ended(err error) error {
	var (
		exit    *ssh.ExitError
		missing *ssh.ExitMissingError
	)
	switch {
	case err == nil:
		return nil
	case errors.As(err, &exit):
		if exit.Signal() != "" {
			return &ExitError{Signal: exit.Signal()}
		}
		return &ExitError{Code: exit.ExitStatus()}
	case errors.As(err, &missing):
		return ErrDisconnected
	}
	return fmt.Errorf("running a command: %w", lost(err))
}

// lost makes ErrDisconnected of what a dead connection says.
func lost(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, net.ErrClosed) {
		return ErrDisconnected
	}
	return err
}
