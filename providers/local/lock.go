// SPDX-License-Identifier: Apache-2.0

package local

import (
	"context"
	"errors"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// TryLock takes the lock on a file, making the file if need be; ok is false if
// somebody else has it. The lock belongs to the open file: it is free once every
// process that inherited the file has ended or closed it.
func TryLock(path string) (f *os.File, ok bool, err error) {
	for {
		f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
		if err != nil {
			return nil, false, err
		}
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if errors.Is(err, unix.EWOULDBLOCK) {
			f.Close()
			return nil, false, nil
		}
		if err != nil {
			f.Close()
			return nil, false, &os.PathError{Op: "flock", Path: path, Err: err}
		}
		// The directory may have been renamed away and made anew meanwhile.
		if SamePath(f, path) {
			return f, true, nil
		}
		f.Close()
	}
}

// SamePath reports whether f is what path names now.
func SamePath(f *os.File, path string) bool {
	held, err := f.Stat()
	if err != nil {
		return false
	}
	now, err := os.Stat(path)
	return err == nil && os.SameFile(held, now)
}

// LockRetry is how often a taken lock is tried again. flock(2) cannot be
// interrupted by a context, and whoever holds these locks holds them for
// milliseconds.
const LockRetry = 5 * time.Millisecond

// Lock is TryLock that waits as long as ctx allows.
func Lock(ctx context.Context, path string) (*os.File, error) {
	for {
		f, ok, err := TryLock(path)
		if err != nil || ok {
			return f, err
		}
		if err := Pause(ctx, LockRetry); err != nil {
			return nil, err
		}
	}
}

// Pause sleeps for d or until ctx ends.
func Pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
