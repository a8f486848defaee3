// SPDX-License-Identifier: Apache-2.0

package libvirt

import (
	"context"
	"fmt"

	golibvirt "github.com/digitalocean/go-libvirt"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/providers"
	"github.com/labfile/lab/providers/local"
)

var (
	_ providers.VolumeChanger = (*Provider)(nil)
	_ providers.VolumePusher  = (*Provider)(nil)
)

// SetVolumes gives the domain another definition. A QEMU that runs keeps what it has.
func (p *Provider) SetVolumes(ctx context.Context, g lab.Generation, volumes []providers.Volume) error {
	if err := p.setVolumes(ctx, g, volumes); err != nil {
		return fmt.Errorf("changing the volumes of machine %q: %w", g, err)
	}
	return nil
}

func (p *Provider) setVolumes(ctx context.Context, g lab.Generation, volumes []providers.Volume) error {
	if err := local.CheckVolumes(volumes, local.CheckFile); err != nil {
		return err
	}
	held, d, err := p.hold(ctx, g)
	if err != nil {
		return err
	}
	defer held.Close()
	def, err := d.definition()
	if err != nil {
		return err
	}
	def.SetVolumes(volumes)
	_, err = p.define(ctx, d.Name, p.dir(g), def)
	return err
}

// PushVolume takes a snapshot without metadata of the volume's disk alone. The
// definition that the next start goes by is rewritten last.
func (p *Provider) PushVolume(ctx context.Context, g lab.Generation, v providers.Volume) error {
	if err := p.pushVolume(ctx, g, v); err != nil {
		return fmt.Errorf("putting a file on top of volume %q of machine %q: %w", v.Name, g, err)
	}
	return nil
}

func (p *Provider) pushVolume(ctx context.Context, g lab.Generation, v providers.Volume) error {
	if err := local.CheckVolumes([]providers.Volume{v}, local.CheckFile); err != nil {
		return err
	}
	d, err := p.openDirectory(ctx, g)
	if err != nil {
		return err
	}
	defer d.Close()
	return p.pushOnVolume(ctx, d, v, func(ctx context.Context, def local.Definition) error {
		_, err := p.define(ctx, d.dom.Name, d.Path, def)
		return err
	})
}

// pushOnVolume puts a file on top of a volume of a machine that runs; save keeps what the
// next start is to go by.
func (p *Provider) pushOnVolume(ctx context.Context, d *directory, v providers.Volume, save func(context.Context, local.Definition) error) error {
	running := func(ctx context.Context) (bool, error) { return p.runs(ctx, d) }
	push := func(ctx context.Context, i int) error {
		ctx, cancel := context.WithTimeout(ctx, monitorTimeout)
		defer cancel()
		document, err := answer(ctx, p.link, func(l *golibvirt.Libvirt) (string, error) { return l.DomainGetXMLDesc(d.dom.Domain, 0) })
		if err != nil {
			return err
		}
		return p.cover(ctx, d.dom, document, volumeDisk(i), v.Path)
	}
	return d.PushVolume(ctx, v, running, push, save)
}
