// SPDX-License-Identifier: Apache-2.0

package supervise

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// exitOf returns a function that waits for the end of a process. It must be called
// while the process is known to live, or the number may be another's. Where the
// kernel has no handles for processes (pidfd_open(2)) there is no waiting.
func exitOf(pid int) func(context.Context) error {
	none := func(context.Context) error { return nil }
	if pid <= 0 || pid == os.Getpid() {
		return none
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return none
	}
	f := os.NewFile(uintptr(fd), "process")
	return func(ctx context.Context) error {
		defer f.Close()
		for {
			n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(pause/time.Millisecond))
			if n == 1 || err != nil && err != unix.EINTR {
				return nil
			}
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
		}
	}
}

// peerOf returns the process that listened when the connection was made, 0 if the
// kernel does not tell.
func peerOf(conn *net.UnixConn) int {
	raw, err := conn.SyscallConn()
	if err != nil {
		return 0
	}
	pid := 0
	_ = raw.Control(func(fd uintptr) {
		if cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
			pid = int(cred.Pid)
		}
	})
	return pid
}

// halted reports whether a signal or a debugger has stopped the process.
func halted(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return false
	}
	// The state follows the command's name, which may hold anything, in parentheses.
	state := bytes.TrimSpace(b[bytes.LastIndexByte(b, ')')+1:])
	return len(state) > 0 && (state[0] == 'T' || state[0] == 't')
}
