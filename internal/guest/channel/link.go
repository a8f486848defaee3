// SPDX-License-Identifier: Apache-2.0

package channel

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"io"
	"sync"
)

// A frame is a header of 16 bytes and a body:
//
//	0  magic, 4 bytes; the first one is not zero, so that padding never looks like it
//	4  kind, 1 byte
//	5  zero, 1 byte
//	6  length of the body, 2 bytes, big-endian
//	8  nonce of the session, 8 bytes
//
// Only data has a body. A frame is at most as long as what Linux takes in one write
// to a virtio-serial port.
const (
	headerLen = 16
	maxFrame  = 32 << 10
	maxBody   = maxFrame - headerLen
)

const magic = "\xa7LAB"

type kind byte

const (
	kindHello   kind = 1 + iota // host: let us begin this session
	kindWelcome                 // guest: it has begun
	kindReset                   // guest: I know of no session
	kindData                    // bytes of the session
)

type frame struct {
	kind   kind
	length int
	nonce  uint64
}

func (f frame) appendTo(b []byte) []byte {
	b = append(b, magic...)
	b = append(b, byte(f.kind), 0)
	b = binary.BigEndian.AppendUint16(b, uint16(f.length))
	return binary.BigEndian.AppendUint64(b, f.nonce)
}

// parse reads a header; ok is false if b does not begin with a sound one.
func parse(b []byte) (f frame, ok bool) {
	if len(b) < headerLen || string(b[:4]) != magic || b[5] != 0 {
		return frame{}, false
	}
	f = frame{kind: kind(b[4]), length: int(binary.BigEndian.Uint16(b[6:])), nonce: binary.BigEndian.Uint64(b[8:])}
	switch f.kind {
	case kindData:
		ok = f.length > 0 && f.length <= maxBody
	case kindHello, kindWelcome, kindReset:
		ok = f.length == 0
	}
	return f, ok
}

// link reads and writes frames. One goroutine may read while another writes.
type link struct {
	port  io.ReadWriteCloser
	in    *bufio.Reader
	nonce uint64

	// The reader's.
	left    int   // of the present data frame
	pending frame // hello that ended a session and begins the next
	fresh   bool  // nothing has been received in this session

	// The writer's.
	wmu  sync.Mutex
	out  []byte
	held int // bytes in out, behind the frame header, that wait for more
}

func newLink(port io.ReadWriteCloser) *link {
	return &link{
		port: port,
		in:   bufio.NewReaderSize(port, maxFrame),
		out:  make([]byte, maxFrame),
	}
}

// next returns the next frame, or the zero frame if it had to skip bytes that are
// not padding; call it again to go on. A frame's body is left to be read from l.in.
func (l *link) next() (frame, error) {
	for {
		b, err := l.in.Peek(headerLen)
		if err != nil {
			return frame{}, err
		}
		if f, ok := parse(b); ok {
			_, err = l.in.Discard(headerLen)
			return f, err
		}
		// Skip to the next byte that may begin a header. Only what is
		// buffered is looked at, so that a short tail never blocks.
		b, _ = l.in.Peek(l.in.Buffered())
		n := bytes.IndexByte(b[1:], magic[0]) + 1
		if n == 0 {
			n = len(b)
		}
		junk := n > bytes.Count(b[:n], []byte{0})
		if _, err := l.in.Discard(n); err != nil || junk {
			return frame{}, err
		}
	}
}

func (l *link) drop(n int) error {
	_, err := l.in.Discard(n)
	return err
}

// read fills p from the present data frame.
func (l *link) read(p []byte) (int, error) {
	if len(p) > l.left {
		p = p[:l.left]
	}
	n, err := l.in.Read(p)
	l.left -= n
	return n, err
}

// send writes a frame without a body.
func (l *link) send(k kind) error {
	l.wmu.Lock()
	defer l.wmu.Unlock()
	_, err := l.port.Write(frame{kind: k, nonce: l.nonce}.appendTo(nil))
	return err
}

