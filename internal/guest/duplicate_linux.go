// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// duplicate returns a file that this process has open, once more: at the same position
// and, unlike after opening it by its name, still appending if it was.
func duplicate(fd int) (*os.File, error) {
	name := fmt.Sprintf("/proc/self/fd/%d", fd)
	n, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: name, Err: err}
	}
	return os.NewFile(uintptr(n), name), nil
}
