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
	return p.setVolumes(ctx, g, volumes, local.CheckFile, p.saved)
}

// saved gives a generation's domain the definition that its next start goes by.
func (p *Provider) saved(ctx context.Context, d domain, def local.Definition) error {
	_, err := p.define(ctx, d.Name, p.dir(def.Generation()), def)
	return err
}

// saver is saved of a Provider or a Remote.
type saver func(context.Context, domain, local.Definition) error

// setVolumes has save keep the volumes; file looks at the path of each of their files.
func (p *Provider) setVolumes(ctx context.Context, g lab.Generation, volumes []providers.Volume, file func(path string) error, save saver) error {
	set := func() error {
		if err := local.CheckVolumes(volumes, file); err != nil {
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
		return save(ctx, d, def)
	}
	if err := set(); err != nil {
		return fmt.Errorf("changing the volumes of machine %q: %w", g, err)
	}
	return nil
}

// PushVolume takes a snapshot without metadata of the volume's disk alone. The
// definition that the next start goes by is rewritten last.
func (p *Provider) PushVolume(ctx context.Context, g lab.Generation, v providers.Volume) error {
	return p.pushVolume(ctx, g, v, local.CheckFile, p.openDirectory, p.saved)
}

// pushVolume puts a file on top of a volume of a machine that runs; open is openDirectory,
// and the rest as setVolumes has it.
func (p *Provider) pushVolume(
	ctx context.Context, g lab.Generation, v providers.Volume, file func(path string) error,
	open func(context.Context, lab.Generation) (*directory, error), save saver,
) error {
	push := func() error {
		if err := local.CheckVolumes([]providers.Volume{v}, file); err != nil {
			return err
		}
		d, err := open(ctx, g)
		if err != nil {
			return err
		}
		defer d.Close()
		return d.PushVolume(ctx, v,
			func(ctx context.Context) (bool, error) { return p.runs(ctx, d) },
			func(ctx context.Context, i int) error { return p.coverVolume(ctx, d.dom, i, v.Path) },
			func(ctx context.Context, def local.Definition) error { return save(ctx, d.dom, def) })
	}
	if err := push(); err != nil {
		return fmt.Errorf("putting a file on top of volume %q of machine %q: %w", v.Name, g, err)
	}
	return nil
}

// coverVolume puts a file on top of the i-th volume of a domain that runs.
func (p *Provider) coverVolume(ctx context.Context, dom domain, i int, file string) error {
	ctx, cancel := context.WithTimeout(ctx, monitorTimeout)
	defer cancel()
	document, err := answer(ctx, p.link, func(l *golibvirt.Libvirt) (string, error) { return l.DomainGetXMLDesc(dom.Domain, 0) })
	if err != nil {
		return err
	}
	return p.cover(ctx, dom, document, volumeDisk(i), file)
}
