// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/providers"
)

// OpenLog opens a log of the present or last run. A reader that is kept open
// across a restart goes on with the new run's log.
func (p *Provider) OpenLog(ctx context.Context, g lab.Generation, l providers.Log) (io.ReadCloser, error) {
	fail := func(err error) (io.ReadCloser, error) {
		return nil, fmt.Errorf("opening the %s log of machine %q: %w", l, g, err)
	}
	if err := ctx.Err(); err != nil {
		return fail(err)
	}
	if err := checkGeneration(g); err != nil {
		return fail(err)
	}
	name := ""
	switch l {
	case providers.LogConsole:
		name = fileConsole
	case providers.LogHypervisor:
		name = fileLog
	default:
		return fail(errors.New("there is no such log"))
	}
	dir := p.cfg.Dirs.Generation(g)
	if _, err := os.Stat(dir); err != nil {
		if gone(err) {
			err = providers.ErrNotFound
		}
		return fail(err)
	}
	return &logReader{path: filepath.Join(dir, name)}, nil
}

// logReader reads a file that may not exist yet, that grows, and that may be
// shortened or replaced.
type logReader struct {
	path   string
	f      *os.File
	closed bool
}

func (r *logReader) Read(b []byte) (int, error) {
	if r.closed {
		return 0, os.ErrClosed
	}
	if r.f == nil {
		f, err := os.Open(r.path)
		if gone(err) {
			return 0, io.EOF
		}
		if err != nil {
			return 0, err
		}
		r.f = f
	}
	n, err := r.f.Read(b)
	if n > 0 || !errors.Is(err, io.EOF) {
		return n, err
	}
	if !samePath(r.f, r.path) {
		if _, err := os.Stat(r.path); err != nil {
			return 0, io.EOF
		}
		r.f.Close()
		r.f = nil
		return r.Read(b)
	}
	at, err := r.f.Seek(0, io.SeekCurrent)
	if err != nil {
		return 0, err
	}
	if fi, err := r.f.Stat(); err == nil && fi.Size() < at {
		if _, err := r.f.Seek(0, io.SeekStart); err != nil {
			return 0, err
		}
		return r.f.Read(b)
	}
	return 0, io.EOF
}

func (r *logReader) Close() error {
	r.closed = true
	if r.f != nil {
		return r.f.Close()
	}
	return nil
}

// TrimLogs shortens each log that is longer than limit to its last half limit
// bytes. QEMU's logs grow without bound, and a guest decides how fast; whoever
// watches a machine calls this now and then. What a guest prints in the instant
// of trimming may be lost. ErrNotFound if there is no such generation.
func (p *Provider) TrimLogs(ctx context.Context, g lab.Generation, limit lab.Bytes) error {
	if err := p.trimLogs(ctx, g, int64(limit)); err != nil {
		return fmt.Errorf("trimming the logs of machine %q: %w", g, err)
	}
	return nil
}

func (p *Provider) trimLogs(ctx context.Context, g lab.Generation, limit int64) error {
	if err := checkGeneration(g); err != nil {
		return err
	}
	if limit < 2 {
		return fmt.Errorf("%d bytes are no limit", limit)
	}
	dir := p.cfg.Dirs.Generation(g)
	if _, err := os.Stat(dir); gone(err) {
		return providers.ErrNotFound
	}
	for _, name := range []string{fileConsole, fileLog} {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := shorten(filepath.Join(dir, name), limit); err != nil {
			return err
		}
	}
	return giveBack(filepath.Join(dir, fileEvents+".out"))
}

// shorten keeps the tail of a file whose writer appends (O_APPEND), in place:
// the writer goes on behind it.
func shorten(path string, limit int64) error {
	fi, err := os.Stat(path)
	if gone(err) || err == nil && fi.Size() <= limit {
		return nil
	}
	if err != nil {
		return err
	}
	tail, err := readTail(path, limit/2)
	if err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_TRUNC|os.O_APPEND, 0)
	if err != nil {
		return err
	}
	if _, err := f.Write(tail); err != nil {
		f.Close()
		return err
	}
	return f.Close()
}

// giveBack frees the blocks of the event record's head. QEMU writes it at a
// position of its own, so it cannot be shortened; a hole costs nothing.
func giveBack(path string) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if gone(err) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil || fi.Size() <= 2*maxEventTail {
		return err
	}
	err = unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, fi.Size()-maxEventTail)
	if errors.Is(err, unix.EOPNOTSUPP) {
		return nil // this file system knows no holes
	}
	return err
}
