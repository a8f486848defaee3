// SPDX-License-Identifier: Apache-2.0

package local

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// Process is a hypervisor process, held by a pidfd: it cannot be mistaken for
// another one that got its pid later.
type Process struct {
	PID  int
	file *os.File // the pidfd, polled by Go's runtime
}

// OpenProcess holds the process called pid; unix.ESRCH if there is none.
func OpenProcess(pid int) (*Process, error) {
	fd, err := unix.PidfdOpen(pid, 0)
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
	return &Process{PID: pid, file: os.NewFile(uintptr(fd), "pidfd")}, nil
}

// Close lets go of the process.
func (p *Process) Close() { p.file.Close() }

// Wait returns nil once the process has ended, or ctx's error.
func (p *Process) Wait(ctx context.Context) error {
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

// WaitFor is wait with a limit; it reports whether the process has ended.
func (p *Process) WaitFor(ctx context.Context, d time.Duration) (bool, error) {
	limited, cancel := context.WithTimeout(ctx, d)
	defer cancel()
	err := p.Wait(limited)
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

// Signal sends a signal. A process that has ended needs none.
func (p *Process) Signal(s unix.Signal) error {
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

// Status returns how the ended process ended. Only Linux 6.15 and newer tells
// that to others than the parent, and only once the parent has collected the
// process; ok is false as long as it is not known.
func (p *Process) Status() (ws unix.WaitStatus, ok bool) {
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

// Halted reports whether the process is stopped by a signal or a tracer, so
// that it answers nobody.
func Halted(pid int) bool {
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
