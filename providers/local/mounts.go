// SPDX-License-Identifier: Apache-2.0

package local

import (
	"context"
	"errors"
	"fmt"
	"os/exec"

	"github.com/labfile/lab/internal/program"
	"github.com/labfile/lab/providers"
)

// Has9P has QEMU describe the device; it fails if it has none.
func Has9P(ctx context.Context, binary string) error {
	err := program.Run(exec.CommandContext(ctx, binary, "-device", "virtio-9p-pci,help"))
	var exit *exec.ExitError
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.As(err, &exit):
		return fmt.Errorf("%w: %s cannot share folders with machines: it was built without 9p", providers.ErrIncapable, binary)
	}
	return fmt.Errorf("running %s: %w", binary, err)
}
