// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/labfile/lab/internal/guest/filestream"
)

// tarConflicts reads what conflictList made from stdin, and succeeds if tar does with all
// that is there already in folder $1 what sftp would: it would put a folder in the place of
// a file, a link in that of an empty folder, and set the mode of a device. xargs may cut the
// list after any argument.
const tarConflicts = `cd -- "$1" || exit
exec xargs -0 sh -c 'for x do
	p=${x#?}
	case $x in
	d*) [ -d "$p" ] || { [ ! -e "$p" ] && [ ! -L "$p" ]; } || exit 255 ;;
	l*) [ ! -d "$p" ] || [ -L "$p" ] || exit 255 ;;
	f*) [ -f "$p" ] || [ ! -e "$p" ] || exit 255 ;;
	esac
done' lab`

// conflictList lists items for tarConflicts: each is a letter for its kind and its path, as
// in "f./a/b", and ends in NUL.
func conflictList(items []item) []byte {
	var list bytes.Buffer
	for _, i := range items {
		kind := byte('f')
		switch {
		case i.info.IsDir():
			kind = 'd'
		case i.info.Mode()&fs.ModeSymlink != 0:
			kind = 'l'
		}
		list.WriteByte(kind)
		list.WriteString(i.name)
		list.WriteByte(0)
	}
	return list.Bytes()
}

// uploadTar copies what is in folder src to folder dst, which exists and was made for it
// if it is fresh. Errors: errNoTar and errNotByTar if it copied nothing.
func (c *sftpCopier) uploadTar(src, dst string, fresh bool) error {
	a := &archiver{c: c, src: src}
	if err := a.walk(src, ".", 0); err != nil {
		return err
	}
	if len(a.items) == 0 {
		c.skipped, c.vanished = append(c.skipped, a.skipped...), append(c.vanished, a.vanished...)
		return nil
	}
	if !fresh && !c.agrees(dst, a.items) {
		return errNotByTar
	}
	t, err := c.tar(tarExtract, dst)
	if err != nil {
		return err
	}
	defer t.Close()
	go io.Copy(io.Discard, t.out) // a guest that says more than it should does not stop
	serr := a.send(t.in)
	if cerr := t.in.Close(); serr == nil && !errors.Is(cerr, io.EOF) {
		serr = cerr
	}
	var local *localError
	if errors.As(serr, &local) { // tar knows of a cut only
		return local.error
	}
	_, _, err = t.ended(dst)
	if err == nil && serr != nil {
		err = fmt.Errorf("copying files: %w", ErrDisconnected)
	}
	if err == nil {
		c.skipped, c.vanished = append(c.skipped, a.skipped...), append(c.vanished, a.vanished...)
	}
	return err
}

// agrees reports whether tar does with what is in dst as sftp would.
func (c *sftpCopier) agrees(dst string, items []item) bool {
	if entries, err := c.ReadDirContext(c.ctx, dst); err == nil && len(entries) == 0 {
		return true
	}
	s, err := c.login.ssh.NewSession()
	if err != nil {
		return false
	}
	defer s.Close()
	s.Stdin = bytes.NewReader(conflictList(items))
	return s.Run(Quote([]string{"sh", "-c", tarConflicts, "lab", dst})) == nil
}

// item is something to copy, by its path below the folder that is copied: "./a/b".
type item struct {
	name string
	info fs.FileInfo
}

// archiver makes an archive of a folder of this host.
type archiver struct {
	c     *sftpCopier
	src   string
	items []item
	lost  string // a folder that was removed since it was listed, with a slash

	skipped, vanished []string
}

// localError is an error of this host.
type localError struct{ error }

func (e *localError) Unwrap() error { return e.error }

// gone notes what was removed while its folder was copied.
func (a *archiver) gone(p string, err error) bool {
	if !errors.Is(err, fs.ErrNotExist) {
		return false
	}
	a.vanished = append(a.vanished, p)
	return true
}

