// SPDX-License-Identifier: Apache-2.0

package fsutil

import (
	"context"
	"errors"
	"fmt"
	"os"
	"syscall"
)

// LockDir waits until it has the folder to itself among those that call LockDir (flock(2)),
// in this process or another, and returns a file; closing it gives the lock back. If ctx ends
// first, its cause is the error; a free lock is had even then. Other errors: those of os.Open.
func LockDir(ctx context.Context, dir string) (*os.File, error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	fail := func(err error) (*os.File, error) {
		f.Close()
		return nil, fmt.Errorf("locking %s: %w", dir, err)
	}
	err = flock(f, syscall.LOCK_EX|syscall.LOCK_NB)
	if err == nil {
		return f, nil
	}
	if !errors.Is(err, syscall.EWOULDBLOCK) {
		return fail(err)
	}
	locked := make(chan error, 1)
	go func() { locked <- Lock(f) }()
	select {
	case err := <-locked:
		if err != nil {
			return fail(err)
		}
		return f, nil
	case <-ctx.Done():
		go func() { // nothing ends flock but the lock
			<-locked
			f.Close()
		}()
		return nil, fmt.Errorf("waiting for another command that has %s: %w", dir, context.Cause(ctx))
	}
}

// Lock waits for the kernel's lock of an open file (flock(2)) that is held for moments only: no
// signal ends the wait. Closing the file gives the lock back.
func Lock(f *os.File) error { return flock(f, syscall.LOCK_EX) }

func flock(f *os.File, how int) error {
	for {
		err := syscall.Flock(int(f.Fd()), how)
		if !errors.Is(err, syscall.EINTR) {
			return err
		}
	}
}
