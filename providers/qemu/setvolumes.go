// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"fmt"
	"path/filepath"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/providers"
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
	if err := checkGeneration(g); err != nil {
		return err
	}
	if err := checkStorage(providers.Spec{Volumes: volumes}); err != nil {
		return err
	}
	dir := p.cfg.Dirs.Generation(g)
	held, err := lock(ctx, filepath.Join(dir, fileLock))
	if gone(err) {
		return providers.ErrNotFound
	}
	if err != nil {
		return err
	}
	defer held.Close()
	def, ok, err := readDefinition(dir, g)
	if err != nil {
		return err
	}
	if !ok {
		return providers.ErrNotFound
	}
	def.Volumes = nil
	for _, v := range volumes {
		def.Volumes = append(def.Volumes, volume(v))
	}
	if len(def.Volumes) > 0 {
		def.Version = definitionStored
	}
	return writeJSON(filepath.Join(dir, fileDefinition), def)
}
