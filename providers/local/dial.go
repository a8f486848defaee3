// SPDX-License-Identifier: Apache-2.0

package local

import (
	"context"
	"errors"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/labfile/lab/providers/qmp"
)

// Console frees the console for the next user when it is closed.
type Console struct {
	net.Conn
	Busy *os.File // the lock that says so
}

// Close hangs up.
func (c *Console) Close() error {
	err := c.Conn.Close()
	c.Busy.Close()
	return err
}

// dialRetry is how often the socket of a cable is tried again.
const dialRetry = 5 * time.Millisecond

// Dial connects to one of QEMU's sockets, or libvirt's.
func Dial(ctx context.Context, path string) (net.Conn, error) { return qmp.Connect(ctx, path) }

// CableTime is how long QEMU may take to listen for its cable, after it has started.
const CableTime = 10 * time.Second

// DialCable connects to the socket of a machine's network cable. QEMU makes that one
// in a thread of its own, which on a busy host may be later than the first answer of
// its monitor. alive reports whether QEMU still runs.
func DialCable(ctx context.Context, path string, alive func() bool) (net.Conn, error) {
	until := time.Now().Add(CableTime)
	for {
		conn, err := Dial(ctx, path)
		if err == nil || !NotListening(err) || !alive() || time.Now().After(until) {
			return conn, err
		}
		if err := Pause(ctx, dialRetry); err != nil {
			return nil, err
		}
	}
}

// NotListening reports whether nobody listens at a socket that was dialed.
func NotListening(err error) bool { return errors.Is(err, unix.ECONNREFUSED) || Gone(err) }
