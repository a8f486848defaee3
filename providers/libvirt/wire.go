// SPDX-License-Identifier: Apache-2.0

package libvirt

import (
	"net"
	"sync"
	"sync/atomic"

	"github.com/digitalocean/go-libvirt/socket"
)

// wire tells when the connection has ended. go-libvirt's own channel for that may
// never be closed if it happens while the connection is being made.
type wire struct {
	net.Conn
	in   *packets
	once sync.Once
	gone chan struct{}
	end  error // why; set before gone is closed

	moved atomic.Int64 // bytes in both directions

	mu      sync.Mutex // guards what follows, and writes
	out     frames
	pending []byte // packets that go out when no other is under way
}

func newWire(c net.Conn) *wire {
	w := &wire{Conn: c, gone: make(chan struct{}), out: frames{seen: func(header) {}}}
	w.in = newPackets(c, w.finish)
	return w
}

// finish tells the daemon that all it sent on a stream has come.
func (w *wire) finish(h header) {
	h.length, h.kind, h.status = headerSize, socket.Stream, socket.StatusOK
	w.mu.Lock()
	defer w.mu.Unlock()
	w.pending = h.append(w.pending)
	w.flush()
}

// flush sends what is pending, unless a packet is under way. The caller has w.mu.
func (w *wire) flush() error {
	if len(w.pending) == 0 || w.out.have > 0 || w.out.left > 0 {
		return nil
	}
	_, err := w.Conn.Write(w.pending)
	w.pending = nil
	return err
}

func (w *wire) Write(b []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	n, err := w.Conn.Write(b)
	w.moved.Add(int64(n))
	w.out.feed(b[:n])
	if err == nil {
		err = w.flush()
	}
	return n, err
}

func (w *wire) Read(b []byte) (int, error) {
	n, err := w.in.Read(b)
	w.moved.Add(int64(n))
	if err != nil {
		w.once.Do(func() {
			w.end = err
			close(w.gone)
		})
	}
	return n, err
}
