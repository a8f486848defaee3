// SPDX-License-Identifier: Apache-2.0

//go:build linux

package hostfs

import (
	"context"
	"errors"
	"io"
	"sync"
	"syscall"
	"time"

	"github.com/pkg/sftp"

	"github.com/labfile/lab/internal/guest/agentapi"
)

// patience is how long whoever uses the folder is kept waiting when the host has
// gone: a supervisor that was replaced is back in a moment, one that died may never
// be.
const patience = 3 * time.Second

// maxPacket is what is read or written by one request, in bytes.
const maxPacket = 128 << 10

// link is the way to the host, which may be lost and found again.
type link struct {
	patience time.Duration
	waits    func() // is called before something has to wait; may be nil

	mu      sync.Mutex
	client  *sftp.Client  // nil while there is none
	met     bool          // there was one
	lost    time.Time     // since when there is none
	changed chan struct{} // closed and replaced when client changes
}

func newLink() *link {
	return &link{patience: patience, lost: time.Now(), changed: make(chan struct{})}
}

// serve uses conn until it ends, in place of the one before.
func (l *link) serve(conn io.ReadWriteCloser) error {
	defer conn.Close()
	c, err := sftp.NewClientPipe(conn, conn,
		sftp.MaxPacketUnchecked(maxPacket), sftp.UseConcurrentWrites(true), sftp.MaxConcurrentRequestsPerFile(8))
	if err != nil {
		return err
	}
	l.set(nil, c)
	err = c.Wait()
	l.set(c, nil)
	return err
}

// set replaces old, or anything if old is nil.
func (l *link) set(old, c *sftp.Client) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if old != nil && l.client != old {
		return // another one has taken its place
	}
	if l.client != nil && l.client != old {
		go l.client.Close()
	}
	l.client = c
	l.met = true
	if c == nil {
		l.lost = time.Now()
	}
	close(l.changed)
	l.changed = make(chan struct{})
}

// new reports whether there was no host yet.
func (l *link) new() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return !l.met
}

// now returns the host at this moment; nil while there is none.
func (l *link) now() *sftp.Client {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.client
}

// get returns the host, which is waited for only if it was lost just now.
func (l *link) get() (*sftp.Client, syscall.Errno) {
	for {
		l.mu.Lock()
		c, lost, changed := l.client, l.lost, l.changed
		l.mu.Unlock()
		if c != nil {
			return c, 0
		}
		l.wait()
		t := time.NewTimer(time.Until(lost.Add(l.patience)))
		select {
		case <-changed:
			t.Stop()
		case <-t.C:
			return nil, syscall.EIO
		}
	}
}

func (l *link) wait() {
	if l.waits != nil {
		l.waits()
	}
}

// ask carries out f.
func (l *link) ask(ctx context.Context, f func(*sftp.Client) error) syscall.Errno {
	c, no := l.get()
	if no != 0 {
		return no
	}
	return l.on(ctx, func() error { return f(c) })
}

// again is ask for what does no harm when it is done twice: if the host is lost
// meanwhile, the next one is asked.
func (l *link) again(ctx context.Context, f func(*sftp.Client) error) syscall.Errno {
	no := l.ask(ctx, f)
	if no == errLost {
		no = l.ask(ctx, f)
	}
	return no
}

// on carries out f. Any signal interrupts the caller, also one that no program expects
// a file to be interrupted by (SIGCHLD, a timer), and what is under way happens all the
// same: the answer is awaited. But f is left behind if none comes: the kernel lets
// nobody be killed who waits for one.
func (l *link) on(ctx context.Context, f func() error) syscall.Errno {
	done := make(chan error, 1)
	go func() { done <- f() }()
	l.wait()
	select {
	case err := <-done:
		return errnoOf(err)
	case <-ctx.Done():
	}
	t := time.NewTimer(l.patience)
	defer t.Stop()
	select {
	case err := <-done:
		return errnoOf(err)
	case <-t.C:
		return syscall.EINTR
	}
}

// errLost is what a request ends with whose answer will never come.
const errLost = syscall.EIO

// errnoOf is what a program in the guest is told.
func errnoOf(err error) syscall.Errno {
	var (
		no     syscall.Errno
		status *sftp.StatusError
	)
	switch {
	case err == nil:
		return 0
	case errors.As(err, &no):
		return no
	case errors.Is(err, syscall.ENOENT), errors.Is(err, errNotExist):
		return syscall.ENOENT
	case errors.Is(err, errPermission):
		return syscall.EACCES
	case errors.As(err, &status):
		if no, ok := agentapi.Errno(status.Error()); ok {
			return no
		}
		if status.FxCode() == sftp.ErrSSHFxOpUnsupported {
			return syscall.EOPNOTSUPP
		}
	}
	return errLost
}
