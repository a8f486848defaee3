// SPDX-License-Identifier: Apache-2.0

package dirs

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/labfile/lab/internal/fsutil"
	"github.com/labfile/lab/internal/lab"
)

// Runtime is the file in which a lab's folder names the runtime directory of the lab. A
// lab that was brought up from a terminal is found by a cron job, too, and after su(1).
func (d Dirs) Runtime(id lab.ID) string { return filepath.Join(d.Lab(id), "runtime") }

// Claim has the lab's folder name Run as the lab's runtime directory, unless it names one
// already that can be used. If there is no folder it does nothing. Of concurrent callers
// with different Runs one wins, and RunLab tells all of them which.
func (d Dirs) Claim(id lab.ID) error {
	folder, err := os.Open(d.Lab(id))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err == nil {
		defer folder.Close()
		err = d.claim(id, folder)
	}
	if err != nil {
		return fmt.Errorf("noting the runtime directory of lab %s: %w", id, err)
	}
	return nil
}

func (d Dirs) claim(id lab.ID, folder *os.File) error {
	if err := fsutil.Lock(folder); err != nil {
		return err
	}
	if _, ok := d.named(id); ok {
		return nil
	}
	err := fsutil.WriteFile(d.Runtime(id), []byte(d.Run+"\n"), 0o600)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // destroyed meanwhile
	}
	return err
}

// runtime is the runtime directory of a lab.
func (d Dirs) runtime(id lab.ID) string {
	if named, ok := d.named(id); ok {
		return named
	}
	return d.Run
}

// named returns the runtime directory that a lab's folder names; ok is false if it names
// none, or one that can be neither used nor made: a user's directory below /run goes with
// the last login.
func (d Dirs) named(id lab.ID) (path string, ok bool) {
	b, err := os.ReadFile(d.Runtime(id))
	if err != nil {
		return "", false
	}
	path = strings.TrimSuffix(string(b), "\n")
	if path == d.Run {
		return path, true
	}
	if !filepath.IsAbs(path) || path != filepath.Clean(path) {
		return "", false
	}
	fi, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return path, makable(filepath.Dir(path))
	}
	if err != nil {
		return "", false
	}
	// Another user may have made it in /tmp: it must belong to the lab's owner.
	folder, err := os.Stat(d.Lab(id))
	if err != nil {
		return "", false
	}
	theirs, ok1 := fi.Sys().(*syscall.Stat_t)
	mine, ok2 := folder.Sys().(*syscall.Stat_t)
	return path, ok1 && ok2 && fi.IsDir() && fi.Mode().Perm()&0o077 == 0 && theirs.Uid == mine.Uid
}

// makable reports whether this process can make directories in dir, or in the first
// directory above it that there is.
func makable(dir string) bool {
	for {
		err := unix.Access(dir, unix.W_OK|unix.X_OK)
		if !errors.Is(err, unix.ENOENT) || dir == filepath.Dir(dir) {
			return err == nil
		}
		dir = filepath.Dir(dir)
	}
}
