// SPDX-License-Identifier: Apache-2.0

package supervise

import (
	"net"
	"os"
	"sync"
)

// listener is a unix socket whose file goes when it is closed, unless somebody removed it
// and another process listens in its place: a supervisor whose runtime directory is gone
// must not take away the socket of the next one.
type listener struct {
	*net.UnixListener
	path  string
	file  os.FileInfo
	close func() error
}

// listen makes a socket at path.
func listen(path string) (*listener, error) {
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, err
	}
	ln.SetUnlinkOnClose(false)
	l := &listener{UnixListener: ln, path: path}
	l.close = sync.OnceValue(func() error {
		// The socket holds on to its file, so another one is never taken for it.
		if now, err := os.Lstat(path); err == nil && os.SameFile(l.file, now) {
			_ = os.Remove(path)
		}
		return ln.Close()
	})
	if l.file, err = os.Lstat(path); err != nil {
		ln.Close()
		return nil, err
	}
	return l, nil
}

// Close removes the socket's file, if it is still its own, and stops listening.
func (l *listener) Close() error { return l.close() }
