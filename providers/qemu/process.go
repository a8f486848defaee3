// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"github.com/labfile/lab/providers/local"
	"golang.org/x/sys/unix"
)

// lockHolder returns the pid of the process that holds the POSIX lock on a pid
// file, 0 if none does. QEMU takes that lock and the kernel drops it when QEMU
// dies, so the answer is true even if the file is years old.
func lockHolder(pidFile string) (int, error) {
	f, err := os.Open(pidFile)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	defer f.Close()
	l := unix.Flock_t{Type: unix.F_WRLCK, Whence: io.SeekStart}
	if err := unix.FcntlFlock(f.Fd(), unix.F_GETLK, &l); err != nil {
		return 0, fmt.Errorf("asking for the lock on %s: %w", pidFile, err)
	}
	if l.Type == unix.F_UNLCK || l.Pid <= 0 {
		return 0, nil
	}
	return int(l.Pid), nil
}

// findProcess returns the live process that holds the lock on pidFile, or nil.
func findProcess(pidFile string) (*local.Process, error) {
	for {
		pid, err := lockHolder(pidFile)
		if err != nil || pid == 0 {
			return nil, err
		}
		p, err := local.OpenProcess(pid)
		if errors.Is(err, unix.ESRCH) {
			continue // it died in between, so the lock is free now
		}
		if err != nil {
			return nil, err
		}
		// The same holder after as before: the pidfd is of the holder.
		if again, err := lockHolder(pidFile); err != nil || again == pid {
			if err != nil {
				p.Close()
				return nil, err
			}
			return p, nil
		}
		p.Close()
	}
}
