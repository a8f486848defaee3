// SPDX-License-Identifier: Apache-2.0

// Package channel turns the byte stream of a virtio-serial port into a session
// of many streams between the host and lab-agent, and finds its feet again when
// either end starts anew.
//
// A serial port has no connections: when one end dies, the other is not told for
// certain, and what the dead end had written is still under way. So every chunk of
// bytes is a frame that names its session by a nonce. The host begins a session by
// sending hello until the guest answers with welcome; whatever else arrives
// meanwhile belongs to the past and is dropped. A guest that starts says reset,
// which ends a session the host believed in. A frame that was cut off by a death
// would swallow the frames behind it, so each end may send padding, as long as the
// longest frame, that fills it up. Inside the frames runs yamux.
package channel

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"github.com/hashicorp/yamux"
)

// Errors that end a session.
var (
	// ErrGuestRestarted says that the agent began anew and knows nothing of the
	// session.
	ErrGuestRestarted = errors.New("the agent in the guest started anew")
	// ErrOutOfStep says that bytes arrived which belong to no frame.
	ErrOutOfStep = errors.New("the channel to the guest is out of step")
	// ErrIntruding says that the agent opened a stream, which only the host does.
	ErrIntruding = errors.New("the agent in the guest opened a stream of its own")
	// ErrClosed says that the session was closed on this side.
	ErrClosed = errors.New("the channel to the guest is closed")

	errSuperseded = errors.New("the host began a new session")
)

// Hello is repeated, because a guest that opens its port late throws away what
// came before. The first repetition carries padding.
const (
	helloFirst = 250 * time.Millisecond
	helloMost  = 2 * time.Second
)

// A stalled guest is not a dead one: a paused machine may go on hours later, and
// whoever runs the channel learns of its death from the provider. So nothing here
// ends a session for being slow.
const patience = 24 * time.Hour

func config() *yamux.Config {
	return &yamux.Config{
		AcceptBacklog:          256,
		EnableKeepAlive:        false,
		KeepAliveInterval:      patience, // unused, but must be positive
		ConnectionWriteTimeout: patience,
		MaxStreamWindowSize:    1 << 20,
		StreamOpenTimeout:      0,
		StreamCloseTimeout:     time.Minute,
		LogOutput:              io.Discard,
	}
}

// Session is the host's end of a channel.
type Session struct {
	mux  *yamux.Session
	conn *hostConn
}

// Client begins a session over conn, the host's end of the port, and waits until
// the agent answers. Only one Client may use a port at a time; a second one ends
// the session of the first. The session owns conn: Client closes it if it returns
// an error, which is ctx's cause if ctx ended.
func Client(ctx context.Context, conn io.ReadWriteCloser) (*Session, error) {
	l := newLink(conn)
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails: see crypto/rand
	l.nonce = binary.BigEndian.Uint64(b[:])

	stop := context.AfterFunc(ctx, func() { conn.Close() })
	err := l.handshake()
	if !stop() {
		err = context.Cause(ctx)
	}
	if err != nil {
		conn.Close()
		return nil, fmt.Errorf("waiting for the agent to answer: %w", err)
	}
	hc := &hostConn{link: l}
	mux, err := yamux.Client(hc, config())
	if err != nil {
		conn.Close()
		return nil, fmt.Errorf("starting the session: %w", err)
	}
	go refuse(mux, hc)
	return &Session{mux: mux, conn: hc}, nil
}

// refuse ends the session at the first stream that the guest opens: nobody would
// read it, so its bytes would only fill the host's memory.
func refuse(mux *yamux.Session, hc *hostConn) {
	if _, err := mux.AcceptStream(); err == nil {
		_ = hc.set(ErrIntruding)
		mux.Close()
	}
}

// handshake says hello until welcome arrives.
func (l *link) handshake() error {
	var (
		done  = make(chan struct{})
		again = make(chan struct{}, 1) // the guest has just started: no need to wait
		wg    sync.WaitGroup
	)
	wg.Go(func() {
		wait := helloFirst
		for n := 0; ; n++ {
			// A write error shows up at the reader as well.
			if n == 1 {
				_ = l.pad()
			}
			_ = l.send(kindHello)
			t := time.NewTimer(wait)
			select {
			case <-done:
				t.Stop()
				return
			case <-again:
				t.Stop()
			case <-t.C:
				wait = min(2*wait, helloMost)
			}
		}
	})
	defer wg.Wait()
	defer close(done)
	for {
		f, err := l.next()
		if err != nil {
			return err
		}
		switch {
		case f.kind == kindWelcome && f.nonce == l.nonce:
			return nil
		case f.kind == kindReset:
			select {
			case again <- struct{}{}:
			default:
			}
		case f.kind == kindData:
			if err := l.drop(f.length); err != nil {
				return err
			}
		}
	}
}

