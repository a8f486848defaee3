// SPDX-License-Identifier: Apache-2.0

// Package qmp is a client of the QEMU Machine Protocol: commands with ids and
// deadlines, events, and file descriptors passed along.
package qmp

import (
	"bufio"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// DefaultTimeout bounds a command whose context has no deadline: a monitor
// behind a stopped QEMU accepts commands and never answers.
const DefaultTimeout = 10 * time.Second

// maxMessage bounds one message. The longest that QEMU sends is the answer to
// query-qmp-schema, some 500 KB.
const maxMessage = 8 << 20

// maxEvents is how many events wait for a reader before the oldest is dropped.
const maxEvents = 256

// ErrClosed says that the connection to the monitor has ended, mostly because
// QEMU has.
var ErrClosed = errors.New("monitor connection is closed")

// Client is a connection to one monitor. Its methods may be called by several
// goroutines at once.
type Client struct {
	conn     net.Conn
	greeting Greeting
	events   chan Event
	done     chan struct{} // closed when the reader has ended
	tag      string        // begins the ids: a late answer to another client has none of them

	write sync.Mutex // one command goes out at a time

	mu      sync.Mutex
	lastID  uint64
	pending map[string]chan Reply
	err     error // why the reader ended
}

// Dial connects to the monitor at a unix socket and makes it ready for commands.
// A monitor serves one client at a time, so Dial waits, as long as ctx allows and
// DefaultTimeout at most, for another client to leave.
func Dial(ctx context.Context, path string) (*Client, error) {
	ctx, cancel := withDefault(ctx)
	defer cancel()
	conn, err := Connect(ctx, path)
	if err != nil {
		return nil, fmt.Errorf("dialing monitor: %w", err)
	}
	return New(ctx, conn)
}

// connectRetry is how often a socket whose queue is full is tried again.
const connectRetry = 5 * time.Millisecond

// Connect connects to one of QEMU's unix sockets. QEMU listens again only once it has
// noticed that the client before hung up; until then there is hardly a queue, and Connect
// waits for a place in it. Errors: those of connect(2), ctx's cause.
func Connect(ctx context.Context, path string) (net.Conn, error) {
	var d net.Dialer
	for {
		conn, err := d.DialContext(ctx, "unix", path)
		if !errors.Is(err, unix.EAGAIN) {
			return conn, err
		}
		select {
		case <-time.After(connectRetry):
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// New makes a client of a fresh connection: it awaits the greeting and
// negotiates capabilities. It owns conn from now on, also when it fails.
func New(ctx context.Context, conn net.Conn) (*Client, error) {
	ctx, cancel := withDefault(ctx)
	defer cancel()
	c := &Client{
		conn:    conn,
		events:  make(chan Event, maxEvents),
		done:    make(chan struct{}),
		tag:     rand.Text()[:8] + "-",
		pending: map[string]chan Reply{},
	}
	greeted := make(chan struct{})
	go c.read(greeted)
	select {
	case <-greeted:
	case <-c.done:
		conn.Close()
		return nil, fmt.Errorf("awaiting the monitor's greeting: %w", c.reason())
	case <-ctx.Done():
		conn.Close()
		<-c.done
		return nil, fmt.Errorf("awaiting the monitor's greeting: %w", ctx.Err())
	}
	if err := c.Execute(ctx, "qmp_capabilities", nil, nil); err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

func withDefault(ctx context.Context) (context.Context, context.CancelFunc) {
	if _, ok := ctx.Deadline(); ok {
		return context.WithCancel(ctx)
	}
	return context.WithTimeout(ctx, DefaultTimeout)
}

// Version is the version of the QEMU behind the monitor.
func (c *Client) Version() Version { return c.greeting.Version }

// Events delivers events in their order and is closed with the connection. A
// reader that falls far behind loses the oldest ones.
func (c *Client) Events() <-chan Event { return c.events }

// Done is closed when the connection has ended.
func (c *Client) Done() <-chan struct{} { return c.done }

// Close ends the connection. QEMU goes on.
func (c *Client) Close() error {
	err := c.conn.Close()
	<-c.done
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// Execute runs a command and decodes what it returns into result, unless that is
// nil. args is encoded as JSON; nil means no arguments. A refusal is an *Error.
// When ctx ends first the command may still take effect, and its late answer is
// dropped. A context without a deadline gets DefaultTimeout.
func (c *Client) Execute(ctx context.Context, command string, args, result any) error {
	return c.execute(ctx, command, args, nil, result)
}

// SendFile gives QEMU a duplicate of f, which later commands can name as
// "fd:NAME" or by the plain name. The connection must be a unix socket.
func (c *Client) SendFile(ctx context.Context, name string, f *os.File) error {
	return c.execute(ctx, "getfd", map[string]string{"fdname": name}, f, nil)
}

func (c *Client) execute(ctx context.Context, command string, args any, f *os.File, result any) error {
	ctx, cancel := withDefault(ctx)
	defer cancel()
	fail := func(err error) error { return fmt.Errorf("monitor command %s: %w", command, err) }

	answer := make(chan Reply, 1)
	c.mu.Lock()
	c.lastID++
	id := c.tag + strconv.FormatUint(c.lastID, 10)
	c.pending[id] = answer
	c.mu.Unlock()
	defer func() {
		c.mu.Lock()
		delete(c.pending, id)
		c.mu.Unlock()
	}()

	line, err := json.Marshal(struct {
		Execute   string `json:"execute"`
		Arguments any    `json:"arguments,omitempty"`
		ID        string `json:"id"`
	}{command, args, id})
	if err != nil {
		return fail(err)
	}
	if err := c.send(ctx, append(line, '\n'), f); err != nil {
		select {
		case <-c.done:
			return fail(c.reason())
		default:
			return fail(err)
		}
	}
	select {
	case r := <-answer:
		return c.finish(r, result, fail)
	case <-ctx.Done():
		return fail(ctx.Err())
	case <-c.done:
		// "quit" is answered and the connection closed in one breath.
		select {
		case r := <-answer:
			return c.finish(r, result, fail)
		default:
			return fail(c.reason())
		}
	}
}

func (c *Client) finish(r Reply, result any, fail func(error) error) error {
	if r.Err != nil {
		return fail(r.Err)
	}
	if result == nil {
		return nil
	}
	if err := json.Unmarshal(r.Return, result); err != nil {
		return fail(fmt.Errorf("decoding its answer: %w", err))
	}
	return nil
}

// send writes one whole line, with f attached to its first byte. A line cut
// short by ctx would garble all later ones, so that ends the connection.
func (c *Client) send(ctx context.Context, line []byte, f *os.File) error {
	c.write.Lock()
	defer c.write.Unlock()
	fired := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		c.conn.SetWriteDeadline(time.Unix(1, 0))
		close(fired)
	})
	defer func() {
		if !stop() {
			<-fired
		}
		c.conn.SetWriteDeadline(time.Time{})
	}()
	if err := ctx.Err(); err != nil {
		return err
	}
	sent := 0
	if f != nil {
		u, ok := c.conn.(*net.UnixConn)
		if !ok {
			return errors.New("passing a file needs a unix socket")
		}
		n, _, err := u.WriteMsgUnix(line, unix.UnixRights(int(f.Fd())), nil)
		if err != nil {
			return err
		}
		if sent = n; sent == len(line) {
			return nil // the peer may have answered and hung up by now
		}
	}
	n, err := c.conn.Write(line[sent:])
	if err == nil {
		return nil
	}
	if sent+n > 0 {
		c.conn.Close()
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return err
}

// read runs until the connection ends.
func (c *Client) read(greeted chan<- struct{}) {
	defer close(c.events)
	defer close(c.done)
	s := bufio.NewScanner(c.conn)
	s.Buffer(make([]byte, 0, 4096), maxMessage)
	first := true
	for s.Scan() {
		m, err := ParseMessage(s.Bytes())
		if err != nil {
			c.end(err)
			return
		}
		switch {
		case m.Greeting != nil && first:
			c.greeting = *m.Greeting
			first = false
			close(greeted)
		case first:
			// An answer to a client before this one, who did not wait for it.
		case m.Event != nil:
			c.deliver(*m.Event)
		case m.Reply != nil:
			c.mu.Lock()
			if answer, ok := c.pending[m.Reply.ID]; ok {
				delete(c.pending, m.Reply.ID)
				answer <- *m.Reply // has room for the only one
			}
			c.mu.Unlock()
		}
	}
	err := s.Err()
	if err == nil || errors.Is(err, net.ErrClosed) || errors.Is(err, io.ErrClosedPipe) || errors.Is(err, unix.ECONNRESET) {
		err = ErrClosed
	}
	c.end(err)
}

// deliver never blocks: a client that ignores events still gets its answers.
func (c *Client) deliver(e Event) {
	for {
		select {
		case c.events <- e:
			return
		default:
		}
		select {
		case <-c.events:
		default:
		}
	}
}

func (c *Client) end(err error) {
	c.mu.Lock()
	c.err = err
	c.mu.Unlock()
	c.conn.Close()
}

func (c *Client) reason() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}
