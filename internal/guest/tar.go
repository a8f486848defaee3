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
	"path"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/labfile/lab/internal/guest/filestream"
)

// A folder of a guest without an agent is copied by the guest's GNU tar, as one stream;
// by sftp it would be several round trips for each file. Everything else, and a guest with
// another tar, is left to sftp.

// What a guest says first: that it is about to run tar, or that it has tar but cannot enter
// the folder. One without tar says nothing. Both have the same length.
const (
	tarHello = "lab-tar\n"
	tarNoDir = "lab-dir\n"
)

// tarCreate reads folder $1. A file with several names is several files. A tar that does
// not know these options says nothing.
const tarCreate = `export LC_ALL=C
cd -- "$1" || { echo lab-dir; exit; }
echo lab-tar
exec tar -c --format=gnu --sparse --hard-dereference --quoting-style=escape -f - .`

// tarExtract writes to folder $1. Links to folders stay, others are written through. It says
// nothing of times in the future, as the clock of the guest may be wrong. What it needs, GNU
// tar has since 1.27, of 2013.
const tarExtract = `export LC_ALL=C
tar --keep-directory-symlink --warning=no-timestamp --version >/dev/null 2>&1 || exit
cd -- "$1" || { echo lab-dir; exit; }
echo lab-tar
exec tar -x -p -h --overwrite --keep-directory-symlink --no-same-owner --warning=no-timestamp --quoting-style=escape -f -`

// Why a folder is not copied by tar. Nothing was copied then, and sftp copies it.
var (
	errNoTar    = errors.New("the guest has no GNU tar")
	errNotByTar = errors.New("tar cannot copy this folder") // but others it may
)

// unlessTar reports whether err leaves a folder to sftp, and notes if it leaves all of them.
func (c *sftpCopier) unlessTar(err error) bool {
	c.noTar = c.noTar || errors.Is(err, errNoTar)
	return errors.Is(err, errNoTar) || errors.Is(err, errNotByTar)
}

// maxTarFile bounds a file in a guest's archive, in bytes: a few that are all holes would
// keep a processor of the host busy for minutes.
const maxTarFile = 2 << 40

// tarSession is a tar that runs in a guest.
type tarSession struct {
	*ssh.Session
	in   io.WriteCloser
	out  *bufio.Reader
	said complaints
}

// tar starts tarCreate or tarExtract. Errors: errNoTar, errNotByTar.
func (c *sftpCopier) tar(script, dir string) (*tarSession, error) {
	s, err := c.login.ssh.NewSession()
	if err != nil {
		return nil, errNotByTar // the server takes no more sessions, or is gone, which sftp tells
	}
	t := &tarSession{Session: s}
	s.Stderr = &t.said
	out, err := s.StdoutPipe()
	if err == nil {
		t.in, err = s.StdinPipe()
	}
	if err == nil {
		err = s.Start(Quote([]string{"sh", "-c", script, "lab", dir}))
	}
	if err != nil {
		s.Close()
		return nil, errNoTar
	}
	t.out = bufio.NewReaderSize(out, 64<<10)
	hello := make([]byte, len(tarHello))
	n, _ := io.ReadFull(t.out, hello)
	switch string(hello[:n]) {
	case tarHello:
		return t, nil
	case tarNoDir:
		err = errNotByTar
	default:
		err = errNoTar
	}
	s.Close()
	return nil, err
}

// ended waits for the end of tar, and returns which files were no ordinary ones, and
// which were removed while their folder was read. dir is shown before names.
func (t *tarSession) ended(dir string) (skipped, vanished []string, err error) {
	err = t.Wait()
	var exit *ssh.ExitError
	if err != nil && !errors.As(err, &exit) {
		return nil, nil, fmt.Errorf("copying files: %w", ErrDisconnected)
	}
	skipped, vanished, why := t.said.read(dir)
	if err == nil || exit.ExitStatus() == 1 && why == "" {
		return skipped, vanished, nil
	}
	if why == "" {
		return nil, nil, &filestream.Failure{What: filestream.Other, Text: dir + ": tar: " + err.Error()}
	}
	return nil, nil, tarFailure(dir, why)
}

// tarFailure is what tar complained about, as an sftp server says it.
func tarFailure(dir, why string) error {
	name, what := complaint(why)
	f := &filestream.Failure{What: filestream.Other, Text: path.Join(dir, name) + ": " + what}
	reason := what[max(0, strings.LastIndex(what, ": ")):]
	for _, no := range []syscall.Errno{syscall.EACCES, syscall.EPERM, syscall.ENOSPC, syscall.EISDIR, syscall.EROFS, syscall.EDQUOT} {
		if name != "" && strings.EqualFold(strings.TrimPrefix(reason, ": "), no.Error()) {
			f.Errno, f.Text = no, path.Join(dir, name)+": "+no.Error()
		}
	}
	return f
}

