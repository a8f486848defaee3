// SPDX-License-Identifier: Apache-2.0

package channel

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/yamux"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const deadline = time.Minute

func testContext(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), deadline)
	t.Cleanup(cancel)
	return ctx
}

// serial is a serial port as bad as they come: two queues of bytes that survive
// whoever reads and writes them. Neither end learns that the other went away.
type serial struct{ toGuest, toHost *queue }

func newSerial() *serial { return &serial{newQueue(), newQueue()} }

func (s *serial) host() *end { return &end{in: s.toHost, out: s.toGuest, done: make(chan struct{})} }

func (s *serial) guest() *end { return &end{in: s.toGuest, out: s.toHost, done: make(chan struct{})} }

// queue holds a bounded number of bytes.
type queue struct {
	mu      sync.Mutex
	buf     []byte
	changed chan struct{}
}

const queueSize = 100_000

func newQueue() *queue { return &queue{changed: make(chan struct{})} }

func (q *queue) wake() {
	close(q.changed)
	q.changed = make(chan struct{})
}

type end struct {
	in, out *queue
	once    sync.Once
	done    chan struct{}
}

func (e *end) Close() error {
	e.once.Do(func() { close(e.done) })
	return nil
}

func (e *end) Read(p []byte) (int, error) {
	for {
		e.in.mu.Lock()
		select {
		case <-e.done:
			e.in.mu.Unlock()
			return 0, net.ErrClosed
		default:
		}
		if len(e.in.buf) > 0 {
			n := copy(p[:min(len(p), 4096)], e.in.buf)
			e.in.buf = e.in.buf[n:]
			e.in.wake()
			e.in.mu.Unlock()
			return n, nil
		}
		ch := e.in.changed
		e.in.mu.Unlock()
		select {
		case <-ch:
		case <-e.done:
		}
	}
}

func (e *end) Write(p []byte) (n int, err error) {
	for n < len(p) {
		e.out.mu.Lock()
		select {
		case <-e.done:
			e.out.mu.Unlock()
			return n, net.ErrClosed
		default:
		}
		if room := queueSize - len(e.out.buf); room > 0 {
			m := min(room, len(p)-n)
			e.out.buf = append(e.out.buf, p[n:n+m]...)
			n += m
			e.out.wake()
			e.out.mu.Unlock()
			continue
		}
		ch := e.out.changed
		e.out.mu.Unlock()
		select {
		case <-ch:
		case <-e.done:
		}
	}
	return n, nil
}

// serveEcho runs a guest that echoes every stream, until stop is called.
func serveEcho(t *testing.T, port io.ReadWriteCloser) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		_ = Serve(ctx, port, func(c net.Conn) {
			defer c.Close()
			_, _ = io.Copy(c, c)
		})
	})
	stop = sync.OnceFunc(func() { cancel(); wg.Wait() })
	t.Cleanup(stop)
	return stop
}

func connect(t *testing.T, conn io.ReadWriteCloser) *Session {
	t.Helper()
	s, err := Client(testContext(t), conn)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// echo sends text over a new stream and wants it back.
func echo(t *testing.T, s *Session, text []byte) {
	t.Helper()
	c, err := s.Open(testContext(t))
	if err != nil {
		t.Error(err)
		return
	}
	defer c.Close()
	go func() {
		_, _ = c.Write(text)
		c.(interface{ CloseWrite() error }).CloseWrite()
	}()
	got, err := io.ReadAll(c)
	if err != nil || !bytes.Equal(got, text) {
		t.Errorf("echo of %d bytes: got %d bytes, error %v", len(text), len(got), err)
	}
}

func wantDone(t *testing.T, s *Session, want error) {
	t.Helper()
	select {
	case <-s.Done():
	case <-time.After(deadline):
		t.Fatal("the session did not end")
	}
	if err := s.Err(); !errors.Is(err, want) {
		t.Errorf("session ended with %v, want %v", err, want)
	}
	if _, err := s.Open(testContext(t)); !errors.Is(err, want) {
		t.Errorf("Open after the end: %v, want %v", err, want)
	}
}

func TestPipe(t *testing.T) {
	host, guest := net.Pipe()
	serveEcho(t, guest)
	s := connect(t, host)
	echo(t, s, []byte("hello"))
	if err := s.Err(); err != nil {
		t.Errorf("Err of a live session: %v", err)
	}
	s.Close()
	wantDone(t, s, ErrClosed)
}

func TestServeEnds(t *testing.T) {
	host, guest := net.Pipe()
	done := make(chan error)
	go func() { done <- Serve(context.Background(), guest, nil) }()
	s := connect(t, host)
	s.Close()
	if err := <-done; err != io.EOF && err != io.ErrClosedPipe {
		t.Errorf("Serve after the host hung up: %v, want EOF", err)
	}
	_, guest = net.Pipe()
	ctx, cancel := context.WithCancelCause(context.Background())
	go func() { done <- Serve(ctx, guest, nil) }()
	cause := errors.New("enough")
	cancel(cause)
	if err := <-done; err != cause {
		t.Errorf("Serve after ctx ended: %v, want %v", err, cause)
	}
}

func TestClientGivesUp(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Millisecond)
	defer cancel()
	_, err := Client(ctx, newSerial().host())
	if err == nil || err.Error() != "waiting for the agent to answer: context deadline exceeded" {
		t.Errorf("got %v", err)
	}
}

