// SPDX-License-Identifier: Apache-2.0

package supervise

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"
	"time"

	"github.com/labfile/lab/internal/dirs"
	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/proxy"
)

// helloTimeout bounds how long a supervisor may take to say hello: it has nothing
// else to do then. One that is stopped by a signal is given up after haltedTimeout: some
// commands ask several times.
const (
	helloTimeout  = 10 * time.Second
	haltedTimeout = 500 * time.Millisecond
)

// errGoing says that a supervisor holds its lock but does not serve: it is
// starting or ending.
var errGoing = errors.New("it is starting or ending, and does not get on")

var errHalted = errors.New("it is stopped by a signal")

// Client talks to a lab's supervisor, which does not end by itself while a Client
// is open. Its methods may be called by several goroutines at once.
type Client struct {
	socket  string
	version string
	pid     int
	hello   net.Conn
}

// Dial connects to the lab's supervisor. ErrNotRunning if it has none; one that is
// just starting or ending is waited for.
func Dial(ctx context.Context, d dirs.Dirs, id lab.ID) (*Client, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, startTimeout, errGoing)
	defer cancel()
	for {
		c, err := dialOnce(ctx, d, id, helloTimeout)
		if err == nil || !errors.Is(err, errGoing) {
			return c, err
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("reaching the lab's supervisor: %w", context.Cause(ctx))
		case <-time.After(pause):
		}
	}
}

// SilentError says that a lab's supervisor lives but does not answer.
type SilentError struct {
	PID    int // 0 if it is not known
	Waited time.Duration
	Halted bool // by a signal such as SIGSTOP, or by a debugger
}

func (e *SilentError) Error() string {
	who := "the lab's supervisor"
	if e.PID != 0 {
		who += fmt.Sprintf(" (process %d)", e.PID)
	}
	if e.Halted {
		return fmt.Sprintf("%s is stopped by a signal: it did not answer within %v", who, e.Waited)
	}
	return fmt.Sprintf("%s did not answer within %v", who, e.Waited)
}

// Hint says what to do about the process. Machines outlive their supervisor.
func (e *SilentError) Hint() string {
	const anew = "the machines run on, and the next command starts a new one"
	switch {
	case e.PID == 0:
		return "end that process: " + anew
	case e.Halted:
		return fmt.Sprintf("\"kill -CONT %d\" lets it go on; or \"kill -KILL %[1]d\": %s", e.PID, anew)
	}
	return fmt.Sprintf("try again if the host is busy; or \"kill -KILL %d\": %s", e.PID, anew)
}

// listenerOf returns the process that listens on a unix socket, 0 if that cannot be
// told.
func listenerOf(socket string) int {
	conn, err := net.DialTimeout("unix", socket, time.Second)
	if err != nil {
		return 0
	}
	defer conn.Close()
	unixConn, ok := conn.(*net.UnixConn)
	if !ok {
		return 0
	}
	return peerOf(unixConn)
}

// dialOnce gives a supervisor limit to say hello.
func dialOnce(ctx context.Context, d dirs.Dirs, id lab.ID, limit time.Duration) (*Client, error) {
	c := &Client{socket: socketPath(d, id)}
	tctx, stop := context.WithTimeout(ctx, limit)
	defer stop()
	hctx, cancel := context.WithCancelCause(tctx)
	defer cancel(nil)
	look := time.AfterFunc(min(haltedTimeout, limit), func() {
		if halted(listenerOf(c.socket)) {
			cancel(errHalted)
		}
	})
	defer look.Stop()
	conn, r, err := c.ask(hctx, request{Op: opHello})
	switch {
	case err == nil:
		c.hello, c.version, c.pid = conn, r.Version, r.PID
		return c, nil
	case ctx.Err() != nil:
		return nil, fmt.Errorf("reaching the lab's supervisor: %w", context.Cause(ctx))
	case hctx.Err() != nil:
		pid := listenerOf(c.socket)
		if context.Cause(hctx) == errHalted {
			limit = min(limit, haltedTimeout)
		}
		return nil, &SilentError{PID: pid, Waited: limit, Halted: halted(pid)}
	case !gone(err):
		return nil, err
	case Alive(d, id):
		return nil, errGoing
	}
	return nil, ErrNotRunning
}

