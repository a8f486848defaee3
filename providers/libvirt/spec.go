// SPDX-License-Identifier: Apache-2.0

package libvirt

import (
	"context"
	"fmt"
	"os/exec"
	"path/filepath"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/providers"
	"github.com/labfile/lab/providers/local"
)

// CheckSpec says what Create would refuse.
func (p *Provider) CheckSpec(ctx context.Context, spec providers.Spec) error {
	if err := local.CheckSpec(spec, local.CheckFile); err != nil {
		return err
	}
	if spec.Network != lab.NetworkSwitch {
		if err := p.mayNetwork(); err != nil {
			return err
		}
	}
	binary, err := p.binary()
	if err != nil {
		return err
	}
	if len(spec.Mounts) > 0 {
		return local.Has9P(ctx, binary)
	}
	return nil
}

// HostMemory returns the memory of this host.
func (p *Provider) HostMemory(context.Context) (providers.HostMemory, error) {
	return local.HostMemory()
}

// HostRoom returns what is free where the labs are kept.
func (p *Provider) HostRoom(context.Context) (providers.HostRoom, error) {
	return local.HostRoom(p.cfg.Dirs.Labs())
}

// binary finds QEMU.
func (p *Provider) binary() (string, error) {
	path, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		return "", fmt.Errorf("%w: qemu-system-x86_64 not found (%s)", providers.ErrIncapable, installCure())
	}
	return filepath.Abs(path)
}
