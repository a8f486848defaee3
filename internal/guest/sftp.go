// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"time"

	"github.com/pkg/sftp"

	"github.com/labfile/lab/internal/guest/filestream"
)

// sftpCopier copies by sftp, and folders by the guest's tar if it can: the way into a guest
// whose ssh server knows nothing else.
type sftpCopier struct {
	*sftp.Client
	login *Client
	ctx   context.Context
	opt   CopyOptions
	tell  func(path string, done, total int64) // opt's progress
	noTar bool                                 // it was tried, and the guest has none

	skipped, vanished []string
}

// requests is how many reads or writes of a file are under way at once. A guest
// under emulation is slow to answer.
const requests = 64

func (c *Client) sftp(ctx context.Context, opt CopyOptions) (*sftpCopier, error) {
	client, err := sftp.NewClient(c.ssh, sftp.UseConcurrentWrites(true), sftp.MaxConcurrentRequestsPerFile(requests))
	if err != nil {
		return nil, fmt.Errorf("starting a file transfer: %w", lost(err))
	}
	return &sftpCopier{Client: client, login: c, ctx: ctx, opt: opt, tell: opt.progress()}, nil
}

// missing makes the words of an sftp server those of an agent.
func missing(what filestream.What, p string, err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return &filestream.Failure{What: what, Path: p}
	}
	return inGuest(p, err)
}

// inGuest says what could not be read or written there.
func inGuest(p string, err error) error {
	if err == nil || errors.Is(err, sftp.ErrSSHFxConnectionLost) {
		return err
	}
	var f *filestream.Failure
	if errors.As(err, &f) {
		return f
	}
	return filestream.Said(err, p+": "+err.Error())
}

// finish tells failures of the guest from those of this host.
func (c *sftpCopier) finish(err error) (filestream.Outcome, error) {
	c.Close()
	var f *filestream.Failure
	switch {
	case errors.Is(err, sftp.ErrSSHFxConnectionLost):
		return filestream.Outcome{}, fmt.Errorf("copying files: %w: %w", err, ErrDisconnected)
	case errors.As(err, &f):
		return filestream.Outcome{Failure: f}, nil
	}
	return filestream.Outcome{Skipped: c.skipped, Vanished: c.vanished}, err
}

// remotePath makes a path for the guest: what is relative begins in the user's home.
func remotePath(p string) string { return path.Clean(filestream.HomePath(p)) }

func (c *Client) uploadSFTP(ctx context.Context, q filestream.Request, sources []string, opt CopyOptions) (filestream.Outcome, error) {
	cp, err := c.sftp(ctx, opt)
	if err != nil {
		return filestream.Outcome{}, err
	}
	return cp.finish(cp.uploadAll(q, sources))
}

