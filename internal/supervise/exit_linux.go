// SPDX-License-Identifier: Apache-2.0

package supervise

import (
	"context"
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
