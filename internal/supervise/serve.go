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
	"time"

	"github.com/labfile/lab/internal/network"
)

// requestTimeout bounds how long a client may take to say what it wants.
const requestTimeout = 10 * time.Second

// serve reads a request from c, carries it out and answers it. Every connection
// has a goroutine of its own, so a client that hangs is alone with that.
func serve(s *supervisor, c net.Conn) {
	conn := &lineConn{Conn: c, r: bufio.NewReader(c)}
	_ = c.SetReadDeadline(time.Now().Add(requestTimeout))
	var q request
	if err := readLine(conn.r, &q); err != nil {
		if !errors.Is(err, io.EOF) {
			answer(c, reply{Error: &wireError{Text: fmt.Sprintf("reading the request: %v", err)}})
		}
		return
	}
	ctx, release := attend(s.ctx, conn)
	r, stream, err := s.do(ctx, q)
	if err != nil {
		r.Error = toWire(err)
	}
	// In this order: whoever ends the supervisor does so by deadlines, which
	// release takes back.
	if here := release(); !here || s.ctx.Err() != nil {
		if stream != nil {
			stream.Close()
		}
		return
	}
	if !answer(c, r) {
		if stream != nil {
			stream.Close()
		}
		return
	}
	switch {
	case stream != nil:
		defer context.AfterFunc(s.ctx, func() { _ = stream.SetDeadline(time.Unix(1, 0)) })()
		network.Pipe(conn, stream)
	case q.Op == opHello && err == nil:
		_, _ = conn.Read(make([]byte, 1)) // until the client lets go
	case q.Op == opShutdown && err == nil:
		s.cancel(errShutdown)
	}
}

var errShutdown = errors.New("a client asked for it")

// answer reports whether the client took the reply.
func answer(c net.Conn, r reply) bool {
	_ = c.SetWriteDeadline(time.Now().Add(requestTimeout))
	err := writeLine(c, r)
	_ = c.SetWriteDeadline(time.Time{})
	return err == nil
}

// do carries out a request. A stream is what the connection carries afterwards.
func (s *supervisor) do(ctx context.Context, q request) (r reply, stream net.Conn, err error) {
	switch q.Op {
	case opHello:
		r.Version, r.PID = s.cfg.Version, os.Getpid()
	case opPlug, opStandby:
		if q.Machine == nil {
			return r, nil, fmt.Errorf("%s needs a machine", q.Op)
		}
		q.Machine.Standby = q.Op == opStandby
		r.Forwards, err = s.plug(ctx, *q.Machine)
	case opUnplug, opPromote, opDrained, opWithdraw, opMount, opAnswer:
		if q.Generation == nil {
			return r, nil, fmt.Errorf("%s needs a generation", q.Op)
		}
		switch g := *q.Generation; q.Op {
		case opUnplug:
			s.unplug(g)
		case opPromote:
			r.Forwards, err = s.promote(ctx, g, q.Forwards, q.Drain)
		case opDrained:
			err = s.drained(ctx, g)
		case opWithdraw:
			err = s.withdraw(g)
		case opMount:
			err = s.mount(ctx, q)
		case opAnswer:
			err = s.answers(ctx, q)
		}
	case opDial:
		stream, err = s.reach(ctx, q, func(m *machine) (net.Conn, error) { return m.connect(ctx, q.Port, nil) })
		return r, stream, err
	case opAgent:
		stream, err = s.reach(ctx, q, func(m *machine) (net.Conn, error) { return m.talk(ctx) })
		return r, stream, err
	case opExpose:
		s.expose(q.Exposed)
	case opAddRelays:
		err = s.addRelays(q.Relays)
	case opReplaceRelays:
		err = s.replaceRelays(q.Relays)
	case opStatus:
		r.Status = s.status()
	case opShutdown:
	default:
		err = errors.New(unknown(s.cfg.Version, q.Op))
	}
	return r, nil, err
}

// attend returns a context that ends when the client hangs up, and release, which
// stops looking and reports whether the client is still there. What the client
// sends meanwhile stays in the buffer.
func attend(parent context.Context, c *lineConn) (ctx context.Context, release func() bool) {
	ctx, cancel := context.WithCancelCause(parent)
	_ = c.Conn.SetReadDeadline(time.Time{})
	done := make(chan error, 1)
	go func() {
		_, err := c.r.Peek(1)
		var te interface{ Timeout() bool }
		if err != nil && !(errors.As(err, &te) && te.Timeout()) {
			cancel(fmt.Errorf("the client is gone: %w", err))
		} else {
			err = nil
		}
		done <- err
	}()
	return ctx, func() bool {
		_ = c.Conn.SetReadDeadline(time.Unix(1, 0))
		err := <-done
		_ = c.Conn.SetReadDeadline(time.Time{})
		cancel(nil)
		return err == nil
	}
}

// unknown is how a supervisor refuses a request that it does not know. The text is part of
// the protocol: older ones have no code for it.
func unknown(version string, o op) string {
	return fmt.Sprintf("the lab's supervisor (version %s) does not know the request %q", version, o)
}
