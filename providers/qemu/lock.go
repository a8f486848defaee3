// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"errors"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// tryLock takes the lock on a file, making the file if need be; ok is false if
// somebody else has it. The lock belongs to the open file: it is free once every
// process that inherited the file has ended or closed it.
func tryLock(path string) (f *os.File, ok bool, err error) {
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
		if samePath(f, path) {
			return f, true, nil
		}
		f.Close()
	}
}

func samePath(f *os.File, path string) bool {
	held, err := f.Stat()
	if err != nil {
		return false
	}
	now, err := os.Stat(path)
	return err == nil && os.SameFile(held, now)
}

// lockRetry is how often a taken lock is tried again. flock(2) cannot be
// interrupted by a context, and whoever holds these locks holds them for
// milliseconds.
const lockRetry = 5 * time.Millisecond

// lock is tryLock that waits as long as ctx allows.
func lock(ctx context.Context, path string) (*os.File, error) {
	for {
		f, ok, err := tryLock(path)
		if err != nil || ok {
			return f, err
		}
		if err := pause(ctx, lockRetry); err != nil {
			return nil, err
		}
	}
}

// pause sleeps for d or until ctx ends.
func pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
