// SPDX-License-Identifier: Apache-2.0

package supervise

import (
	"math"

	"golang.org/x/sys/unix"
)

// keepFiles keeps what this process inherited, such as the lock of a shell script,
// from the supervisor, which outlives it. Kernels before 5.11 cannot do that at
// once, and it is no reason not to start.
func keepFiles() { _ = unix.CloseRange(3, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC) }
