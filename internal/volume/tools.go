// SPDX-License-Identifier: Apache-2.0

package volume

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/labfile/lab/boxes/disk"
	"github.com/labfile/lab/internal/fsutil"
	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/program"
	"github.com/labfile/lab/providers"
)

// MissingError says that the host lacks a program.
type MissingError struct{ Program, Package string }

// Error implements error.
func (e *MissingError) Error() string { return e.Program + " not found" }

// Unwrap returns providers.ErrIncapable.
func (e *MissingError) Unwrap() error { return providers.ErrIncapable }

// Hint is the next step.
func (e *MissingError) Hint() string {
	return "install it from your distribution, on Debian: apt install " + e.Package
}

// tool runs a program of the host to its end and returns what it printed on standard
// output. An exit code among passing is no error.
func tool(ctx context.Context, pkg, name string, passing []int, args ...string) ([]byte, error) {
	path, err := program.Look(name)
	if err != nil {
		return nil, &MissingError{name, pkg}
	}
	var out, said strings.Builder
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Stdout, cmd.Stderr = &out, &said
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	err = program.Run(cmd)
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		for _, code := range passing {
			if exit.ExitCode() == code {
				return []byte(out.String()), nil
			}
		}
		return nil, fmt.Errorf("%s: %w: %s", name, err, strings.TrimSpace(said.String()+out.String()))
	}
	return []byte(out.String()), err
}

func qemuImg(ctx context.Context, args ...string) ([]byte, error) {
	return tool(ctx, "qemu-utils", "qemu-img", nil, args...)
}

// makeExt4 makes an empty file system of the volume's size in the qcow2 file.
func (s *Store) makeExt4(ctx context.Context, v Volume, file string) error {
	raw, err := s.scratch(v.Name)
	if err != nil {
		return err
	}
	defer os.Remove(raw)
	if err := os.Truncate(raw, int64(v.Size)); err != nil {
		return err
	}
	// Label: 16 bytes at most (ext4's superblock, s_volume_name). Nothing is
	// reserved for root: a volume is for data.
	_, err = tool(ctx, "e2fsprogs", "mke2fs", nil, "-q", "-F", "-t", "ext4", "-b", "4096", "-m", "0",
		"-L", v.Name[:min(len(v.Name), 16)],
		"-E", "root_owner=0:0,nodiscard,lazy_itable_init=1,lazy_journal_init=1", raw)
	if err != nil {
		return err
	}
	_, err = qemuImg(ctx, "convert", "-f", "raw", "-O", "qcow2", raw, file)
	return err
}

// scratch makes an empty file beside the volume, which the next change of the volume
// removes if its maker did not.
func (s *Store) scratch(name string) (string, error) {
	f, err := os.CreateTemp(s.dir, "."+name+"@*")
	if err != nil {
		return "", err
	}
	return f.Name(), f.Close()
}

// chainSpec names a chain of qcow2 files to QEMU's tools, each format and backing
// file said outright.
func chainSpec(paths []string) string {
	var below any
	for _, p := range paths {
		below = map[string]any{
			"driver": "qcow2", "backing": below,
			"file": map[string]any{"driver": "file", "filename": p},
		}
	}
	text, err := json.Marshal(below)
	if err != nil {
		panic("strings only: " + err.Error())
	}
	return "json:" + string(text)
}

// flatten writes what a chain adds up to into one file.
func flatten(ctx context.Context, chain []string, format, to string) error {
	_, err := qemuImg(ctx, "convert", "-O", format, chainSpec(chain), to)
	return err
}

