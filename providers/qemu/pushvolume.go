// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"fmt"
	"path/filepath"
	"slices"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/providers"
	"github.com/labfile/lab/providers/local"
	"github.com/labfile/lab/providers/qmp"
)

var _ providers.VolumePusher = (*Provider)(nil)

// PushVolume lays the file over the volume's node. What the machine has is asked of
// QEMU, for the definition may lag behind it: it is rewritten last.
func (p *Provider) PushVolume(ctx context.Context, g lab.Generation, v providers.Volume) error {
	if err := p.pushVolume(ctx, g, v); err != nil {
		return fmt.Errorf("putting a file on top of volume %q of machine %q: %w", v.Name, g, err)
	}
	return nil
}

func (p *Provider) pushVolume(ctx context.Context, g lab.Generation, v providers.Volume) error {
	if err := local.CheckStorage(providers.Spec{Volumes: []providers.Volume{v}}); err != nil {
		return err
	}
	d, err := p.openDirectory(ctx, g)
	if err != nil {
		return err
	}
	defer d.Close()
	held, err := d.Lock(ctx)
	if err != nil {
		return err
	}
	defer held.Close()
	i := slices.IndexFunc(d.Def.Volumes, func(w local.Volume) bool { return w.Name == v.Name && !w.ReadOnly })
	if i < 0 {
		return fmt.Errorf("%w: it writes to no volume of that name", providers.ErrNotFound)
	}
	proc, err := p.find(ctx, d.Path)
	if err != nil {
		return err
	}
	if proc == nil {
		return providers.ErrNotRunning
	}
	defer proc.Close()
	if err := d.pushUnderVolume(ctx, i, v.Path); err != nil {
		return err
	}
	d.Def.Volumes[i] = local.Volume(v)
	return local.WriteJSON(filepath.Join(d.Path, local.FileDefinition), d.Def)
}

// pushUnderVolume puts the file under the device of volume i, on top of what it has.
func (d *directory) pushUnderVolume(ctx context.Context, i int, path string) error {
	ctx, cancel := context.WithTimeout(ctx, monitorTimeout)
	defer cancel()
	c, err := qmp.Dial(ctx, d.monitor)
	if err != nil {
		return err
	}
	defer c.Close()
	device := fmt.Sprintf("volume%d", i)
	top, err := nodeOf(ctx, c, device)
	if err != nil {
		return err
	}
	n := 0
	if top != device {
		ok := false
		if n, ok = local.Number(top, device+"-", ""); !ok {
			return fmt.Errorf("the machine writes to %q, which is no node of the volume", top)
		}
	}
	next := node{
		"driver": "qcow2", "node-name": fmt.Sprintf("%s-%d", device, n+1), "discard": "unmap", "backing": nil,
		"file": node{"driver": "file", "filename": path, "discard": "unmap"},
	}
	if err := c.Execute(ctx, "blockdev-add", next, nil); err != nil {
		return err
	}
	err = c.Execute(ctx, "blockdev-snapshot", map[string]any{"node": top, "overlay": next["node-name"]}, nil)
	if err != nil {
		// Refused, or perhaps not: a node that is in use is not removed.
		_ = c.Execute(ctx, "blockdev-del", map[string]any{"node-name": next["node-name"]}, nil)
	}
	return err
}
