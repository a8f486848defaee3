// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// lock is the right to change a lab. It is a kernel lock (an open file
// description lock, fcntl(2)): it ends with the process that holds it, whatever
// ends that process, and others can ask about it without taking it.
type lock struct {
	file *os.File
}

// holder is written into the lock's file, for those who find it taken. It is
// news, not truth: the truth is the kernel's.
type holder struct {
	PID     int       `json:"pid"`
	Command string    `json:"command"`
	Since   time.Time `json:"since"`
}

// acquire takes the lab's lock, or returns a *LockedError at once.
func (l *Lab) acquire(command string) (*lock, error) {
	for {
		if err := l.host.Dirs.Claim(l.id); err != nil {
			return nil, err
		}
		path := l.lockPath()
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			return nil, fmt.Errorf("locking lab %s: %w", l.id, err)
		}
		f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_CLOEXEC, 0o600)
		if errors.Is(err, os.ErrNotExist) {
			continue // a destroy removed the directory in between
		}
		if err != nil {
			return nil, fmt.Errorf("locking lab %s: %w", l.id, err)
		}
		err = unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_WRLCK})
		if errors.Is(err, unix.EINTR) {
			f.Close()
			continue
		}
		if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EACCES) {
			defer f.Close()
			return nil, l.heldBy(f)
		}
		if err != nil {
			f.Close()
			return nil, fmt.Errorf("locking lab %s: %w", l.id, err)
		}
		if path != l.lockPath() || !sameFile(f, path) { // begun elsewhere, or destroyed, between open and lock
			f.Close()
			continue
		}
		news, err := json.Marshal(holder{os.Getpid(), command, time.Now()})
		if err != nil {
			f.Close()
			return nil, err
		}
		if err := errors.Join(f.Truncate(0), writeAt(f, news)); err != nil {
			f.Close()
			return nil, fmt.Errorf("locking lab %s: %w", l.id, err)
		}
		return &lock{f}, nil
	}
}

func (l *Lab) lockPath() string { return filepath.Join(l.host.Dirs.RunLab(l.id), "lock") }

// heldBy is the error about a lock file that another command has locked.
func (l *Lab) heldBy(f *os.File) *LockedError {
	h := readHolder(f)
	return &LockedError{Lab: l.id, PID: h.PID, Command: h.Command, Since: h.Since}
}

// readHolder reads who holds the lock. The holder writes that just after it has
// got the lock, so a reader that comes in between looks again for a moment; no
// news is no harm.
func readHolder(f *os.File) holder {
	for range 10 {
		var h holder
		if err := json.NewDecoder(io.NewSectionReader(f, 0, 1<<12)).Decode(&h); err == nil {
			return h
		}
		time.Sleep(10 * time.Millisecond)
	}
	return holder{}
}

// locked reports whether some process holds the lab's lock.
func (l *Lab) locked() bool {
	f, err := os.Open(l.lockPath())
	if err != nil {
		return false
	}
	defer f.Close()
	return taken(f)
}

func taken(f *os.File) bool {
	probe := unix.Flock_t{Type: unix.F_WRLCK}
	err := unix.FcntlFlock(f.Fd(), unix.F_OFD_GETLK, &probe)
	return err == nil && probe.Type != unix.F_UNLCK
}

// Busy says which command works on the lab at this moment; nil if none does.
func (l *Lab) Busy() *LockedError {
	f, err := os.Open(l.lockPath())
	if err != nil {
		return nil
	}
	defer f.Close()
	if !taken(f) {
		return nil
	}
	return l.heldBy(f)
}

func (k *lock) release() { k.file.Close() }

// remove takes the lock's file away, and its directory if that holds nothing
// else. Whoever opened the file meanwhile notices, and makes a new one.
func (k *lock) remove() {
	if !sameFile(k.file, k.file.Name()) {
		return // it is gone already, and what is there is somebody else's
	}
	_ = os.Remove(k.file.Name())
	_ = os.Remove(filepath.Dir(k.file.Name()))
}

func sameFile(f *os.File, path string) bool {
	a, err := f.Stat()
	if err != nil {
		return false
	}
	b, err := os.Stat(path)
	return err == nil && os.SameFile(a, b)
}

func writeAt(f *os.File, b []byte) error {
	_, err := f.WriteAt(b, 0)
	return err
}
