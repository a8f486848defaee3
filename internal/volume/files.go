// SPDX-License-Identifier: Apache-2.0

package volume

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"github.com/labfile/lab/internal/fsutil"
	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/providers"
	"github.com/labfile/lab/providers/qcow2"
)

// Place is the daemon of another host that keeps a volume's files; zero for this host.
type Place struct {
	Provider string `json:"provider"`
	URI      string `json:"uri"`
}

// String says where that is.
func (p Place) String() string {
	if p == (Place{}) {
		return "on this host"
	}
	return "at " + p.URI
}

// Keeper finds the files of the lab's volumes at a daemon of another host.
type Keeper func(context.Context, Place) (providers.VolumeFiles, error)

// files returns where the files of a volume are kept.
func (s *Store) files(ctx context.Context, at Place) (providers.VolumeFiles, error) {
	if at == (Place{}) {
		return folder(s.dir), nil
	}
	files, err := s.keeper(ctx, at)
	if err != nil {
		return nil, fmt.Errorf("looking for volumes %s: %w", at, err)
	}
	return files, nil
}

// Paths returns what providers.Volume calls files of a volume.
func (s *Store) Paths(ctx context.Context, v Volume, names []string) ([]string, error) {
	files, err := s.files(ctx, v.At)
	if err != nil {
		return nil, err
	}
	paths := make([]string, len(names))
	for i, name := range names {
		paths[i] = files.Path(name)
	}
	return paths, nil
}

// local returns the paths on this host of files that hold what files of a volume do, for
// as long as done is not called, which is never nil.
func (s *Store) local(ctx context.Context, v Volume, names []string) (paths []string, done func(), err error) {
	done = func() {}
	files, err := s.files(ctx, v.At)
	if err != nil {
		return nil, done, err
	}
	dir := ""
	if v.At != (Place{}) {
		if dir, err = os.MkdirTemp(s.dir, "."+v.Name+"@*"); err != nil {
			return nil, done, err
		}
		done = func() { os.RemoveAll(dir) }
	}
	paths, err = files.Open(ctx, names, dir)
	if err != nil {
		done()
		done = func() {}
	}
	return paths, done, err
}

// folder keeps files on this host.
type folder string

// Path returns the absolute path.
func (d folder) Path(name string) string { return filepath.Join(string(d), name) }

// List returns all that is in the folder.
func (d folder) List(context.Context) ([]string, error) {
	entries, err := os.ReadDir(string(d))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	names := make([]string, len(entries))
	for i, e := range entries {
		names[i] = e.Name()
	}
	return names, nil
}

// Make makes an empty file.
func (d folder) Make(_ context.Context, name string, size lab.Bytes) error {
	if err := qcow2.Create(d.Path(name), size); err != nil {
		return err
	}
	return fsutil.SyncFile(d.Path(name))
}

// Put moves a file here, from the same file system.
func (d folder) Put(_ context.Context, name, from string) error {
	return fsutil.Rename(from, d.Path(name))
}

// Open returns the files' own paths.
func (d folder) Open(_ context.Context, names []string, _ string) ([]string, error) {
	paths := make([]string, len(names))
	for i, name := range names {
		paths[i] = d.Path(name)
	}
	return paths, nil
}

// Usage looks at the file.
func (d folder) Usage(_ context.Context, name string) (length, takes lab.Bytes, err error) {
	fi, err := os.Stat(d.Path(name))
	if err != nil {
		return 0, 0, err
	}
	if st, ok := fi.Sys().(*syscall.Stat_t); ok {
		takes = lab.Bytes(st.Blocks * 512)
	}
	return lab.Bytes(fi.Size()), takes, nil
}

// Commit has qemu-img do it.
func (d folder) Commit(ctx context.Context, chain []string) error {
	paths, _ := d.Open(ctx, chain[len(chain)-2:], "")
	if _, err := qemuImg(ctx, "commit", "-q", "-d", chainSpec(paths)); err != nil {
		return err
	}
	return fsutil.SyncFile(paths[0])
}

// Flatten has qemu-img do it.
func (d folder) Flatten(ctx context.Context, chain []string, _ lab.Bytes, name string) error {
	paths, _ := d.Open(ctx, chain, "")
	if err := flatten(ctx, paths, "qcow2", d.Path(name)); err != nil {
		return err
	}
	return fsutil.SyncFile(d.Path(name))
}

// Remove removes a file, or a folder of copies that an interrupted command left.
func (d folder) Remove(_ context.Context, name string) error { return os.RemoveAll(d.Path(name)) }
