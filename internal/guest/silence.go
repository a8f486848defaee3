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
	lookEvery   = 500 * time.Millisecond
	bulk        = 32 << 10
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

// Watch calls changed with true when the guest has been silent for four seconds though
// it was asked, and with false when it is heard again, until ctx or the login ends. A
// command that prints nothing is not a silent guest: the guest's ssh server answers.
func (c *Client) Watch(ctx context.Context, changed func(silent bool)) {
	ended := make(chan struct{})
	go func() {
		_ = c.ssh.Wait()
		close(ended)
	}()
	w := &watch{ask: func() { _, _, _ = c.ssh.SendRequest("keepalive@openssh.com", true, nil) }, changed: changed}
	t := time.NewTicker(lookEvery)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ended:
			return
		case now := <-t.C:
			w.look(now, time.Unix(0, c.conn.last.Load()), c.conn.written.Load())
		}
	}
}

// watch is what Watch knows.
type watch struct {
	ask     func() // returns when it is answered
	changed func(silent bool)

	asked    time.Time   // zero: nothing is asked
	answered atomic.Bool // what was asked last
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
		w.asked = time.Time{}
	}
	switch quiet := now.Sub(last); {
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
	case w.asked.IsZero() && w.silent:
		w.silent = false
		w.changed(false)
	}
}