func TestClientFirst(t *testing.T) {
	// The host says hello many times before the guest opens its port.
	p := newSerial()
	early := p.host()
	l := newLink(early)
	for range 50 {
		if err := l.send(kindHello); err != nil {
			t.Fatal(err)
		}
	}
	serveEcho(t, p.guest())
	echo(t, connect(t, p.host()), []byte("after all"))
}

func TestManyStreams(t *testing.T) {
	p := newSerial()
	serveEcho(t, p.guest())
	s := connect(t, p.host())
	var wg sync.WaitGroup
	for i := range 1000 {
		wg.Go(func() { echo(t, s, fmt.Appendf(nil, "stream %d", i)) })
	}
	wg.Wait()
}

func TestLargeData(t *testing.T) {
	p := newSerial()
	serveEcho(t, p.guest())
	s := connect(t, p.host())
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			data := make([]byte, 16<<20)
			_, _ = rand.Read(data)
			echo(t, s, data)
		})
	}
	wg.Wait()
}

// flood opens a stream whose data nobody but the guest's echo moves, and keeps
// writing until the session ends, so that frames are cut off in their middle.
func flood(s *Session) (wait func()) {
	c, err := s.Open(context.Background())
	if err != nil {
		return func() {}
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		defer c.Close()
		junk := bytes.Repeat([]byte("\xa7LAB\x01\x00\x00\x00junkjunk"), 5000)
		for {
			if _, err := c.Write(junk); err != nil {
				return
			}
		}
	})
	wg.Go(func() { _, _ = io.Copy(io.Discard, c) })
	return wg.Wait
}

func TestHostKilled(t *testing.T) {
	// The host's end dies in the middle of things, again and again; the guest
	// learns of it by nothing but the successor's hello.
	p := newSerial()
	serveEcho(t, p.guest())
	for i := range 20 {
		s := connect(t, p.host())
		echo(t, s, fmt.Appendf(nil, "incarnation %d", i))
		wait := flood(s)
		echo(t, s, bytes.Repeat([]byte("x"), 100_000))
		s.Close()
		wait()
	}
}

func TestGuestRestarts(t *testing.T) {
	p := newSerial()
	stop := serveEcho(t, p.guest())
	s := connect(t, p.host())
	for i := range 20 {
		wait := flood(s)
		echo(t, s, bytes.Repeat([]byte("x"), 100_000))
		stop()
		stop = serveEcho(t, p.guest())
		select {
		case <-s.Done():
		case <-time.After(deadline):
			t.Fatal("the host did not notice the restart")
		}
		if err := s.Err(); !errors.Is(err, ErrGuestRestarted) && !errors.Is(err, ErrOutOfStep) {
			t.Fatalf("session ended with %v", err)
		}
		wait()
		s = connect(t, p.host())
		echo(t, s, fmt.Appendf(nil, "incarnation %d", i))
	}
}

func TestGuestRestartsQuietly(t *testing.T) {
	p := newSerial()
	stop := serveEcho(t, p.guest())
	s := connect(t, p.host())
	echo(t, s, []byte("x"))
	stop()
	serveEcho(t, p.guest())
	wantDone(t, s, ErrGuestRestarted)
}

func TestGuestMayNotOpenStreams(t *testing.T) {
	p := newSerial()
	guest := p.guest()
	var wg sync.WaitGroup
	wg.Go(func() {
		l := newLink(guest)
		if err := l.await(); err != nil {
			t.Error(err)
			return
		}
		mux, err := yamux.Server(&guestConn{link: l}, config())
		if err != nil {
			t.Error(err)
			return
		}
		if _, err := mux.OpenStream(); err != nil {
			t.Error(err)
		}
		<-mux.CloseChan() // the host hung up
	})
	s := connect(t, p.host())
	wantDone(t, s, ErrIntruding)
	guest.Close()
	wg.Wait()
}

func TestGarbageFirst(t *testing.T) {
	// What is left of a past session, in both directions, cut off anywhere.
	past := frame{kind: kindData, length: 5000, nonce: 7}.appendTo(nil)
	past = append(past, bytes.Repeat([]byte("past"), 1250)...)
	for _, cut := range []int{1, 3, 4, 15, 16, 17, 100, 4999, len(past)} {
		p := newSerial()
		for _, q := range []*queue{p.toGuest, p.toHost} {
			q.buf = append(q.buf, past...)
			q.buf = append(q.buf, past[:cut]...)
		}
		serveEcho(t, p.guest())
		echo(t, connect(t, p.host()), fmt.Appendf(nil, "cut at %d", cut))
	}
}

