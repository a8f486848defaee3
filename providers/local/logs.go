// SPDX-License-Identifier: Apache-2.0

package local

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/labfile/lab/providers"
	"golang.org/x/sys/unix"
)

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
		if Gone(err) {
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
	if !SamePath(r.f, r.path) {
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

// shorten keeps the tail of a file whose writer appends (O_APPEND), in place:
// the writer goes on behind it.
func shorten(path string, limit int64) error {
	fi, err := os.Stat(path)
	if Gone(err) || err == nil && fi.Size() <= limit {
		return nil
	}
	if err != nil {
		return err
	}
	tail, err := ReadTail(path, limit/2)
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
	if Gone(err) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil || fi.Size() <= 2*MaxEventTail {
		return err
	}
	err = unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, fi.Size()-MaxEventTail)
	if errors.Is(err, unix.EOPNOTSUPP) {
		return nil // this file system knows no holes
	}
	return err
}

// OpenLog opens the log at path of the generation in dir.
func OpenLog(dir, path string) (io.ReadCloser, error) {
	if _, err := os.Stat(dir); err != nil {
		if Gone(err) {
			err = providers.ErrNotFound
		}
		return nil, err
	}
	return &logReader{path: path}, nil
}

// TrimLogs shortens the logs and the event record of the generation in dir.
func TrimLogs(ctx context.Context, dir string, limit int64, logs ...string) error {
	if limit < 2 {
		return fmt.Errorf("%d bytes are no limit", limit)
	}
	if _, err := os.Stat(dir); Gone(err) {
		return providers.ErrNotFound
	}
	for _, path := range logs {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := shorten(path, limit); err != nil {
			return err
		}
	}
	return giveBack(filepath.Join(dir, FileEvents+".out"))
}
