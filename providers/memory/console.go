// SPDX-License-Identifier: Apache-2.0

package memory

import (
	"io"
	"os"
	"sync"
)

// log is what a console printed. Readers can wait for more.
type log struct {
	mu    sync.Mutex
	text  []byte
	ended bool
	more  chan struct{} // closed and replaced at each change; nil if nobody waits
}

func (l *log) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.text = append(l.text, b...)
	l.wake()
	return len(b), nil
}

func (l *log) end() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.ended = true
	l.wake()
}

func (l *log) wake() {
	if l.more != nil {
		close(l.more)
		l.more = nil
	}
}

func (l *log) size() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.text)
}

// at copies what stands at an offset; more is closed when there may be more.
func (l *log) at(offset int, b []byte) (n int, ended bool, more <-chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.more == nil {
		l.more = make(chan struct{})
	}
	return copy(b, l.text[offset:]), l.ended, l.more
}

// logReader reads a log to its present end.
type logReader struct {
	log *log
	off int
}

func (r *logReader) Read(b []byte) (int, error) {
	n, _, _ := r.log.at(r.off, b)
	r.off += n
	if n == 0 && len(b) > 0 {
		return 0, io.EOF
	}
	return n, nil
}

func (r *logReader) Close() error { return nil }

// consoleUser is the host's end of a console: Read waits for what the guest
// prints.
type consoleUser struct {
	guest *Guest
	free  func()

	mu     sync.Mutex
	at     int
	closed chan struct{}
}

func (c *consoleUser) Read(b []byte) (int, error) {
	for {
		c.mu.Lock()
		at := c.at
		closed := c.closing()
		c.mu.Unlock()
		n, ended, more := c.guest.console.at(at, b)
		if n > 0 {
			c.mu.Lock()
			c.at += n
			c.mu.Unlock()
			return n, nil
		}
		if ended {
			return 0, io.EOF
		}
		select {
		case <-more:
		case <-closed:
			return 0, os.ErrClosed
		}
	}
}

// closing returns the channel that Close closes. The caller holds c.mu.
func (c *consoleUser) closing() chan struct{} {
	if c.closed == nil {
		c.closed = make(chan struct{})
	}
	return c.closed
}

func (c *consoleUser) Write(b []byte) (int, error) { return c.guest.keys.Write(b) }

func (c *consoleUser) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	select {
	case <-c.closing():
		return os.ErrClosed
	default:
		close(c.closed)
		c.free()
		return nil
	}
}
