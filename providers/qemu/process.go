// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"time"

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

// process is a hypervisor process, held by a pidfd: it cannot be mistaken for
// another one that got its pid later.
type process struct {
	pid  int
	file *os.File // the pidfd, polled by Go's runtime
}

// findProcess returns the live process that holds the lock on pidFile, or nil.
func findProcess(pidFile string) (*process, error) {
	for {
		pid, err := lockHolder(pidFile)
		if err != nil || pid == 0 {
			return nil, err
		}
		fd, err := unix.PidfdOpen(pid, 0)
		if errors.Is(err, unix.ESRCH) {
			continue // it died in between, so the lock is free now
		}
		if err != nil {
			return nil, fmt.Errorf("opening process %d: %w", pid, err)
		}
		unix.CloseOnExec(fd)
		// Non-blocking files are handed to the runtime's poller. A pidfd is
		// readable once its process has ended.
		if err := unix.SetNonblock(fd, true); err != nil {
			unix.Close(fd)
			return nil, err
		}
		p := &process{pid: pid, file: os.NewFile(uintptr(fd), "pidfd")}
		// The same holder after as before: the pidfd is of the holder.
		if again, err := lockHolder(pidFile); err != nil || again == pid {
			if err != nil {
				p.close()
				return nil, err
			}
			return p, nil
		}
		p.close()
	}
}

func (p *process) close() { p.file.Close() }

// wait returns nil once the process has ended, or ctx's error.
func (p *process) wait(ctx context.Context) error {
	raw, err := p.file.SyscallConn()
	if err != nil {
		return err
	}
	fired := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		p.file.SetReadDeadline(time.Unix(1, 0))
		close(fired)
	})
	err = raw.Read(func(fd uintptr) bool {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
		return n > 0 && err == nil
	})
	if !stop() {
		<-fired
	}
	p.file.SetReadDeadline(time.Time{})
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return ctx.Err()
	}
	return err
}

// waitFor is wait with a limit; it reports whether the process has ended.
func (p *process) waitFor(ctx context.Context, d time.Duration) (bool, error) {
	limited, cancel := context.WithTimeout(ctx, d)
	defer cancel()
	err := p.wait(limited)
	if err == nil {
		return true, nil
	}
	if ctx.Err() != nil {
		return false, ctx.Err()
	}
	if errors.Is(err, context.DeadlineExceeded) {
		return false, nil
	}
	return false, err
}

// signal sends a signal. A process that has ended needs none.
func (p *process) signal(s unix.Signal) error {
	raw, err := p.file.SyscallConn()
	if err != nil {
		return err
	}
	var sent error
	if err := raw.Control(func(fd uintptr) { sent = unix.PidfdSendSignal(int(fd), s, nil, 0) }); err != nil {
		return err
	}
	if errors.Is(sent, unix.ESRCH) {
		return nil
	}
	return sent
}

// status returns how the ended process ended. Only Linux 6.15 and newer tells
// that to others than the parent, and only once the parent has collected the
// process; ok is false as long as it is not known.
func (p *process) status() (ws unix.WaitStatus, ok bool) {
	raw, err := p.file.SyscallConn()
	if err != nil {
		return 0, false
	}
	info := unix.PidfdInfo{Mask: unix.PIDFD_INFO_EXIT}
	var asked error
	if err := raw.Control(func(fd uintptr) { asked = unix.IoctlPidfdInfo(int(fd), &info) }); err != nil {
		return 0, false
	}
	if asked != nil || info.Mask&unix.PIDFD_INFO_EXIT == 0 {
		return 0, false
	}
	return unix.WaitStatus(info.Exit_code), true
}

// halted reports whether the process is stopped by a signal or a tracer, so
// that it answers nobody.
func halted(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return false
	}
	// The state stands behind the command's name, which is in parentheses and
	// may hold anything.
	for i := len(b) - 1; i >= 0; i-- {
		if b[i] == ')' {
			return i+2 < len(b) && (b[i+2] == 'T' || b[i+2] == 't')
		}
	}
	return false
}
