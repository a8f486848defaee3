// SPDX-License-Identifier: Apache-2.0

package libvirt

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	golibvirt "github.com/digitalocean/go-libvirt"
	"github.com/digitalocean/go-libvirt/socket"
	"golang.org/x/sys/unix"
)

// libvirt's streams carry what somebody on the daemon's host would read and write at a
// socket or a file there. go-libvirt reads from a channel and cannot write to one,
// so what is written is put on the wire here (libvirt's internals, "RPC protocol":
// https://libvirt.org/kbase/internals/rpc.html). Each stream has a connection of its
// own: one that is not read must not hold up the others.

// headerSize is the length of a packet's header with the word before it that says how
// long the packet is.
const headerSize = 28

// header is a packet's: the words, big-endian, that follow the length.
type header struct {
	length, program, version, procedure, kind, serial, status uint32
}

func readHeader(b *[headerSize]byte) (h header) {
	for i, word := range []*uint32{&h.length, &h.program, &h.version, &h.procedure, &h.kind, &h.serial, &h.status} {
		*word = binary.BigEndian.Uint32(b[4*i:])
	}
	return h
}

func (h header) append(b []byte) []byte {
	for _, word := range []uint32{h.length, h.program, h.version, h.procedure, h.kind, h.serial, h.status} {
		b = binary.BigEndian.AppendUint32(b, word)
	}
	return b
}

// frames finds the headers in a run of packets that comes in pieces.
type frames struct {
	head [headerSize]byte
	have int
	left uint32 // of the packet whose header was seen last
	seen func(header)
}

func (f *frames) feed(b []byte) {
	for len(b) > 0 {
		if f.left > 0 {
			n := min(int64(f.left), int64(len(b)))
			f.left -= uint32(n)
			b = b[n:]
			continue
		}
		n := copy(f.head[f.have:], b)
		b = b[n:]
		if f.have += n; f.have == headerSize {
			h := readHeader(&f.head)
			f.have, f.left = 0, max(h.length, headerSize)-headerSize
			f.seen(h)
		}
	}
}

// tap is a connection to the daemon that knows which call opened a stream on it.
type tap struct {
	net.Conn
	procedure uint32 // of the call that opens the stream

	mu     sync.Mutex // guards what follows, and writes
	call   header     // that opened the stream; its serial is 0 before
	opened chan struct{}
	once   sync.Once

	out, in frames
}

func newTap(c net.Conn, procedure uint32) *tap {
	t := &tap{Conn: c, procedure: procedure, opened: make(chan struct{})}
	t.out.seen = func(h header) {
		if h.kind == socket.Call && h.procedure == procedure {
			t.call = h
		}
	}
	t.in.seen = func(h header) {
		t.mu.Lock()
		defer t.mu.Unlock()
		if h.kind == socket.Reply && h.serial == t.call.serial && h.procedure == procedure && h.status == socket.StatusOK {
			t.once.Do(func() { close(t.opened) })
		}
	}
	return t
}

func (t *tap) Read(b []byte) (int, error) {
	n, err := t.Conn.Read(b)
	t.in.feed(b[:n])
	return n, err
}

func (t *tap) Write(b []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.out.feed(b)
	return t.Conn.Write(b)
}

// send puts a packet of the stream on the wire; an empty one of StatusOK ends it.
func (t *tap) send(data []byte, status uint32) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	h := t.call
	h.kind, h.status, h.length = socket.Stream, status, uint32(headerSize+len(data))
	_, err := t.Conn.Write(append(h.append(make([]byte, 0, h.length)), data...))
	return err
}

// The procedures that open a stream in both directions (remote_protocol.x).
const (
	procOpenConsole = 201
	procOpenChannel = 296
)

// stream has open, which makes the call of that procedure with in for what comes, run
// on a connection of its own, and returns once the daemon has opened the stream.
func (k *link) stream(ctx context.Context, procedure uint32, open func(l *golibvirt.Libvirt, in io.Writer) error) (*stream, error) {
	var t *tap
	c, err := k.open(ctx, false, func(raw net.Conn) net.Conn {
		t = newTap(raw, procedure)
		return t
	})
	if err != nil {
		return nil, err
	}
	near, far, err := pair()
	if err != nil {
		c.wire.Close()
		return nil, err
	}
	ended := make(chan error, 1)
	go func() { ended <- open(c.Libvirt, &deaf{w: far}) }()
	limit := time.NewTimer(k.hung)
	defer limit.Stop()
	select {
	case <-t.opened:
		s := &stream{UnixConn: near, wire: c.wire, over: make(chan struct{})}
		go s.pump(far, t)
		go s.await(far, ended)
		return s, nil
	case err = <-ended:
		switch {
		case err == nil:
			err = errors.New("libvirt ended the stream at once")
		case broken(err):
			err = &errLost{k.where()}
		}
	case <-ctx.Done():
		err = ctx.Err()
	case <-limit.C:
		err = &errHung{where: k.where(), limit: k.hung}
	}
	c.wire.Close()
	near.Close()
	far.Close()
	return nil, err
}