// Clone makes a volume of its own of what another one held when the snapshot was
// taken. Errors: ErrExists.
func (s *Store) Clone(ctx context.Context, name string, from Snapshot, as string) (Volume, error) {
	v, err := s.Get(name)
	if err != nil {
		return Volume{}, err
	}
	clone, err := s.begin(as, v.At)
	if err != nil {
		return clone, fmt.Errorf("cloning volume %s as %s: %w", name, as, err)
	}
	clone.Size, clone.FS, clone.Owner, clone.Mode = from.Size, v.FS, v.Owner, v.Mode
	err = s.found(ctx, &clone, func(files providers.VolumeFiles, file string) error {
		return files.Flatten(ctx, from.Layers, from.Size, file)
	})
	if err != nil {
		return clone, fmt.Errorf("cloning volume %s: %w", name, err)
	}
	return clone, nil
}

// Export writes a snapshot of a volume into one new file of the format "qcow2" or
// "raw", which anything can read.
func (s *Store) Export(ctx context.Context, name string, from Snapshot, format, to string) error {
	if err := Exportable(to); err != nil {
		return err
	}
	v, err := s.Get(name)
	if err != nil {
		return err
	}
	chain, done, err := s.local(ctx, v, from.Layers)
	defer done()
	if err != nil {
		return err
	}
	// Made first with its mode, which qemu-img keeps: other users never read the data.
	tmp := to + ".part"
	if err := makePrivate(tmp); err != nil {
		return fmt.Errorf("writing %s: %w", to, err)
	}
	if err := flatten(ctx, chain, format, tmp); err != nil {
		os.Remove(tmp)
		return fmt.Errorf("writing %s: %w", to, err)
	}
	if err := fsutil.Rename(tmp, to); err != nil {
		os.Remove(tmp)
		return fmt.Errorf("writing %s: %w", to, err)
	}
	return nil
}

// makePrivate makes an empty file that only its owner reads, in the place of one that an
// export left which was killed.
func makePrivate(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	return f.Close()
}

// Exportable returns an error if Export would not make that file.
func Exportable(to string) error {
	if _, err := os.Lstat(to); !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%s exists already", to)
	}
	fi, err := os.Stat(filepath.Dir(to))
	if err == nil && !fi.IsDir() || errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("there is no folder %s", filepath.Dir(to))
	}
	return err
}

// MismatchError says that a disk image cannot become the volume that the Labfile
// declares.
type MismatchError struct {
	Volume, Key string // Key is that of the Labfile: "size" or "fs"
	Has, Wants  string // what the image has, and what the Labfile says
}

// Error implements error.
func (e *MismatchError) Error() string {
	if e.Key == "size" {
		return fmt.Sprintf("the image has %s, and the Labfile gives volume %s %s", e.Has, e.Volume, e.Wants)
	}
	return fmt.Sprintf("the image has the file system %s, and the Labfile gives volume %s %s", e.Has, e.Volume, e.Wants)
}

// Hint is the next step.
func (e *MismatchError) Hint() string {
	return fmt.Sprintf("write %s: %s for the volume in the Labfile, or import the image under another name", e.Key, e.Has)
}

// Import makes a volume of a disk image, which is inspected first: it may come from
// anywhere. The volume's files are kept at a place. want is what the Labfile says of
// the volume, nil if nothing. Errors: ErrExists, disk.ErrUnsafe, *MismatchError,
// *fsutil.KindError.
func (s *Store) Import(ctx context.Context, from, name string, want *lab.Volume, at Place) (Volume, error) {
	v, err := s.importFrom(ctx, from, name, want, at)
	if err != nil {
		return v, fmt.Errorf("importing volume %s: %w", name, err)
	}
	return v, nil
}

