// SPDX-License-Identifier: Apache-2.0

//go:build !linux

package supervise

import (
	"context"
	"net"
)

// exitOf returns a function that waits for the end of a process: not here.
func exitOf(int) func(context.Context) error {
	return func(context.Context) error { return nil }
}

// peerOf returns the process that listens at the other end: not here.
func peerOf(*net.UnixConn) int { return 0 }

// halted reports whether the process is stopped: not here.
func halted(int) bool { return false }
