// SPDX-License-Identifier: Apache-2.0

package supervise

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/labfile/lab/internal/dirs"
	"github.com/labfile/lab/internal/lab"
)

func socketPath(d dirs.Dirs, id lab.ID) string {
	return filepath.Join(d.RunLab(id), "supervisor.sock")
}

// lockPath is the lock that a supervisor holds as long as it lives.
func lockPath(d dirs.Dirs, id lab.ID) string { return filepath.Join(d.RunLab(id), "supervisor.lock") }

// startPath is the lock that whoever starts a supervisor holds meanwhile.
func startPath(d dirs.Dirs, id lab.ID) string { return filepath.Join(d.RunLab(id), "starting.lock") }

// pause is how long to wait before looking again at a lock that others hold.
const pause = 5 * time.Millisecond

// errHeld says that somebody else has the lock.
var errHeld = errors.New("lock is held")

// tryLock takes an advisory lock (flock(2)) on a file that it makes if needed,
// or returns errHeld. The kernel gives it back when the file is closed, whatever
// happens to this process.
func tryLock(path string) (*os.File, error) {
	for {
		f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
		if err != nil {
			return nil, err
		}
		if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
			f.Close()
			if errors.Is(err, unix.EWOULDBLOCK) {
				return nil, errHeld
			}
			return nil, fmt.Errorf("locking %s: %w", path, err)
		}
		// Somebody may have removed the file, and others made a new one.
		mine, err1 := f.Stat()
		now, err2 := os.Stat(path)
		if err1 == nil && err2 == nil && os.SameFile(mine, now) {
			return f, nil
		}
		f.Close()
		if err2 != nil && !errors.Is(err2, fs.ErrNotExist) {
			return nil, err2
		}
		if _, err := os.Stat(filepath.Dir(path)); err != nil {
			return nil, err
		}
	}
}

// lock waits for a lock until ctx ends.
func lock(ctx context.Context, path string) (*os.File, error) {
	for {
		f, err := tryLock(path)
		if !errors.Is(err, errHeld) {
			return f, err
		}
		select {
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-time.After(pause):
		}
	}
}

// held reports whether somebody holds the lock. It takes the lock, shared, for a
// moment, so whoever wants it must try more than once.
func held(path string) bool {
	f, err := os.Open(path)
	if err != nil {
		return false
	}
	defer f.Close()
	return errors.Is(unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB), unix.EWOULDBLOCK)
}

// Alive reports whether the lab has a supervisor: a process that holds its lock.
func Alive(d dirs.Dirs, id lab.ID) bool { return held(lockPath(d, id)) }