func TestGarbageInSession(t *testing.T) {
	p := newSerial()
	serveEcho(t, p.guest())
	s := connect(t, p.host())
	echo(t, s, []byte("x"))
	p.toHost.mu.Lock()
	p.toHost.buf = append(p.toHost.buf, bytes.Repeat([]byte("noise"), 10)...)
	p.toHost.wake()
	p.toHost.mu.Unlock()
	wantDone(t, s, ErrOutOfStep)

	s = connect(t, p.host())
	echo(t, s, []byte("y"))
	p.toGuest.mu.Lock()
	p.toGuest.buf = append(p.toGuest.buf, bytes.Repeat([]byte("noise"), 10)...)
	p.toGuest.wake()
	p.toGuest.mu.Unlock()
	// The guest waits for the next session and drops what comes before it.
	s.Close()
	echo(t, connect(t, p.host()), []byte("z"))
}

func TestStreamCloseEndsReads(t *testing.T) {
	p := newSerial()
	serveEcho(t, p.guest())
	s := connect(t, p.host())
	c, err := s.Open(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error)
	go func() {
		_, err := c.Read(make([]byte, 1))
		done <- err
	}()
	c.Close()
	select {
	case err := <-done:
		if err == nil {
			t.Error("Read of a closed stream succeeded")
		}
	case <-time.After(deadline):
		t.Fatal("Close did not end the read")
	}
}

// A guest that is paused takes no bytes, and nobody knows when it will.
func TestStreamCloseEndsReadsOfStalledGuest(t *testing.T) {
	p := newSerial()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	guest, host := p.guest(), p.host()
	go func() { _ = Serve(ctx, guest, func(c net.Conn) { <-ctx.Done() }) }()
	s := connect(t, host)
	defer s.Close()
	c, err := s.Open(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Write([]byte("!")); err != nil {
		t.Fatal(err)
	}
	guest.Close() // reads no more, of which the host does not learn
	p.toGuest.mu.Lock()
	p.toGuest.buf = make([]byte, queueSize) // no room any more
	p.toGuest.mu.Unlock()
	read, closed := make(chan error, 1), make(chan struct{})
	go func() {
		_, err := c.Read(make([]byte, 1))
		read <- err
	}()
	go func() {
		defer close(closed)
		c.Close()
	}()
	select {
	case <-read:
	case <-time.After(10 * time.Second):
		t.Error("Close did not end the read")
	}
	s.Close()
	<-closed
}

func TestStreamsEndWithSession(t *testing.T) {
	p := newSerial()
	ended := make(chan error, 1)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var wg sync.WaitGroup
	wg.Go(func() {
		_ = Serve(ctx, p.guest(), func(c net.Conn) {
			defer c.Close()
			_, _ = c.Write([]byte("!"))
			_, err := io.Copy(io.Discard, c)
			ended <- err
		})
	})
	s := connect(t, p.host())
	c, err := s.Open(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	s.Close()
	s = connect(t, p.host())
	select {
	case <-ended:
	case <-time.After(deadline):
		t.Fatal("the guest's stream outlived its session")
	}
	s.Close()
	cancel()
	wg.Wait()
}

func FuzzFrames(f *testing.F) {
	data := append(frame{kind: kindData, length: 3, nonce: 1}.appendTo(nil), "abc"...)
	hello := frame{kind: kindHello, nonce: 2}.appendTo(nil)
	f.Add(data)
	f.Add(append(append([]byte{0, 0, 9}, data[:18]...), hello...))
	f.Add(bytes.Repeat([]byte(magic), 20))
	f.Fuzz(func(t *testing.T, junk []byte) {
		// Whatever came before, padding and a hello are understood.
		in := append(append(bytes.Clone(junk), make([]byte, maxFrame)...), hello...)
		var out bytes.Buffer
		l := newLink(struct {
			io.Reader
			io.Writer
			io.Closer
		}{bytes.NewReader(in), &out, io.NopCloser(nil)})
		for l.nonce != 2 {
			if err := l.await(); err != nil {
				t.Fatalf("hello was lost: %v", err)
			}
		}
		want := frame{kind: kindWelcome, nonce: 2}.appendTo(nil)
		if !bytes.HasSuffix(out.Bytes(), want) {
			t.Fatalf("answered with %x, want %x", out.Bytes(), want)
		}
	})
}

func BenchmarkThroughput(b *testing.B) {
	host, guest := net.Pipe()
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		_ = Serve(ctx, guest, func(c net.Conn) {
			h := sha256.New()
			_, _ = io.Copy(h, c)
			_, _ = c.Write(h.Sum(nil))
			c.Close()
		})
	})
	defer wg.Wait()
	defer cancel()
	s, err := Client(ctx, host)
	if err != nil {
		b.Fatal(err)
	}
	c, err := s.Open(ctx)
	if err != nil {
		b.Fatal(err)
	}
	chunk := make([]byte, 32<<10)
	b.SetBytes(int64(len(chunk)))
	for b.Loop() {
		if _, err := c.Write(chunk); err != nil {
			b.Fatal(err)
		}
	}
	c.Close()
	s.Close()
}