// gone reports whether the error is what a supervisor's end looks like from
// outside, before or during a conversation.
func gone(err error) bool {
	for _, e := range []error{
		syscall.ENOENT, syscall.ECONNREFUSED, syscall.ECONNRESET, syscall.EPIPE, io.EOF, io.ErrUnexpectedEOF,
	} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// Ensure connects to the lab's supervisor. If there is none, it calls start, which
// begins one and returns when that serves (see Spawn). Of concurrent callers one
// calls start.
func Ensure(ctx context.Context, d dirs.Dirs, id lab.ID, start func() error) (*Client, error) {
	c, err := Dial(ctx, d, id)
	if !errors.Is(err, ErrNotRunning) {
		return c, err
	}
	if err := os.MkdirAll(d.RunLab(id), 0o700); err != nil {
		return nil, err
	}
	l, err := lock(ctx, startPath(d, id))
	if err != nil {
		return nil, fmt.Errorf("waiting to start the lab's supervisor: %w", err)
	}
	defer l.Close()
	if c, err = Dial(ctx, d, id); !errors.Is(err, ErrNotRunning) {
		return c, err
	}
	startErr := start()
	// Somebody may have been faster; then it does not matter why start failed.
	c, err = Dial(ctx, d, id)
	if err != nil && startErr != nil {
		return nil, startErr
	}
	return c, err
}

// Stop ends the lab's supervisor, if it has one, and returns when its process is gone.
// Machines go on running.
func Stop(ctx context.Context, d dirs.Dirs, id lab.ID) error {
	c, err := Dial(ctx, d, id)
	if errors.Is(err, ErrNotRunning) {
		return nil
	}
	if err != nil {
		return err
	}
	defer c.Close()
	exit := exitOf(c.pid) // it lives: it has just said hello
	conn, _, err := c.ask(ctx, request{Op: opShutdown})
	if err == nil {
		conn.Close()
	} else if !gone(err) {
		return fmt.Errorf("stopping the lab's supervisor: %w", err)
	}
	for Alive(d, id) {
		select {
		case <-ctx.Done():
			return fmt.Errorf("waiting for the lab's supervisor to end: %w", context.Cause(ctx))
		case <-time.After(pause):
		}
	}
	if err := exit(ctx); err != nil {
		return fmt.Errorf("waiting for the lab's supervisor to end: %w", err)
	}
	return nil
}

// Version is the version of the program that the supervisor runs. It differs from
// this program's after an upgrade.
func (c *Client) Version() string { return c.version }

// Close lets the supervisor go. Connections made by Dial and Agent stay open.
func (c *Client) Close() error { return c.hello.Close() }

// Plug gives a running machine its cable, its names, its forwards and its agent
// channel, and returns the forwards with the host ports that are listened on, in
// the order they were asked for. It may be repeated: forwards are changed to those
// asked for, and a newer generation takes the place of an older one. If a forward
// fails (*network.PortError), the machine is plugged in all the same.
//
// A standby gets its cable and its agent channel only, and no forwards are returned;
// ErrBeside if another generation is a standby or draining. A standby that is present
// already stays so. To plug in a standby's generation without Standby makes it the
// present one, with nothing drained; a newer one ends it.
func (c *Client) Plug(ctx context.Context, m Machine) ([]lab.Forward, error) {
	q := request{Op: opPlug, Machine: &m}
	if m.Standby {
		q.Op = opStandby
	}
	r, err := c.call(ctx, q)
	return r.Forwards, err
}

// Promote makes a standby the present machine: names, address and forwarded ports pass
// over in one step, and no connection is refused or lost. The forwards become those that
// are given; they are returned as by Plug. If one cannot be had (*network.PortError),
// nothing has changed.
//
// The generation that was present is draining from then on: its connections go on until
// it is unplugged, which the caller does when Drained returns. To promote what is
// present changes its forwards, no more. ErrNotPlugged, or ErrStale if g is draining.
func (c *Client) Promote(ctx context.Context, g lab.Generation, forwards []lab.Forward, drain time.Duration) ([]lab.Forward, error) {
	r, err := c.call(ctx, request{Op: opPromote, Generation: &g, Forwards: forwards, Drain: drain})
	return r.Forwards, err
}

// Drained returns when a draining generation has no connections any more, or when its
// time to drain is over, or when it is gone.
func (c *Client) Drained(ctx context.Context, g lab.Generation) error {
	_, err := c.call(ctx, request{Op: opDrained, Generation: &g})
	return err
}

// Withdraw takes a machine out of its role's name, so that no more is asked of it by
// that name; its own name stays. Plugging the generation in again undoes it.
// ErrNotPlugged if the generation is not present.
func (c *Client) Withdraw(ctx context.Context, g lab.Generation) error {
	_, err := c.call(ctx, request{Op: opWithdraw, Generation: &g})
	return err
}

// Mount makes a machine's agent mount folders of the host, one after the other, and
// returns when they are mounted. The supervisor serves them from then on, for as long as the machine
// runs and whenever its agent starts anew. ErrNotPlugged, ErrNoAgent, or what the agent
// has against it.
func (c *Client) Mount(ctx context.Context, g lab.Generation, mounts []Mount) error {
	_, err := c.call(ctx, request{Op: opMount, Generation: &g, Mounts: mounts})
	return err
}

// Expose lets the guests reach ports of this host's loopback under names, in the place of
// those that they reached before. Connections that there are go on.
func (c *Client) Expose(ctx context.Context, ports []lab.Exposed) error {
	_, err := c.call(ctx, request{Op: opExpose, Exposed: ports})
	return err
}

// AddRelays lets the guests reach proxies of this host in addition to those that they reach already. A port
// that led to another proxy leads to this one. The next supervisor has the relays, too. *OldError.
func (c *Client) AddRelays(ctx context.Context, relays []proxy.Relay) error {
	_, err := c.call(ctx, request{Op: opAddRelays, Relays: relays})
	return err
}

// ReplaceRelays is AddRelays, and what guests reached before they no longer reach.
// Connections that there are go on.
func (c *Client) ReplaceRelays(ctx context.Context, relays []proxy.Relay) error {
	_, err := c.call(ctx, request{Op: opReplaceRelays, Relays: relays})
	return err
}

// OldError says that a lab's supervisor is of an older lab than this one, and knows nothing
// of what it is asked for.
type OldError struct {
	Version string // of the supervisor
	PID     int
}

// Error implements error.
func (e *OldError) Error() string {
	return fmt.Sprintf("the lab's supervisor (process %d, version %s) is of an older lab, which does not know how", e.PID, e.Version)
}

// Hint is the next step.
func (e *OldError) Hint() string {
	return fmt.Sprintf("\"kill %d\" ends it: the machines run on, and the next command starts a new one", e.PID)
}

// Unplug takes the machine off the network. It succeeds if the generation is not
// plugged in.
func (c *Client) Unplug(ctx context.Context, g lab.Generation) error {
	_, err := c.call(ctx, request{Op: opUnplug, Generation: &g})
	return err
}

// Dial connects to a TCP port of a machine. ErrNotPlugged if the supervisor knows
// no such machine, syscall.ECONNREFUSED if the guest refuses.
func (c *Client) Dial(ctx context.Context, name lab.Name, port uint16) (net.Conn, error) {
	conn, _, err := c.ask(ctx, request{Op: opDial, Name: name, Port: port})
	return conn, err
}

// DialGeneration is Dial to one generation, whatever its phase.
func (c *Client) DialGeneration(ctx context.Context, g lab.Generation, port uint16) (net.Conn, error) {
	conn, _, err := c.ask(ctx, request{Op: opDial, Generation: &g, Port: port})
	return conn, err
}

// AgentGeneration is Agent of one generation, whatever its phase.
func (c *Client) AgentGeneration(ctx context.Context, g lab.Generation) (net.Conn, error) {
	conn, _, err := c.ask(ctx, request{Op: opAgent, Generation: &g})
	return conn, err
}

// Agent opens a stream to the machine's agent. It waits for the agent to answer
// until ctx ends. ErrNotPlugged, or ErrNoAgent.
func (c *Client) Agent(ctx context.Context, name lab.Name) (net.Conn, error) {
	conn, _, err := c.ask(ctx, request{Op: opAgent, Name: name})
	return conn, err
}

// Answer asks a machine whether it is there and returns when it answers: its agent or, of
// one without, its kernel over the network. It does not count for LastActive. ErrNotPlugged,
// or ErrNoAgent if it has neither agent nor cable.
func (c *Client) Answer(ctx context.Context, g lab.Generation) error {
	_, err := c.call(ctx, request{Op: opAnswer, Generation: &g})
	return err
}

// Status tells what the supervisor is doing.
func (c *Client) Status(ctx context.Context) (Status, error) {
	r, err := c.call(ctx, request{Op: opStatus})
	if err != nil {
		return Status{}, err
	}
	if r.Status == nil {
		return Status{}, errors.New("asking the lab's supervisor for its status: it sent none")
	}
	return *r.Status, nil
}

// call asks and closes the connection.
func (c *Client) call(ctx context.Context, q request) (reply, error) {
	conn, r, err := c.ask(ctx, q)
	if err == nil {
		conn.Close()
	}
	return r, err
}

// ask sends a request on a connection of its own and returns the connection behind
// the reply. The end of ctx closes the connection, which tells the supervisor to
// give up too.
func (c *Client) ask(ctx context.Context, q request) (net.Conn, reply, error) {
	var r reply
	conn, err := new(net.Dialer).DialContext(ctx, "unix", c.socket)
	if err != nil {
		return nil, r, err
	}
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	br := bufio.NewReader(conn)
	if err = writeLine(conn, q); err == nil {
		err = readLine(br, &r)
	}
	if !stop() {
		err = context.Cause(ctx)
	}
	if err == nil && r.Error != nil && r.Error.Text == unknown(c.version, q.Op) {
		err = &OldError{Version: c.version, PID: c.pid}
	} else if err == nil && r.Error != nil {
		err = r.Error.err()
	} else if err != nil {
		err = fmt.Errorf("talking to the lab's supervisor: %w", err)
	}
	if err != nil {
		conn.Close()
		return nil, r, err
	}
	return &lineConn{Conn: conn, r: br}, r, nil
}
