// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"fmt"
	"path/filepath"

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
	if err := local.CheckVolumes([]providers.Volume{v}, local.CheckFile); err != nil {
		return err
	}
	d, err := p.openDirectory(ctx, g)
	if err != nil {
		return err
	}
	defer d.Close()
	running := func(ctx context.Context) (bool, error) {
		proc, err := p.find(ctx, d.Path)
		if proc != nil {
			proc.Close()
		}
		return proc != nil, err
	}
	push := func(ctx context.Context, i int) error { return d.pushUnderVolume(ctx, i, v.Path) }
	save := func(_ context.Context, def local.Definition) error {
		return local.WriteJSON(filepath.Join(d.Path, local.FileDefinition), def)
	}
	return d.PushVolume(ctx, v, running, push, save)
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