func (c *sftpCopier) uploadAll(q filestream.Request, sources []string) error {
	to := remotePath(q.Target)
	fi, err := c.Stat(to)
	there := err == nil && fi.IsDir()
	if there && q.Stream {
		return &filestream.Failure{What: filestream.IsFolder, Path: q.Target}
	}
	if q.Stream {
		return c.uploadStream(c.opt.Stdin, to)
	}
	for _, src := range sources {
		fi, err := os.Stat(src)
		if err != nil {
			return err
		}
		name, dst, keep := filestream.Name(src), to, false
		switch {
		case name == filestream.Contents:
			keep = there
		case there:
			dst = path.Join(to, name)
		case q.Into:
			return &filestream.Failure{What: filestream.NoFolder, Path: q.Target}
		}
		switch m := fi.Mode(); {
		case m.IsRegular():
			err = c.uploadFile(src, dst)
		case m.IsDir():
			err = c.uploadDir(src, dst, fi, keep, false)
		case m&(fs.ModeSocket|fs.ModeIrregular) != 0:
			c.skipped = append(c.skipped, src)
		default:
			var f *os.File
			if f, err = filestream.OpenWait(c.ctx, src, os.O_RDONLY); err == nil {
				err = errors.Join(c.uploadStream(f, dst), f.Close())
			}
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (c *sftpCopier) create(dst string) (*sftp.File, error) {
	out, err := c.OpenFile(dst, os.O_WRONLY|os.O_CREATE|os.O_TRUNC)
	if err != nil {
		return nil, missing(filestream.NoFolder, path.Dir(dst), err)
	}
	return out, nil
}

func (c *sftpCopier) uploadStream(in io.Reader, dst string) error {
	out, err := c.create(dst)
	if err != nil {
		return err
	}
	from := &source{Reader: in}
	_, err = io.Copy(out, from)
	return errors.Join(from.blame(dst, err), inGuest(dst, out.Close()))
}

func (c *sftpCopier) uploadFile(src, dst string) error {
	in, err := os.Open(src)
	if err != nil {
		return err
	}
	defer in.Close()
	fi, err := in.Stat()
	if err != nil {
		return err
	}
	out, err := c.create(dst)
	if err != nil {
		return err
	}
	from := &source{Reader: in}
	n := &count{Reader: from, ctx: c.ctx, size: fi.Size(), path: src, tell: c.tell}
	n.add(0)
	_, err = out.ReadFromWithConcurrency(n, requests)
	if err == nil {
		err = out.Chmod(fi.Mode().Perm())
	}
	if err == nil {
		err = out.Close()
	} else {
		out.Close()
	}
	if err == nil {
		err = c.Chtimes(dst, fi.ModTime(), fi.ModTime())
	}
	return from.blame(dst, err)
}

// uploadDir uploads a folder: with bySFTP without trying tar, and with keep without setting
// the mode and time of dst.
func (c *sftpCopier) uploadDir(src, dst string, fi fs.FileInfo, keep, bySFTP bool) error {
	if err := context.Cause(c.ctx); err != nil {
		return err
	}
	entries, err := os.ReadDir(src)
	if err != nil {
		return err
	}
	fresh := true
	if err := c.Mkdir(dst); err != nil {
		if there, serr := c.Stat(dst); serr != nil || !there.IsDir() {
			return missing(filestream.NoFolder, path.Dir(dst), err)
		}
		fresh = false
	}
	bySFTP = bySFTP || c.noTar
	if !bySFTP {
		err = c.uploadTar(src, dst, fresh)
		bySFTP = c.unlessTar(err)
	}
	if bySFTP {
		err = c.uploadEntries(src, dst, entries)
	}
	if err != nil || keep {
		return err
	}
	// Last, so that a folder that nobody may write to can be filled, and that
	// filling it does not change its time.
	if err := c.Chmod(dst, fi.Mode().Perm()); err != nil {
		return inGuest(dst, err)
	}
	return inGuest(dst, c.Chtimes(dst, fi.ModTime(), fi.ModTime()))
}

// uploadEntries uploads what is in a folder by sftp.
func (c *sftpCopier) uploadEntries(src, dst string, entries []fs.DirEntry) error {
	for _, e := range entries {
		fi, err := e.Info()
		from, to := filepath.Join(src, e.Name()), path.Join(dst, e.Name())
		if c.gone(from, err) {
			continue
		}
		if err != nil {
			return err
		}
		switch m := fi.Mode(); {
		case m.IsRegular():
			err = c.uploadFile(from, to)
		case m.IsDir():
			err = c.uploadDir(from, to, fi, false, true)
		case m&fs.ModeType == fs.ModeSymlink:
			err = c.uploadLink(from, to)
		default:
			c.skipped = append(c.skipped, from)
		}
		if err != nil && !c.gone(from, err) {
			return err
		}
	}
	return nil
}

func (c *sftpCopier) uploadLink(src, dst string) error {
	to, err := os.Readlink(src)
	if err != nil {
		return err
	}
	if fi, err := c.Lstat(dst); err == nil && !fi.IsDir() {
		if err := c.Remove(dst); err != nil {
			return inGuest(dst, err)
		}
	}
	return inGuest(dst, c.Symlink(to, dst))
}

// downloadSFTP makes a stream of what an sftp server says, so that what an agent sends
// and this are received by the same code.
func (c *Client) downloadSFTP(ctx context.Context, sources []string, dst *destination) (filestream.Outcome, error) {
	cp, err := c.sftp(ctx, dst.opt)
	if err != nil {
		return filestream.Outcome{}, err
	}
	r, w := io.Pipe()
	sent := make(chan error, 1)
	go func() {
		e := filestream.NewEncoder(w)
		err := cp.sendAll(e, sources)
		if err == nil {
			err = e.End(filestream.Outcome{})
		}
		w.CloseWithError(io.ErrUnexpectedEOF)
		sent <- err
	}()
	_, err = dst.receive(filestream.NewDecoder(r))
	r.CloseWithError(io.ErrClosedPipe)
	o, serr := cp.finish(<-sent)
	if err != nil && (serr == nil && o.Failure == nil || errors.Is(serr, io.ErrClosedPipe)) {
		return o, err
	}
	return o, serr
}

func (c *sftpCopier) sendAll(e *filestream.Encoder, sources []string) error {
	var all []string
	for _, src := range sources {
		found, err := c.expand(src)
		if err != nil {
			return err
		}
		all = append(all, found...)
	}
	if err := e.Entry(filestream.Entry{Kind: filestream.Count, Size: int64(len(all))}); err != nil {
		return err
	}
	for _, src := range all {
		p := remotePath(src)
		fi, err := c.Stat(p)
		if err != nil {
			return missing(filestream.NoFile, src, err)
		}
		if err := c.send(e, p, filestream.Name(filestream.HomePath(src)), fi, 0); err != nil {
			return err
		}
	}
	return nil
}

// expand is filestream.Expand in the guest.
func (c *sftpCopier) expand(src string) ([]string, error) {
	if !strings.ContainsAny(src, "*?[") {
		return []string{src}, nil
	}
	if _, err := c.Lstat(remotePath(src)); err == nil {
		return []string{src}, nil
	}
	found, err := c.Glob(remotePath(src))
	if err != nil {
		return nil, inGuest(src, err)
	}
	return filestream.Visible(remotePath(src), found)
}

func (c *sftpCopier) send(e *filestream.Encoder, src, name string, fi fs.FileInfo, depth int) error {
	if err := context.Cause(c.ctx); err != nil {
		return err
	}
	if depth > filestream.MaxDepth {
		return fmt.Errorf("copying %q: more than %d folders inside each other", src, filestream.MaxDepth)
	}
	x := filestream.Entry{Name: name, Mode: fi.Mode().Perm(), Time: fi.ModTime(), Size: fi.Size()}
	switch m := fi.Mode(); {
	case m.IsRegular():
		in, err := c.Open(src)
		if depth > 0 && c.gone(src, err) {
			return nil
		}
		if err != nil {
			return inGuest(src, err)
		}
		defer in.Close()
		x.Kind = filestream.File
		if err := e.Entry(x); err != nil {
			return err
		}
		if _, err := in.WriteTo(chunks{e}); err != nil {
			return inGuest(src, err)
		}
		return e.Close(0)
	case m.IsDir():
		if depth == 0 && !c.noTar {
			if err := c.sendTar(e, src, name, fi); !c.unlessTar(err) {
				return err
			}
		}
		entries, err := c.ReadDirContext(c.ctx, src)
		if depth > 0 && c.gone(src, err) {
			return nil
		}
		if err != nil {
			return inGuest(src, err)
		}
		x.Kind = filestream.Dir
		if err := e.Entry(x); err != nil {
			return err
		}
		for _, sub := range entries {
			switch {
			case sub.Name() == "." || sub.Name() == "..":
				continue
			case !filestream.SafeName(sub.Name()):
				return fmt.Errorf("%w: %q in %q", ErrUnsafeName, sub.Name(), src)
			}
			if err := c.send(e, path.Join(src, sub.Name()), sub.Name(), sub, depth+1); err != nil {
				return err
			}
		}
		return e.Entry(filestream.Entry{Kind: filestream.Up})
	case m&fs.ModeType == fs.ModeSymlink && depth > 0:
		to, err := c.ReadLink(src)
		if c.gone(src, err) {
			return nil
		}
		if err != nil {
			return inGuest(src, err)
		}
		x.Kind, x.To, x.Time = filestream.Link, to, time.Time{}
		return e.Entry(x)
	}
	c.skipped = append(c.skipped, src)
	return nil
}

// chunks writes what it is given as the data of a file.
type chunks struct{ *filestream.Encoder }

func (c chunks) Write(p []byte) (int, error) { return len(p), c.Chunk(0, p) }
