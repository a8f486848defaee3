// SPDX-License-Identifier: Apache-2.0

package network

import (
	"errors"
	"io"
	"net"
	"sync"
	"time"
)

// past is a deadline that ends every read and write at once.
var past = time.Unix(1, 0)

// Pipe copies between two connections, both ways, until both ways have ended,
// and closes them. The end of one way is passed on as a half-close, so that a
// request which ends with its stream still gets its answer; an error ends both, and
// so does the end of a way that leads to a connection without CloseWrite.
func Pipe(a, b net.Conn) {
	var wg sync.WaitGroup
	end := sync.OnceFunc(func() {
		for _, c := range []net.Conn{a, b} {
			_ = c.SetDeadline(past)
			_ = c.Close()
		}
	})
	copyTo := func(dst, src net.Conn) {
		if _, err := io.Copy(dst, src); err != nil || closeWrite(dst) != nil {
			end()
		}
	}
	wg.Go(func() { copyTo(a, b) })
	wg.Go(func() { copyTo(b, a) })
	wg.Wait()
	end()
}

// closeWrite half-closes c, or fails if its kind cannot.
func closeWrite(c net.Conn) error {
	h, ok := c.(interface{ CloseWrite() error })
	if !ok {
		return errors.ErrUnsupported
	}
	return h.CloseWrite()
}
