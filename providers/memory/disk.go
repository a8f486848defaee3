// SPDX-License-Identifier: Apache-2.0

package memory

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/providers"
	"github.com/labfile/lab/providers/qcow2"
)

// disk is what is kept of a machine's disk: how much was written, not what. So
// the overlays that are frozen are real files, but empty, and nobody can read the
// disk from outside.
type disk struct {
	taken   lab.Bytes // written in all
	written lab.Bytes // since the birth
	layers  []string  // frozen, lowest first
	birth   int       // so many of them are the birth; 0 if there is none
}

func (d *disk) write(n lab.Bytes) {
	d.taken += n
	if d.birth > 0 {
		d.written += n
	}
}

// Freeze notes the birth.
func (p *Provider) Freeze(ctx context.Context, g lab.Generation) error {
	if _, err := p.freeze(ctx, g, true); err != nil {
		return fmt.Errorf("freezing machine %q: %w", g, err)
	}
	return nil
}

// Snapshot adds a frozen overlay.
func (p *Provider) Snapshot(ctx context.Context, g lab.Generation) (providers.Frozen, error) {
	f, err := p.freeze(ctx, g, false)
	if err != nil {
		return f, fmt.Errorf("snapshotting machine %q: %w", g, err)
	}
	return f, nil
}

func (p *Provider) freeze(ctx context.Context, g lab.Generation, birth bool) (providers.Frozen, error) {
	m, err := p.get(ctx, g)
	if err != nil {
		return providers.Frozen{}, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	d := &m.disk
	f := providers.Frozen{Size: m.spec.Disk}
	if f.Size == 0 {
		f.Size = m.spec.Image.Size
	}
	if birth && d.birth > 0 {
		return f, nil
	}
	dir, err := p.diskDir(g)
	if err != nil {
		return providers.Frozen{}, err
	}
	path := filepath.Join(dir, fmt.Sprintf("disk.%d.qcow2", len(d.layers)))
	if err := qcow2.Create(path, f.Size); err != nil {
		return providers.Frozen{}, err
	}
	if err := os.Chmod(path, 0o400); err != nil {
		return providers.Frozen{}, err
	}
	from := len(d.layers)
	d.layers = append(d.layers, path)
	if birth {
		from, d.birth = 0, len(d.layers)
	}
	f.Layers = append(f.Layers, d.layers[from:]...)
	return f, nil
}

// diskDir makes the directory of a generation's overlays. The caller has p.mu.
func (p *Provider) diskDir(g lab.Generation) (string, error) {
	root := p.cfg.Dir
	if root == "" {
		if p.temp == "" {
			var err error
			if p.temp, err = os.MkdirTemp("", "lab-memory-"); err != nil {
				return "", err
			}
		}
		root = p.temp
	}
	dir := filepath.Join(root, string(g.Lab), string(g.Machine), fmt.Sprint(g.Number))
	return dir, os.MkdirAll(dir, 0o700)
}

// removeDisk removes the overlays of a machine that is no longer among the
// machines, and what directories are empty then.
func (p *Provider) removeDisk(m *machine) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(m.disk.layers) == 0 {
		return nil
	}
	dir := filepath.Dir(m.disk.layers[0])
	if again := p.machines[m.spec.Generation]; again != nil && len(again.disk.layers) > 0 {
		return nil // made anew, in the same place
	}
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	for _, parent := range []string{filepath.Dir(dir), filepath.Dir(filepath.Dir(dir))} {
		if os.Remove(parent) != nil {
			return nil
		}
	}
	if p.temp != "" && os.Remove(p.temp) == nil {
		p.temp = ""
	}
	return nil
}

var _ providers.VolumePusher = (*Provider)(nil)

// SetVolumes gives the generation other volumes from its next start on.
func (p *Provider) SetVolumes(ctx context.Context, g lab.Generation, volumes []providers.Volume) error {
	m, err := p.get(ctx, g)
	if err == nil {
		err = checkStorage(providers.Spec{Volumes: volumes})
	}
	if err != nil {
		return fmt.Errorf("changing the volumes of machine %q: %w", g, err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	m.spec.Volumes = slices.Clone(volumes)
	return nil
}

// PushVolume makes the generation have another file on top of a volume.
func (p *Provider) PushVolume(ctx context.Context, g lab.Generation, v providers.Volume) error {
	err := checkStorage(providers.Spec{Volumes: []providers.Volume{v}})
	if err == nil {
		err = p.pushVolume(ctx, g, v)
	}
	if err != nil {
		return fmt.Errorf("putting a file on top of volume %q of machine %q: %w", v.Name, g, err)
	}
	return nil
}

func (p *Provider) pushVolume(ctx context.Context, g lab.Generation, v providers.Volume) error {
	m, _, err := p.guest(ctx, g)
	if err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	i := slices.IndexFunc(m.spec.Volumes, func(w providers.Volume) bool { return w.Name == v.Name && !w.ReadOnly })
	if i < 0 {
		return fmt.Errorf("%w: it writes to no volume of that name", providers.ErrNotFound)
	}
	m.spec.Volumes = slices.Clone(m.spec.Volumes)
	m.spec.Volumes[i] = v
	return nil
}

// volumeInUse refuses what QEMU's locks on images refuse. The caller has p.mu.
func (p *Provider) volumeInUse(m *machine) error {
	for _, o := range p.machines {
		if o == m || o.running == nil {
			continue
		}
		for _, theirs := range o.spec.Volumes {
			for _, v := range m.spec.Volumes {
				if !v.ReadOnly && reads(theirs, v.Path) || !theirs.ReadOnly && reads(v, theirs.Path) {
					return fmt.Errorf("%w: volume %q (%s) is attached to machine %q; stop that machine first",
						providers.ErrInUse, v.Name, v.Path, o.spec.Generation)
				}
			}
		}
	}
	return nil
}

func reads(v providers.Volume, path string) bool {
	return v.Path == path || slices.Contains(v.Layers, path)
}

// checkStorage looks at volumes and mounts. Nothing is opened: the guests of this
// provider read none of them.
func checkStorage(s providers.Spec) error {
	if len(s.Volumes) > providers.MaxVolumes || len(s.Mounts) > providers.MaxMounts {
		return errors.New("more volumes or mounts than a machine can have")
	}
	seen := map[string]bool{}
	for _, v := range s.Volumes {
		if v.Name == "" || len(v.Name) > 20 || seen["volume "+v.Name] {
			return fmt.Errorf("%q is not the name of a volume, or that of two", v.Name)
		}
		if !filepath.IsAbs(v.Path) {
			return fmt.Errorf("volume %q: %q is not an absolute path", v.Name, v.Path)
		}
		seen["volume "+v.Name] = true
	}
	for _, m := range s.Mounts {
		if m.Tag == "" || len(m.Tag) > 31 || seen["mount "+m.Tag] {
			return fmt.Errorf("%q is not the tag of a mount, or that of two", m.Tag)
		}
		if !filepath.IsAbs(m.Path) {
			return fmt.Errorf("mount %q: %q is not an absolute path", m.Tag, m.Path)
		}
		seen["mount "+m.Tag] = true
	}
	return nil
}