// complaint splits a line of tar's, in which names are quoted in the style "escape", into
// the name of a file and what is said of it. The name is empty if there is none.
func complaint(line string) (name, what string) {
	line = strings.TrimPrefix(line, "tar: ")
	var b []byte
	for i := 0; i < len(line); i++ {
		if strings.HasPrefix(line[i:], ": ") {
			return string(b), line[i+2:]
		}
		c := line[i]
		if c == '\\' && i+1 < len(line) {
			i++
			c = line[i]
			if at := strings.IndexByte("abfnrtv", c); at >= 0 {
				c = "\a\b\f\n\r\t\v"[at]
			} else if i+3 <= len(line) {
				if octal, err := strconv.ParseUint(line[i:i+3], 8, 8); err == nil {
					c = byte(octal)
					i += 2
				}
			}
		}
		b = append(b, c)
	}
	return "", line
}

// complaints is the beginning of what tar says on stderr.
type complaints struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

// maxComplaints bounds what is kept, in bytes.
const maxComplaints = 1 << 20

func (c *complaints) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.buf.Write(p[:min(len(p), maxComplaints-c.buf.Len())])
	return len(p), nil
}

func (c *complaints) String() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return strings.ToValidUTF8(c.buf.String(), "?")
}

// read returns which files were no ordinary ones and which were removed while their folder
// was read, with dir before their names, and the first line that says anything else.
func (c *complaints) read(dir string) (skipped, vanished []string, why string) {
	for line := range strings.Lines(c.String()) {
		line = strings.TrimRight(line, "\n")
		switch name, what := complaint(line); {
		case name != "" && what == "socket ignored":
			skipped = append(skipped, path.Join(dir, name))
		case name != "" && what == "File removed before we read it":
			vanished = append(vanished, path.Join(dir, name))
		case why == "" && what != "file changed as we read it":
			why = line
		}
	}
	return skipped, vanished, why
}

// sendTar sends a folder of the guest, called name, as tar reads it. Errors:
// errNoTar and errNotByTar if it sent nothing.
func (c *sftpCopier) sendTar(e *filestream.Encoder, src, name string, fi fs.FileInfo) error {
	t, err := c.tar(tarCreate, src)
	if err != nil {
		return err
	}
	defer t.Close()
	t.in.Close()
	if _, err := t.out.Peek(1); err != nil { // sftp finds out why, if that is not its tar
		return errNoTar
	}
	if err := e.Entry(filestream.Entry{Kind: filestream.Dir, Name: name, Mode: fi.Mode().Perm(), Time: fi.ModTime()}); err != nil {
		return err
	}
	skipped, err := unpack(c.ctx, e, tar.NewReader(t.out))
	if err == nil {
		_, err = io.Copy(io.Discard, t.out) // what fills up the last block
	}
	if errors.Is(err, io.ErrUnexpectedEOF) { // tar may say why
		if _, _, err := t.ended(src); err != nil {
			return err
		}
		return fmt.Errorf("copying files: %w", ErrDisconnected)
	}
	if err != nil {
		return err
	}
	more, vanished, err := t.ended(src)
	if err != nil {
		return err
	}
	for _, name := range skipped {
		c.skipped = append(c.skipped, path.Join(src, name))
	}
	c.skipped = append(c.skipped, more...)
	c.vanished = append(c.vanished, vanished...)
	return e.Entry(filestream.Entry{Kind: filestream.Up})
}