func (s *Store) importFrom(ctx context.Context, from, name string, want *lab.Volume, at Place) (Volume, error) {
	f, err := fsutil.OpenRegular(from)
	if err != nil {
		return Volume{}, err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return Volume{}, err
	}
	info, err := disk.Inspect(f, fi.Size())
	if err != nil {
		return Volume{}, err
	}
	size := lab.Bytes(info.VirtualSize)
	if want != nil && size > want.Size {
		return Volume{}, &MismatchError{name, "size", size.String(), want.Size.String()}
	}
	v, err := s.begin(name, at)
	if err != nil {
		return v, err
	}
	v.Size = size
	source := map[string]any{"driver": info.Format, "file": map[string]any{"driver": "file", "filename": from}}
	if info.Format == disk.QCOW2 {
		source["backing"] = nil
	}
	text, err := json.Marshal(source)
	if err != nil {
		return v, err
	}
	err = s.found(ctx, &v, func(files providers.VolumeFiles, file string) error {
		return s.put(ctx, v, files, file, func(to string) error {
			if _, err := qemuImg(ctx, "convert", "-O", "qcow2", "json:"+string(text), to); err != nil {
				return err
			}
			v.FS, err = s.fileSystem(ctx, name, to)
			if err != nil || want == nil || v.FS == want.FS {
				return err
			}
			if want.FS != "none" {
				return &MismatchError{name, "fs", v.FS, want.FS}
			}
			v.FS = want.FS // what is on a bare disk is the guest's own affair
			return nil
		})
	})
	return v, err
}

// fileSystem looks for the magic number of ext4 (its superblock begins at 1024, the
// number stands at 0x38 of that).
func (s *Store) fileSystem(ctx context.Context, name, file string) (string, error) {
	raw, err := s.scratch(name)
	if err != nil {
		return "", err
	}
	defer os.Remove(raw)
	if _, err := qemuImg(ctx, "dd", "-f", "qcow2", "-O", "raw", "bs=4096", "count=1", "if="+file, "of="+raw); err != nil {
		return "", err
	}
	head, err := os.ReadFile(raw)
	if err != nil {
		return "", err
	}
	if len(head) >= 1024+0x3a && head[1024+0x38] == 0x53 && head[1024+0x39] == 0xef {
		return "ext4", nil
	}
	return "none", nil
}

// Grow makes a volume larger, and its file system with it. That rewrites it: its
// snapshots go on with what they have.
func (s *Store) Grow(ctx context.Context, name string, size lab.Bytes) error {
	v, err := s.Get(name)
	if err != nil || size == v.Size {
		return err
	}
	if size < v.Size {
		return fmt.Errorf("volume %s has %s and cannot shrink to %s", name, v.Size, size)
	}
	old := v
	v.Size = size
	if v.FS != "ext4" {
		for range 2 { // what lies below the last file is to have the size, too
			if err := s.grown(ctx, &v); err != nil {
				return fmt.Errorf("growing volume %s: %w", name, err)
			}
		}
		return s.save(ctx, v)
	}
	err = s.found(ctx, &v, func(files providers.VolumeFiles, file string) error {
		chain, done, err := s.local(ctx, old, old.Layers)
		defer done()
		if err != nil {
			return err
		}
		return s.put(ctx, v, files, file, func(to string) error { return s.growExt4(ctx, v, chain, to) })
	})
	if err != nil {
		return fmt.Errorf("growing volume %s: %w", name, err)
	}
	return nil
}

// growExt4 writes the file system of a chain into a new file, larger.
func (s *Store) growExt4(ctx context.Context, v Volume, chain []string, to string) error {
	raw, err := s.scratch(v.Name)
	if err != nil {
		return err
	}
	defer os.Remove(raw)
	if err := flatten(ctx, chain, "raw", raw); err != nil {
		return err
	}
	if err := os.Truncate(raw, int64(v.Size)); err != nil {
		return err
	}
	// resize2fs wants a file system that was just checked. Code 1: something was
	// put right, such as a journal that was not yet played back.
	if _, err := tool(ctx, "e2fsprogs", "e2fsck", []int{1}, "-f", "-p", raw); err != nil {
		return err
	}
	if _, err := tool(ctx, "e2fsprogs", "resize2fs", nil, raw, strconv.FormatInt(int64(v.Size/lab.KiB), 10)+"K"); err != nil {
		return err
	}
	_, err = qemuImg(ctx, "convert", "-f", "raw", "-O", "qcow2", raw, to)
	return err
}