// pair returns two ends of a connection within this process.
func pair() (near, far *net.UnixConn, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, nil, os.NewSyscallError("socketpair", err)
	}
	var ends [2]*net.UnixConn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "stream")
		c, e := net.FileConn(f)
		f.Close()
		if u, ok := c.(*net.UnixConn); ok {
			ends[i] = u
		} else if err == nil {
			err = fmt.Errorf("making a connection: %w", e)
		}
	}
	if err != nil {
		for _, c := range ends {
			if c != nil {
				c.Close()
			}
		}
		return nil, nil, err
	}
	return ends[0], ends[1], nil
}

// stream is the near end of a stream of the daemon's.
type stream struct {
	*net.UnixConn
	wire *wire
	over chan struct{} // closed when the stream has ended on both sides
}

// finishTime is how long the daemon may take to say that it has passed on the last of
// what was written.
const finishTime = 2 * time.Second

// Close waits until what was written has arrived.
func (s *stream) Close() error {
	err := s.UnixConn.Close()
	t := time.NewTimer(finishTime)
	defer t.Stop()
	select {
	case <-s.over:
	case <-t.C:
		s.wire.Close()
	}
	return err
}

// terminal is a stream to a pseudo-terminal of QEMU's, which looks once a second whether
// there is somebody at it (QEMU's chardev/char-pty.c). What was written to it is lost if
// there is nobody by then.
type terminal struct {
	*stream
	opened  time.Time
	written atomic.Bool
	noticed atomic.Bool // something came, so QEMU knows
}

// noticeTerminal is how long QEMU may take to look.
const noticeTerminal = 2 * time.Second

func (t *terminal) Read(b []byte) (int, error) {
	n, err := t.stream.Read(b)
	if n > 0 {
		t.noticed.Store(true)
	}
	return n, err
}

func (t *terminal) Write(b []byte) (int, error) {
	t.written.Store(true)
	return t.stream.Write(b)
}

// Close waits until what was written was read.
func (t *terminal) Close() error {
	if t.written.Load() && !t.noticed.Load() {
		wait := time.NewTimer(time.Until(t.opened.Add(noticeTerminal)))
		defer wait.Stop()
		select {
		case <-wait.C:
		case <-t.over:
		}
	}
	return t.stream.Close()
}

// pump sends what is written to the near end.
func (s *stream) pump(far net.Conn, t *tap) {
	buf := make([]byte, 64<<10)
	for {
		n, err := far.Read(buf)
		if n > 0 && t.send(buf[:n], socket.StatusContinue) != nil {
			return // the other direction has ended as well
		}
		if err != nil {
			t.send(nil, socket.StatusOK) // if it fails the stream has ended anyway
			return
		}
	}
}

// await ends the near end when the daemon has ended the stream.
func (s *stream) await(far *net.UnixConn, ended <-chan error) {
	<-ended // why does not matter: it is over
	far.Close()
	s.wire.Close()
	close(s.over)
}

// deaf drops what comes once nobody listens any more, so that what is still to be sent
// the other way is.
type deaf struct {
	w      io.Writer
	closed bool
}

func (d *deaf) Write(b []byte) (int, error) {
	if !d.closed {
		_, err := d.w.Write(b)
		d.closed = err != nil
	}
	return len(b), nil
}

// apart runs f on a connection of its own, which ends with ctx. What f writes to is the
// caller's again when apart returns.
func (k *link) apart(ctx context.Context, f func(*golibvirt.Libvirt) error) error {
	c, err := k.open(ctx, false, nil)
	if err != nil {
		return err
	}
	done := make(chan error, 1)
	go func() {
		done <- f(c.Libvirt)
		close(done)
	}()
	err = k.watch(ctx, c, done)
	c.wire.Close()
	for range done {
	}
	return err
}