// pad fills up whatever frame the other side may still be waiting for the end of.
func (l *link) pad() error {
	l.wmu.Lock()
	defer l.wmu.Unlock()
	_, err := l.port.Write(make([]byte, maxFrame))
	return err
}

// write sends p as data. A yamux header that announces a body (version 0, type 0,
// a length) is held back until the body comes, a moment later, so that both make one
// write to the port: under emulation each one costs.
func (l *link) write(p []byte) (int, error) {
	l.wmu.Lock()
	defer l.wmu.Unlock()
	const yamuxHeader = 12
	if l.held == 0 && len(p) == yamuxHeader && p[0] == 0 && p[1] == 0 && binary.BigEndian.Uint32(p[8:]) != 0 {
		l.held = copy(l.out[headerLen:], p)
		return len(p), nil
	}
	done := 0
	for done < len(p) {
		n := copy(l.out[headerLen+l.held:], p[done:])
		f := frame{kind: kindData, length: l.held + n, nonce: l.nonce}
		f.appendTo(l.out[:0])
		l.held = 0
		if _, err := l.port.Write(l.out[:headerLen+f.length]); err != nil {
			return done, err
		}
		done += n
	}
	return done, nil
}

// failed remembers the error that ended a connection's reads.
type failed struct {
	mu  sync.Mutex
	err error
}

func (f *failed) set(err error) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.err == nil {
		f.err = err
	}
	return err
}

func (f *failed) failure() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.err
}

// hostConn is a session's bytes at the host.
type hostConn struct {
	*link
	failed
}

func (c *hostConn) Read(p []byte) (int, error) {
	for c.left == 0 {
		f, err := c.next()
		switch {
		case err != nil:
			return 0, c.set(err)
		case f.kind == 0:
			return 0, c.set(ErrOutOfStep)
		case f.kind == kindReset:
			return 0, c.set(ErrGuestRestarted)
		case f.kind == kindData && f.nonce == c.nonce:
			c.left = f.length
		case f.kind == kindData:
			if err := c.drop(f.length); err != nil {
				return 0, c.set(err)
			}
		}
	}
	n, err := c.read(p)
	if err != nil {
		return n, c.set(err)
	}
	return n, nil
}

func (c *hostConn) Write(p []byte) (int, error) { return c.write(p) }

func (c *hostConn) Close() error {
	_ = c.set(ErrClosed)
	return c.port.Close()
}

// guestConn is a session's bytes at the guest.
type guestConn struct {
	*link
	failed
}

func (c *guestConn) Read(p []byte) (int, error) {
	for c.left == 0 {
		f, err := c.next()
		switch {
		case err != nil:
			return 0, c.set(err)
		case f.kind == kindHello && f.nonce == c.nonce:
			// The host repeated itself before it saw the welcome.
			if c.fresh {
				if err := c.send(kindWelcome); err != nil {
					return 0, c.set(err)
				}
			}
		case f.kind == kindHello:
			c.pending = f
			return 0, c.set(errSuperseded)
		case f.kind == 0:
			return 0, c.set(ErrOutOfStep)
		case f.kind == kindData && f.nonce == c.nonce:
			c.left, c.fresh = f.length, false
		case f.kind == kindData:
			if err := c.drop(f.length); err != nil {
				return 0, c.set(err)
			}
		}
	}
	n, err := c.read(p)
	if err != nil {
		return n, c.set(err)
	}
	return n, nil
}

func (c *guestConn) Write(p []byte) (int, error) {
	n, err := c.write(p)
	if err != nil {
		_ = c.set(err)
	}
	return n, err
}

// Close leaves the port open when reading ended with a new session, which uses it;
// otherwise closing it is what ends reading.
func (c *guestConn) Close() error {
	switch c.set(ErrClosed); c.failure() {
	case errSuperseded, ErrOutOfStep:
		return nil
	}
	return c.port.Close()
}
