// SPDX-License-Identifier: Apache-2.0

package local

import (
	"fmt"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/providers"
)

// HostRoom returns what is free in the file system of dir, which need not exist yet.
func HostRoom(dir string) (providers.HostRoom, error) {
	for at := dir; ; at = filepath.Dir(at) {
		var fs unix.Statfs_t
		err := unix.Statfs(at, &fs)
		switch {
		case err == nil:
			return providers.HostRoom{At: dir, Free: lab.Bytes(fs.Bavail) * lab.Bytes(fs.Bsize)}, nil
		case !Gone(err) || at == filepath.Dir(at):
			return providers.HostRoom{}, fmt.Errorf("looking for room in %s: %w", at, err)
		}
	}
}