// Open opens a stream to the agent. Like a TCP connection, the stream may be open
// before the other side has looked at it. Its Close also ends reads under way; it
// has a CloseWrite method that ends one direction only.
func (s *Session) Open(ctx context.Context) (net.Conn, error) {
	type opened struct {
		st  *yamux.Stream
		err error
	}
	ch := make(chan opened, 1)
	go func() {
		st, err := s.mux.OpenStream()
		ch <- opened{st, err}
	}()
	select {
	case o := <-ch:
		if o.err != nil {
			return nil, fmt.Errorf("opening a stream to the agent: %w", s.reason(o.err))
		}
		return &stream{o.st}, nil
	case <-ctx.Done():
		go func() {
			if o := <-ch; o.err == nil {
				o.st.Close()
			}
		}()
		return nil, fmt.Errorf("opening a stream to the agent: %w", context.Cause(ctx))
	}
}

func (s *Session) reason(err error) error {
	if errors.Is(err, yamux.ErrSessionShutdown) {
		if e := s.Err(); e != nil {
			return e
		}
	}
	return err
}

// Done is closed when the session has ended: because it was closed, the port's
// host end was closed by the hypervisor, or the agent started anew. To go on,
// dial the port again and call Client.
func (s *Session) Done() <-chan struct{} { return s.mux.CloseChan() }

// Err says why the session ended, and is nil as long as it has not.
func (s *Session) Err() error {
	select {
	case <-s.mux.CloseChan():
	default:
		return nil
	}
	if err := s.conn.failure(); err != nil {
		return err
	}
	return ErrClosed
}

// Close ends the session, all its streams and the connection below.
func (s *Session) Close() error { return s.mux.Close() }

// Serve is the guest's end: it serves sessions one after the other over port and
// calls handle, on a goroutine of its own, for every stream the host opens. The
// streams of a session that ended fail. Serve closes port and returns when reading
// from or writing to port fails (a virtio-serial port reads io.EOF when nobody is at
// the other end), or ctx ends; the caller opens the port again. It does not wait
// for handle.
func Serve(ctx context.Context, port io.ReadWriteCloser, handle func(net.Conn)) error {
	stop := context.AfterFunc(ctx, func() { port.Close() })
	defer stop()
	defer port.Close()
	l := newLink(port)
	err := l.serve(handle)
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

func (l *link) serve(handle func(net.Conn)) error {
	if err := l.pad(); err != nil {
		return err
	}
	if err := l.send(kindReset); err != nil {
		return err
	}
	for {
		if err := l.await(); err != nil {
			return err
		}
		gc := &guestConn{link: l}
		mux, err := yamux.Server(gc, config())
		if err != nil {
			return err
		}
		for {
			st, err := mux.AcceptStream()
			if err != nil {
				break
			}
			go handle(&stream{st})
		}
		mux.Close() // returns once neither of its loops uses the link any more
		if err := gc.failure(); !errors.Is(err, errSuperseded) && !errors.Is(err, ErrOutOfStep) {
			return err
		}
	}
}

// await reads until a hello and answers it.
func (l *link) await() error {
	for {
		f := l.pending
		l.pending = frame{}
		if f.kind == 0 {
			var err error
			if f, err = l.next(); err != nil {
				return err
			}
		}
		switch f.kind {
		case kindHello:
			l.nonce, l.fresh, l.left, l.held = f.nonce, true, 0, 0
			return l.send(kindWelcome)
		case kindData:
			if err := l.drop(f.length); err != nil {
				return err
			}
		}
	}
}

// stream gives a yamux stream the manners of a net.Conn: Close ends reads too.
type stream struct{ *yamux.Stream }

// CloseWrite tells the other side that no more will come; reading goes on.
func (s *stream) CloseWrite() error { return s.Stream.Close() }

// Close ends both directions. Reads end first: telling the other side can take as
// long as it does not listen.
func (s *stream) Close() error {
	_ = s.Stream.SetReadDeadline(time.Unix(1, 0))
	return s.Stream.Close()
}
