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
)

// Upload copies files and folders into the guest, with modes, times and symbolic
// links. If target is a folder or ends in a slash, or there are several sources,
// they go into it; otherwise target is the name that the only source gets. A
// relative target begins in the user's home.
//
// Errors: *SkippedError, ErrDisconnected, those of the file systems.
func (c *Client) Upload(ctx context.Context, sources []string, target string, opt CopyOptions) error {
	return c.files(ctx, opt, func(cp *copier) error {
		into := len(sources) > 1 || strings.HasSuffix(target, "/")
		to := remotePath(target)
		if fi, err := cp.sftp.Stat(to); err == nil && fi.IsDir() {
			into = true
		} else if into {
			return fmt.Errorf("copying into %q: %w", target, errNoFolder(err))
		}
		for _, src := range sources {
			// A link that was named is followed, as cp and scp do.
			fi, err := os.Stat(src)
			if err != nil {
				return err
			}
			dst := to
			if into {
				abs, err := filepath.Abs(src)
				if err != nil {
					return err
				}
				dst = path.Join(to, filepath.Base(abs))
			}
			if err := cp.upload(src, dst, fi); err != nil {
				return err
			}
		}
		return nil
	})
}

// errNoFolder says why something is not a folder that files could go into.
func errNoFolder(err error) error {
	if err != nil {
		return err
	}
	return errors.New("not a folder")
}

func (c *copier) upload(src, dst string, fi fs.FileInfo) error {
	if err := context.Cause(c.ctx); err != nil {
		return err
	}
	file, dir, link := kindOf(fi.Mode())
	var err error
	switch {
	case file:
		err = c.uploadFile(src, dst)
	case dir:
		err = c.uploadDir(src, dst, fi)
	case link:
		err = c.uploadLink(src, dst)
	default:
		c.skipped = append(c.skipped, src)
	}
	return err
}

func (c *copier) uploadFile(src, dst string) error {
	in, err := os.Open(src)
	if err != nil {
		return err
	}
	defer in.Close()
	fi, err := in.Stat()
	if err != nil {
		return err
	}
	out, err := c.sftp.OpenFile(dst, os.O_WRONLY|os.O_CREATE|os.O_TRUNC)
	if err != nil {
		return fmt.Errorf("writing %q in the guest: %w", dst, err)
	}
	n := c.counter(src, fi.Size())
	n.Reader = in
	_, err = out.ReadFromWithConcurrency(n, requests)
	if err == nil {
		err = out.Chmod(permissions(fi.Mode()))
	}
	if err := errors.Join(err, out.Close()); err != nil {
		return fmt.Errorf("writing %q in the guest: %w", dst, err)
	}
	if err := c.sftp.Chtimes(dst, fi.ModTime(), fi.ModTime()); err != nil {
		return fmt.Errorf("setting the time of %q in the guest: %w", dst, err)
	}
	n.end()
	return nil
}

func (c *copier) uploadDir(src, dst string, fi fs.FileInfo) error {
	entries, err := os.ReadDir(src)
	if err != nil {
		return err
	}
	if err := c.sftp.Mkdir(dst); err != nil {
		if there, serr := c.sftp.Stat(dst); serr != nil || !there.IsDir() {
			return fmt.Errorf("making folder %q in the guest: %w", dst, err)
		}
	}
	for _, e := range entries {
		fi, err := e.Info()
		if err != nil {
			return err
		}
		if err := c.upload(filepath.Join(src, e.Name()), path.Join(dst, e.Name()), fi); err != nil {
			return err
		}
	}
	// Last, so that a folder that nobody may write to can be filled, and that
	// filling it does not change its time.
	if err := c.sftp.Chmod(dst, permissions(fi.Mode())); err != nil {
		return fmt.Errorf("setting the mode of %q in the guest: %w", dst, err)
	}
	if err := c.sftp.Chtimes(dst, fi.ModTime(), fi.ModTime()); err != nil {
		return fmt.Errorf("setting the time of %q in the guest: %w", dst, err)
	}
	return nil
}

func (c *copier) uploadLink(src, dst string) error {
	to, err := os.Readlink(src)
	if err != nil {
		return err
	}
	if fi, err := c.sftp.Lstat(dst); err == nil && !fi.IsDir() {
		if err := c.sftp.Remove(dst); err != nil {
			return fmt.Errorf("replacing %q in the guest: %w", dst, err)
		}
	}
	if err := c.sftp.Symlink(to, dst); err != nil {
		return fmt.Errorf("linking %q in the guest: %w", dst, err)
	}
	return nil
}
