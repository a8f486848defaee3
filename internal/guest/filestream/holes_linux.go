// SPDX-License-Identifier: Apache-2.0

package filestream

import (
	"errors"
	"io/fs"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// openNonblock keeps an open from waiting for the other end of a FIFO.
const openNonblock = unix.O_NONBLOCK

// sparse reports whether a file takes less room than it is long.
func sparse(fi fs.FileInfo) bool {
	st, ok := fi.Sys().(*syscall.Stat_t)
	return ok && st.Blocks*512 < fi.Size()
}

// nextData returns where data begins at or behind at, and where it ends; size twice
// if there is none.
func nextData(f *os.File, at, size int64) (from, to int64, err error) {
	from, err = unix.Seek(int(f.Fd()), at, unix.SEEK_DATA)
	switch {
	case errors.Is(err, unix.ENXIO):
		return size, size, nil
	case err != nil: // a file system that knows nothing of holes
		return at, size, nil
	}
	to, err = unix.Seek(int(f.Fd()), from, unix.SEEK_HOLE)
	if err != nil {
		return 0, 0, err
	}
	return min(from, size), min(to, size), nil
}
