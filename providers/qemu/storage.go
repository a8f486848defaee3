// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"

	"github.com/labfile/lab/providers/local"
)

// canMount finds out whether QEMU was built with 9p.
func (p *Provider) canMount(ctx context.Context) error {
	binary, err := p.binary()
	if err != nil {
		return err
	}
	return local.Has9P(ctx, binary)
}
