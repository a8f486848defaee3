// SPDX-License-Identifier: Apache-2.0

package libvirt

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/providers"
	"github.com/labfile/lab/providers/local"
)

var (
	_ providers.VolumeChanger = (*Remote)(nil)
	_ providers.VolumePusher  = (*Remote)(nil)
	_ providers.VolumeKeeper  = (*Remote)(nil)
)

// SetVolumes does as the Provider's.
func (r *Remote) SetVolumes(ctx context.Context, g lab.Generation, volumes []providers.Volume) error {
	return r.p.setVolumes(ctx, g, volumes, local.CheckAbsolute, r.saved)
}

// PushVolume does as the Provider's.
func (r *Remote) PushVolume(ctx context.Context, g lab.Generation, v providers.Volume) error {
	return r.p.pushVolume(ctx, g, v, local.CheckAbsolute, r.openDirectory, r.saved)
}

// saved gives a generation's domain the definition that its next start goes by.
func (r *Remote) saved(ctx context.Context, d domain, def local.Definition) error {
	from, err := d.stored()
	if err != nil {
		return err
	}
	files, err := r.pool(ctx)
	if err != nil {
		return err
	}
	_, err = r.define(ctx, files, d.Name, def, from)
	return err
}

// VolumeFiles returns the pool's volumes that a lab's volumes lie on.
func (r *Remote) VolumeFiles(ctx context.Context, id lab.ID) (providers.VolumeFiles, error) {
	files, err := r.pool(ctx)
	if err != nil {
		return nil, err
	}
	u := uuidOf(r.p.client + r.p.cfg.Dirs.Volumes(id))
	return volumeFiles{r, files, fmt.Sprintf("lab-%s.%x.", id, u[:4])}, nil
}

// volumeFiles are those of the pool's volumes whose names begin with the prefix.
type volumeFiles struct {
	r      *Remote
	files  *pool
	prefix string
}

func (v volumeFiles) Path(name string) string { return v.files.path(v.prefix + name) }

func (v volumeFiles) List(ctx context.Context) ([]string, error) {
	there, err := v.files.list(ctx)
	if err != nil {
		return nil, err
	}
	var names []string
	for name := range there {
		if name, ok := strings.CutPrefix(name, v.prefix); ok {
			names = append(names, name)
		}
	}
	return names, nil
}

func (v volumeFiles) Make(ctx context.Context, name string, size lab.Bytes) error {
	return v.files.make(ctx, overlayVolume(v.prefix+name, size))
}

func (v volumeFiles) Put(ctx context.Context, name, from string) error {
	f, err := os.Open(from)
	if err != nil {
		return err
	}
	defer f.Close()
	return v.files.put(ctx, v.prefix+name, f, rawVolume)
}

func (v volumeFiles) Open(ctx context.Context, names []string, dir string) ([]string, error) {
	var paths []string
	for _, name := range names {
		f, err := os.OpenFile(filepath.Join(dir, name), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if err != nil {
			return nil, err
		}
		err = v.files.get(ctx, v.prefix+name, f)
		if e := f.Close(); err == nil {
			err = e
		}
		if err != nil {
			return nil, err
		}
		paths = append(paths, f.Name())
	}
	return paths, nil
}

func (v volumeFiles) Usage(ctx context.Context, name string) (length, takes lab.Bytes, err error) {
	n, on, err := v.files.size(ctx, v.prefix+name)
	if isNotFound(err) {
		err = fs.ErrNotExist
	}
	if err != nil {
		return 0, 0, fmt.Errorf("%s: %w", v.Path(name), err)
	}
	return lab.Bytes(n), lab.Bytes(on), nil
}

// Remove ends what works on the volume, too: the daemon was restarted under it, if there is
// any.
func (v volumeFiles) Remove(ctx context.Context, name string) error {
	if err := v.r.p.kill(ctx, domain{Domain: v.helper(name)}); err != nil {
		return err
	}
	return v.files.remove(ctx, v.prefix+name)
}
