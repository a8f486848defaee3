// SPDX-License-Identifier: Apache-2.0

package build

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// workshop is the temporary directory of a build, held by a kernel lock. It lies
// where TMPDIR says and not in the store: mmdebstrap's user namespace has to reach
// its part of it, and the store's directories are closed to everybody else.
type workshop struct {
	dir  string
	tmp  string // mmdebstrap's own temporary directories
	mode string
	lock *os.File
}

const workshopPattern = "lab-build-*"

// newWorkshop makes a workshop, and clears away those whose builds were killed.
func newWorkshop(ctx context.Context, mode string) (*workshop, error) {
	sweep(ctx, mode)
	dir, err := os.MkdirTemp("", workshopPattern)
	if err != nil {
		return nil, err
	}
	w := &workshop{dir: dir, tmp: filepath.Join(dir, "tmp"), mode: mode}
	if w.lock, err = lock(dir); err != nil {
		w.close()
		return nil, fmt.Errorf("locking %s: %w", dir, err)
	}
	// Others may pass through, and see nothing.
	for _, d := range []string{dir, w.tmp} {
		if err := os.MkdirAll(d, 0o711); err != nil {
			w.close()
			return nil, err
		}
		if err := os.Chmod(d, 0o711); err != nil {
			w.close()
			return nil, err
		}
	}
	return w, nil
}

// spool makes the directory for the contents of a tree.
func (w *workshop) spool(name string) (string, error) {
	dir := filepath.Join(w.dir, name)
	return dir, os.Mkdir(dir, 0o700)
}

// close removes the workshop.
func (w *workshop) close() {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	discard(ctx, w.dir, w.mode)
	if w.lock != nil {
		w.lock.Close()
	}
}

// lock takes the lock of a workshop. It is the directory's own, so there is no
// moment at which it is missing.
func lock(dir string) (*os.File, error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// sweep removes what killed builds of this user left behind.
func sweep(ctx context.Context, mode string) {
	left, err := filepath.Glob(filepath.Join(os.TempDir(), workshopPattern))
	if err != nil {
		return
	}
	for _, dir := range left {
		fi, err := os.Lstat(dir)
		if err != nil || !fi.IsDir() {
			continue
		}
		st, ok := fi.Sys().(*syscall.Stat_t)
		// A workshop is born before it is locked: leave the newest ones alone.
		if !ok || int(st.Uid) != os.Getuid() || time.Since(fi.ModTime()) < time.Minute {
			continue
		}
		if f, err := lock(dir); err == nil {
			discard(ctx, dir, mode)
			f.Close()
		}
	}
}

// discard removes a directory, in a user namespace if files of subordinate users
// are in it, as when mmdebstrap was killed.
func discard(ctx context.Context, dir, mode string) {
	if os.RemoveAll(dir) == nil || mode != "unshare" {
		return
	}
	if _, err := tool(ctx, "/", "mmdebstrap", "--unshare-helper", "rm", "-rf", filepath.Join(dir, "tmp")); err == nil {
		os.RemoveAll(dir)
	}
}
