// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"context"
	"net"
	"sync/atomic"
	"time"
)

// A guest from which nothing came for askAfter is asked whether it is there, and is
// silent if nothing came for silentAfter. A long upload keeps the answer waiting: it
// excuses the guest while it sends at least bulk bytes from one look to the next. Less
// says nothing, because buffers take what a guest that stands still does not read.
const (
	askAfter    = 2 * time.Second
	silentAfter = 4 * time.Second
	lookEvery   = 250 * time.Millisecond
	bulk        = 16 << 10
)

// heard is a connection that knows when something last came, and how much went.
type heard struct {
	net.Conn
	last    atomic.Int64 // when something was read, in nanoseconds since 1970
	written atomic.Int64 // bytes
}

func (h *heard) Read(p []byte) (int, error) {
	n, err := h.Conn.Read(p)
	if n > 0 {
		h.last.Store(time.Now().UnixNano())
	}
	return n, err
}

func (h *heard) Write(p []byte) (int, error) {
	n, err := h.Conn.Write(p)
	h.written.Add(int64(n))
	return n, err
}

// Hear returns conn, and the pulse of the guest at its other end but for Ask: whatever
// comes shows that the guest goes on.
func Hear(conn net.Conn) (net.Conn, Pulse) {
	h := &heard{Conn: conn}
	p := h.pulse()
	if half, ok := conn.(interface{ CloseWrite() error }); ok {
		return &heardHalf{h, half.CloseWrite}, p
	}
	return h, p
}

// heardHalf is a connection of which one direction can be closed.
type heardHalf struct {
	*heard
	closeWrite func() error
}

func (h *heardHalf) CloseWrite() error { return h.closeWrite() }

func (h *heard) pulse() Pulse {
	return Pulse{Heard: func() time.Time { return time.Unix(0, h.last.Load()) }, Sent: h.written.Load}
}

// Pulse is what shows that a guest goes on.
type Pulse struct {
	// Ask asks the guest whether it is there, and returns nil once it has answered. After
	// an error it is called again: that is no answer.
	Ask func(context.Context) error
	// Heard is when something last came from the guest unasked; nil if that is not known.
	Heard func() time.Time
	// Sent is how many bytes the guest was sent; nil if that is not known.
	Sent func() int64
}

// Watch calls changed with true when the guest has been silent for four seconds though
// it was asked, and with false when it is heard again, until ctx ends.
func (p Pulse) Watch(ctx context.Context, changed func(silent bool)) {
	w := &watch{ask: func() { p.answer(ctx) }, changed: changed}
	began := time.Now()
	t := time.NewTicker(lookEvery)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case now := <-t.C:
			last, sent := began, int64(0)
			if p.Heard != nil {
				last = p.Heard()
			}
			if p.Sent != nil {
				sent = p.Sent()
			}
			w.look(now, last, sent)
		}
	}
}

// answer asks until there is an answer, or ctx ends.
func (p Pulse) answer(ctx context.Context) {
	for p.Ask(ctx) != nil {
		select {
		case <-ctx.Done():
			return
		case <-time.After(lookEvery):
		}
	}
}

// Watch is Pulse.Watch of the login, and ends with it. A command that prints nothing is
// not a silent guest: the guest's ssh server answers.
func (c *Client) Watch(ctx context.Context, changed func(silent bool)) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		_ = c.ssh.Wait()
		cancel()
	}()
	p := c.conn.pulse()
	p.Ask = func(context.Context) error {
		_, _, err := c.ssh.SendRequest("keepalive@openssh.com", true, nil)
		return err
	}
	p.Watch(ctx, changed)
}

// watch is what Watch knows.
type watch struct {
	ask     func() // returns when it is answered
	changed func(silent bool)

	asked    time.Time   // zero: nothing is asked
	answered atomic.Bool // what was asked last
	heard    time.Time   // when an answer was last found
	silent   bool

	written int64     // at the last look
	busy    time.Time // when a look last found that bulk went out
}

// look is called now and then. last is when something was read, written how many bytes
// were written in all.
func (w *watch) look(now, last time.Time, written int64) {
	if written-w.written >= bulk {
		w.busy = now
	}
	w.written = written
	if !w.asked.IsZero() && w.answered.Load() {
		w.asked, w.heard = time.Time{}, now
	}
	if w.heard.After(last) {
		last = w.heard
	}
	switch quiet := now.Sub(last); {
	case w.asked.IsZero() && w.silent:
		w.silent = false
		w.changed(false)
	case w.asked.IsZero() && quiet >= askAfter:
		w.asked = now
		w.answered.Store(false)
		go func() {
			w.ask()
			w.answered.Store(true)
		}()
	case !w.asked.IsZero() && !w.silent && now.Sub(w.asked) >= silentAfter-askAfter && quiet >= silentAfter-askAfter && now.Sub(w.busy) >= silentAfter-askAfter:
		w.silent = true
		w.changed(true)
	}
}
