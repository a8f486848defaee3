// SPDX-License-Identifier: Apache-2.0

package libvirt

import (
	"context"

	"github.com/labfile/lab/providers"
	"github.com/labfile/lab/providers/accel"
)

// accel decides how the daemon's host runs machines.
func (r *Remote) accel(ctx context.Context, files *pool) (string, error) {
	return accel.TCG, nil
}

func (r *Remote) checkAccel(ctx context.Context, files *pool) providers.Finding {
	return providers.Finding{}
}
