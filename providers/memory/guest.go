// SPDX-License-Identifier: Apache-2.0

package memory

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/providers"
)

// Program is what a machine runs. It ends when ctx does, which is the machine's
// power. Returning nil powers the machine off, an error is a kernel panic.
type Program func(ctx context.Context, g *Guest) error

// Guest is what a program sees of its machine. It is also the console: Write
// prints, Read gets what is typed.
type Guest struct {
	Spec providers.Spec

	ctx    context.Context
	off    context.CancelFunc
	gone   chan struct{} // closed when the machine has ended
	exit   providers.Exit
	since  time.Time
	paused bool // guarded by Provider.mu

	isolated bool // likewise

	wrote func(lab.Bytes) // notes what is written to the disk

	button  chan struct{} // closed when the power button is pressed
	press   func()
	console *log
	typed   *io.PipeReader
	keys    *io.PipeWriter
	nic     *plug
	agent   *plug

	mu    sync.Mutex
	ports map[uint16]*plug
	conns []net.Conn
}

func newGuest(spec providers.Spec, console *log) *Guest {
	g := &Guest{
		Spec: spec, since: time.Now(), console: console,
		gone: make(chan struct{}), button: make(chan struct{}),
		nic: newPlug(), agent: newPlug(), ports: map[uint16]*plug{},
	}
	g.ctx, g.off = context.WithCancel(context.Background())
	g.press = sync.OnceFunc(func() { close(g.button) })
	g.typed, g.keys = io.Pipe()
	return g
}

// PowerButton is closed when the host asks the guest to shut down.
func (g *Guest) PowerButton() <-chan struct{} { return g.button }

func (g *Guest) pressed() bool {
	select {
	case <-g.button:
		return true
	default:
		return false
	}
}

// WriteDisk writes n bytes to the machine's disk, as far as Inspect tells: the
// bytes are counted, not kept.
func (g *Guest) WriteDisk(n lab.Bytes) { g.wrote(n) }

// Write prints on the console and into its log.
func (g *Guest) Write(b []byte) (int, error) { return g.console.Write(b) }

// Read returns what was typed at the console, io.EOF when the power is gone.
func (g *Guest) Read(b []byte) (int, error) { return g.typed.Read(b) }

// AcceptNIC waits until the cable is plugged in and returns the guest's end.
func (g *Guest) AcceptNIC() (net.Conn, error) { return g.nic.accept(g) }

// AcceptAgent waits until the host opens the agent's port and returns the
// guest's end.
func (g *Guest) AcceptAgent() (net.Conn, error) { return g.agent.accept(g) }

// Listen opens a TCP port, for as long as the machine runs.
func (g *Guest) Listen(port uint16) (net.Listener, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.ports[port] != nil {
		return nil, fmt.Errorf("listening on port %d: address already in use", port)
	}
	g.ports[port] = newPlug()
	return &listener{g: g, port: port, plug: g.ports[port]}, nil
}

func (g *Guest) listener(port uint16) *plug {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.ports[port]
}

// shut cuts the power: everything that was open ends.
func (g *Guest) shut() {
	g.off()
	g.typed.CloseWithError(io.EOF)
	g.keys.CloseWithError(io.EOF)
	g.console.end()
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, c := range g.conns {
		c.Close()
	}
	g.conns = nil
	close(g.gone)
}

// keep remembers the connection, to end it with the machine.
func (g *Guest) keep(c net.Conn) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.ctx.Err() != nil {
		c.Close()
		return providers.ErrNotRunning
	}
	g.conns = append(g.conns, c)
	return nil
}

// plug is a place to connect to. One connection waits at most.
type plug struct {
	waiting chan net.Conn
	closed  chan struct{}
}

func newPlug() *plug {
	return &plug{waiting: make(chan net.Conn, 1), closed: make(chan struct{})}
}

func (p *plug) dial(ctx context.Context, g *Guest) (net.Conn, error) {
	host, guest := net.Pipe()
	if err := errors.Join(g.keep(host), g.keep(guest)); err != nil {
		return nil, err
	}
	for {
		select {
		case p.waiting <- guest:
			return host, nil
		case <-p.closed:
			return nil, errors.New("connection refused")
		case <-g.ctx.Done():
			return nil, providers.ErrNotRunning
		case <-ctx.Done():
			return nil, ctx.Err()
		case old := <-p.waiting:
			// Nobody took it, and its other end may have hung up long ago.
			old.Close()
		}
	}
}

func (p *plug) accept(g *Guest) (net.Conn, error) {
	select {
	case c := <-p.waiting:
		return c, nil
	case <-p.closed:
		return nil, net.ErrClosed
	case <-g.ctx.Done():
		return nil, net.ErrClosed
	}
}

// listener is a guest's TCP port.
type listener struct {
	g    *Guest
	port uint16
	plug *plug
	once sync.Once
}

func (l *listener) Accept() (net.Conn, error) { return l.plug.accept(l.g) }

func (l *listener) Addr() net.Addr { return &net.TCPAddr{Port: int(l.port)} }

func (l *listener) Close() error {
	l.once.Do(func() {
		l.g.mu.Lock()
		defer l.g.mu.Unlock()
		delete(l.g.ports, l.port)
		close(l.plug.closed)
	})
	return nil
}
