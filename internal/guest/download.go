// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"time"
)

// maxDepth bounds how deep folders nest: a guest could make it endless.
const maxDepth = 200

// ErrUnsafeName says that the guest named a file in a way that would leave the
// folder it is copied to.
var ErrUnsafeName = errors.New("unsafe file name from the guest")

// errNoFile says that a file cannot go where something else is.
var errNoFile = errors.New("not an ordinary file")

// Download copies files and folders out of the guest, with modes (but for set-id
// bits), times and symbolic links. Where they go is decided as with Upload. What
// the guest says is not trusted: nothing is written outside the target, and no
// symbolic link from the guest is followed.
//
// Errors: *SkippedError, ErrUnsafeName, ErrDisconnected, those of the file systems.
func (c *Client) Download(ctx context.Context, sources []string, target string, opt CopyOptions) error {
	return c.files(ctx, opt, func(cp *copier) error {
		into := len(sources) > 1 || strings.HasSuffix(target, string(filepath.Separator))
		if fi, err := os.Stat(target); err == nil && fi.IsDir() {
			into = true
		} else if into {
			return fmt.Errorf("copying into %q: %w", target, errNoFolder(err))
		}
		for _, src := range sources {
			if err := cp.source(remotePath(src), target, into); err != nil {
				return err
			}
		}
		return nil
	})
}

// source copies one source, whose name and place the user chose.
func (c *copier) source(src, target string, into bool) error {
	fi, err := c.sftp.Stat(src)
	if err != nil {
		return fmt.Errorf("reading %q in the guest: %w", src, err)
	}
	if into {
		name := path.Base(src)
		if name == "." || name == ".." || name == "/" {
			// The folder's own name is the guest's to tell.
			real, err := c.sftp.RealPath(src)
			if err != nil {
				return fmt.Errorf("reading %q in the guest: %w", src, err)
			}
			if name = path.Base(real); !safeName(name) {
				return fmt.Errorf("%w: %q", ErrUnsafeName, real)
			}
		}
		target = filepath.Join(target, name)
	}
	file, dir, _ := kindOf(fi.Mode())
	switch {
	case dir:
		if err := os.Mkdir(target, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
		root, err := os.OpenRoot(target)
		if err != nil {
			return err
		}
		defer root.Close()
		return c.folder(src, root, ".", fi, 0)
	case file:
		// The target may be a link of the user's own.
		if real, err := filepath.EvalSymlinks(target); err == nil {
			target = real
		}
		root, err := os.OpenRoot(filepath.Dir(target))
		if err != nil {
			return err
		}
		defer root.Close()
		return c.file(src, root, filepath.Base(target), fi)
	}
	c.skipped = append(c.skipped, src)
	return nil
}

// safeName reports whether a name from the guest is the name of one file.
func safeName(name string) bool {
	return name != "" && name != "." && name != ".." && !strings.ContainsAny(name, "/\x00") &&
		!strings.ContainsRune(name, filepath.Separator) && filepath.IsLocal(name)
}

// folder copies what is in the guest's folder src to the folder dst of root, which
// exists.
func (c *copier) folder(src string, root *os.Root, dst string, fi fs.FileInfo, depth int) error {
	if depth > maxDepth {
		return fmt.Errorf("copying %q: more than %d folders inside each other", src, maxDepth)
	}
	entries, err := c.sftp.ReadDirContext(c.ctx, src)
	if err != nil {
		return fmt.Errorf("reading folder %q in the guest: %w", src, err)
	}
	for _, e := range entries {
		if e.Name() == "." || e.Name() == ".." {
			continue
		}
		if !safeName(e.Name()) {
			return fmt.Errorf("%w: %q in %q", ErrUnsafeName, e.Name(), src)
		}
		if err := context.Cause(c.ctx); err != nil {
			return err
		}
		if err := c.entry(path.Join(src, e.Name()), root, filepath.Join(dst, e.Name()), e, depth); err != nil {
			return err
		}
	}
	if err := root.Chmod(dst, permissions(fi.Mode())); err != nil {
		return err
	}
	return root.Chtimes(dst, time.Time{}, fi.ModTime())
}

func (c *copier) entry(src string, root *os.Root, dst string, fi fs.FileInfo, depth int) error {
	file, dir, link := kindOf(fi.Mode())
	there, err := root.Lstat(dst)
	if err == nil && there.Mode()&fs.ModeType == fs.ModeSymlink {
		// It may have come from the guest a moment ago, to lead us astray.
		if err := root.Remove(dst); err != nil {
			return err
		}
	}
	switch {
	case file:
		return c.file(src, root, dst, fi)
	case dir:
		if err := root.Mkdir(dst, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
		return c.folder(src, root, dst, fi, depth+1)
	case link:
		to, err := c.sftp.ReadLink(src)
		if err != nil {
			return fmt.Errorf("reading link %q in the guest: %w", src, err)
		}
		if there != nil && there.Mode().IsRegular() {
			if err := root.Remove(dst); err != nil {
				return err
			}
		}
		return root.Symlink(to, dst)
	}
	c.skipped = append(c.skipped, src)
	return nil
}

// file copies one file. What was there before stays until the copy is complete.
// A device or a pipe is refused: it would be replaced, /dev/null of the host included.
func (c *copier) file(src string, root *os.Root, dst string, fi fs.FileInfo) (err error) {
	if there, err := root.Lstat(dst); err == nil {
		if file, _, link := kindOf(there.Mode()); !file && !link {
			return fmt.Errorf("copying to %q: %w", filepath.Join(root.Name(), dst), errNoFile)
		}
	}
	in, err := c.sftp.Open(src)
	if err != nil {
		return fmt.Errorf("reading %q in the guest: %w", src, err)
	}
	defer in.Close()
	part := dst + ".lab-part"
	if err := root.Remove(part); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	out, err := root.OpenFile(part, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = root.Remove(part)
		}
	}()
	n := c.counter(src, fi.Size())
	n.Writer = out
	_, err = in.WriteTo(n)
	if err != nil {
		err = fmt.Errorf("reading %q in the guest: %w", src, err)
	}
	if err = errors.Join(err, out.Chmod(permissions(fi.Mode())), out.Close()); err != nil {
		return err
	}
	if err = root.Chtimes(part, time.Time{}, fi.ModTime()); err != nil {
		return err
	}
	if err = root.Rename(part, dst); err != nil {
		return err
	}
	n.end()
	return nil
}
