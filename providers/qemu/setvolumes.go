// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"fmt"
	"path/filepath"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/providers"
	"github.com/labfile/lab/providers/local"
)

var _ providers.VolumeChanger = (*Provider)(nil)

// SetVolumes rewrites the generation's definition. A QEMU that runs keeps what it has.
func (p *Provider) SetVolumes(ctx context.Context, g lab.Generation, volumes []providers.Volume) error {
	if err := p.setVolumes(ctx, g, volumes); err != nil {
		return fmt.Errorf("changing the volumes of machine %q: %w", g, err)
	}
	return nil
}

func (p *Provider) setVolumes(ctx context.Context, g lab.Generation, volumes []providers.Volume) error {
	if err := local.CheckGeneration(g); err != nil {
		return err
	}
	if err := local.CheckVolumes(volumes, local.CheckFile); err != nil {
		return err
	}
	dir := p.cfg.Dirs.Generation(g)
	held, err := local.Lock(ctx, filepath.Join(dir, local.FileLock))
	if local.Gone(err) {
		return providers.ErrNotFound
	}
	if err != nil {
		return err
	}
	defer held.Close()
	def, ok, err := local.ReadDefinition(dir, g)
	if err != nil {
		return err
	}
	if !ok {
		return providers.ErrNotFound
	}
	def.SetVolumes(volumes)
	return local.WriteJSON(filepath.Join(dir, local.FileDefinition), def)
}