// unpack sends what an archive of a folder has, and returns what is no ordinary file. The
// folder itself must come first in the archive, and is not sent. The archive comes from a
// guest, which is not trusted: whoever receives this stream checks each name.
func unpack(ctx context.Context, e *filestream.Encoder, archive *tar.Reader) (skipped []string, err error) {
	var open []string // the folders that are open, by name
	for first := true; ; first = false {
		h, err := archive.Next()
		if errors.Is(err, io.EOF) && !first {
			break
		}
		if err != nil {
			return nil, malformed(err)
		}
		if h.Format != tar.FormatGNU || len(h.PAXRecords) > 0 { // its records make holes of any size
			return nil, fmt.Errorf("%w: %q is not in the format that was asked for", filestream.ErrMalformed, h.Name)
		}
		if name := strings.TrimSuffix(h.Name, "/"); first || name == "." {
			if first && name == "." && h.Typeflag == tar.TypeDir {
				continue
			}
			return nil, fmt.Errorf("%w: %q stands at the wrong place in the archive", filestream.ErrMalformed, h.Name)
		}
		rel, ok := strings.CutPrefix(strings.TrimSuffix(h.Name, "/"), "./")
		if !ok {
			return nil, fmt.Errorf("%w: %q", ErrUnsafeName, h.Name)
		}
		parts := strings.Split(rel, "/")
		dirs, base := parts[:len(parts)-1], parts[len(parts)-1]
		if !filestream.SafeName(base) {
			return nil, fmt.Errorf("%w: %q", ErrUnsafeName, h.Name)
		}
		same := 0
		for same < len(open) && same < len(dirs) && open[same] == dirs[same] {
			same++
		}
		if same < len(dirs) {
			return nil, fmt.Errorf("%w: %q comes without its folder", filestream.ErrMalformed, h.Name)
		}
		for ; len(open) > same; open = open[:len(open)-1] {
			if err := e.Entry(filestream.Entry{Kind: filestream.Up}); err != nil {
				return nil, err
			}
		}
		x := filestream.Entry{Name: base, Mode: fs.FileMode(h.Mode).Perm(), Time: h.ModTime, Size: h.Size}
		switch h.Typeflag {
		case tar.TypeDir:
			if len(open) >= filestream.MaxDepth {
				return nil, fmt.Errorf("%w: more than %d folders inside each other", filestream.ErrMalformed, filestream.MaxDepth)
			}
			x.Kind, x.Size = filestream.Dir, 0
			open = append(open, base)
			err = e.Entry(x)
		case tar.TypeSymlink:
			x.Kind, x.To, x.Size, x.Time = filestream.Link, h.Linkname, 0, time.Time{}
			err = e.Entry(x)
		case tar.TypeReg, tar.TypeGNUSparse:
			x.Kind = filestream.File
			err = unpackFile(ctx, e, x, archive, h.Typeflag == tar.TypeGNUSparse)
		case tar.TypeChar, tar.TypeBlock, tar.TypeFifo:
			if len(skipped) < maxSkipped {
				skipped = append(skipped, rel)
			}
		default:
			return nil, fmt.Errorf("%w: %q is of a kind that was not asked for", filestream.ErrMalformed, h.Name)
		}
		if err != nil {
			return nil, err
		}
	}
	for range open {
		if err := e.Entry(filestream.Entry{Kind: filestream.Up}); err != nil {
			return nil, err
		}
	}
	return skipped, nil
}

// maxSkipped bounds how many names are kept of what is not copied.
const maxSkipped = 10000

// malformed words what archive/tar has against an archive.
func malformed(err error) error {
	switch {
	case errors.Is(err, io.EOF):
		return io.ErrUnexpectedEOF
	case errors.Is(err, tar.ErrHeader), errors.Is(err, tar.ErrFieldTooLong):
		return fmt.Errorf("%w: %w", filestream.ErrMalformed, err)
	}
	return err
}

// block is the size of what becomes a hole in a sparse file if it is zero, in bytes.
const block = 4096

var zeroBlock [block]byte

// unpackFile sends one file.
func unpackFile(ctx context.Context, e *filestream.Encoder, x filestream.Entry, content io.Reader, sparse bool) error {
	if x.Size > maxTarFile {
		return fmt.Errorf("%w: %q has %d bytes", filestream.ErrMalformed, x.Name, x.Size)
	}
	if err := e.Entry(x); err != nil {
		return err
	}
	var hole int64
	buf := make([]byte, min(32<<10, max(x.Size, 1)))
	for {
		var (
			n   int
			err = context.Cause(ctx) // what is a hole ends no other way
		)
		for n < len(buf) && err == nil { // a hole is found in whole blocks
			var m int
			m, err = content.Read(buf[n:])
			n += m
		}
		for data := buf[:n]; len(data) > 0; {
			part := data
			if sparse {
				part = data[:min(block, len(data))]
			}
			if sparse && bytes.Equal(part, zeroBlock[:len(part)]) {
				hole += int64(len(part))
			} else if err := e.Chunk(hole, part); err != nil {
				return err
			} else {
				hole = 0
			}
			data = data[len(part):]
		}
		if errors.Is(err, io.EOF) {
			return e.Close(hole)
		}
		if err != nil {
			return malformed(err)
		}
	}
}
