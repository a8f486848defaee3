// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"syscall"

	"golang.org/x/sys/unix"
)

// signalName returns the name of a signal: "SIGTERM".
func signalName(s syscall.Signal) string { return unix.SignalName(s) }