// walk lists what is in a folder.
func (a *archiver) walk(dir, name string, depth int) error {
	if err := context.Cause(a.c.ctx); err != nil {
		return err
	}
	if depth > filestream.MaxDepth {
		return fmt.Errorf("copying %q: more than %d folders inside each other", dir, filestream.MaxDepth)
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, x := range entries {
		from := filepath.Join(dir, x.Name())
		fi, err := x.Info()
		if err == nil && fi.Mode()&(fs.ModeType&^(fs.ModeDir|fs.ModeSymlink)) != 0 {
			a.skipped = append(a.skipped, from)
			continue
		}
		sub := name + "/" + x.Name()
		if err == nil {
			a.items = append(a.items, item{sub, fi})
			if fi.IsDir() {
				if err = a.walk(from, sub, depth+1); err != nil {
					a.items = a.items[:len(a.items)-1] // nothing was listed in one that is gone
				}
			}
		}
		if err != nil && !a.gone(from, err) {
			return err
		}
	}
	return nil
}

// send writes the archive. What is wrong with files of this host is a *localError.
func (a *archiver) send(w io.Writer) error {
	out := bufio.NewWriterSize(w, 64<<10) // what an archive consists of is small
	archive := tar.NewWriter(out)
	for _, i := range a.items {
		if err := context.Cause(a.c.ctx); err != nil {
			return &localError{err}
		}
		if a.lost != "" && strings.HasPrefix(i.name, a.lost) {
			continue
		}
		if err := a.one(archive, i); err != nil {
			return err
		}
	}
	if err := archive.Close(); err != nil {
		return err
	}
	return out.Flush()
}

func (a *archiver) one(archive *tar.Writer, i item) error {
	from := filepath.Join(a.src, filepath.FromSlash(i.name))
	h := &tar.Header{
		Name: i.name, Mode: int64(i.info.Mode().Perm()), ModTime: i.info.ModTime().Truncate(time.Second),
		Format: tar.FormatGNU, // of which nothing is longer than it must be; it has whole seconds, as sftp
	}
	switch {
	case i.info.IsDir():
		_, err := os.Lstat(from)
		if a.gone(from, err) {
			a.lost = i.name + "/"
			return nil
		}
		if err != nil {
			return &localError{err}
		}
		h.Typeflag, h.Name = tar.TypeDir, h.Name+"/"
		return archive.WriteHeader(h)
	case i.info.Mode()&fs.ModeSymlink != 0:
		to, err := os.Readlink(from)
		if a.gone(from, err) {
			return nil
		}
		if err != nil {
			return &localError{err}
		}
		h.Typeflag, h.Linkname = tar.TypeSymlink, to
		return archive.WriteHeader(h)
	}
	f, err := os.OpenFile(from, os.O_RDONLY|syscall.O_NONBLOCK, 0) // it may be a FIFO now
	if a.gone(from, err) {
		return nil
	}
	if err != nil {
		return &localError{err}
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return &localError{err}
	}
	if !fi.Mode().IsRegular() {
		a.skipped = append(a.skipped, from)
		return nil
	}
	h.Typeflag, h.Size, h.Mode, h.ModTime = tar.TypeReg, fi.Size(), int64(fi.Mode().Perm()), fi.ModTime().Truncate(time.Second)
	if err := archive.WriteHeader(h); err != nil {
		return err
	}
	in := &source{Reader: io.LimitReader(f, h.Size)}
	n := &count{Reader: in, ctx: a.c.ctx, size: h.Size, path: from, tell: a.c.tell}
	n.add(0)
	_, err = io.Copy(archive, struct{ io.Reader }{n})
	switch {
	case in.err != nil:
		return &localError{in.err}
	case err != nil:
		return err
	case n.done < h.Size:
		return &localError{fmt.Errorf("%s became shorter while it was copied; copy it again when nothing writes to it", path.Clean(from))}
	}
	return nil
}
