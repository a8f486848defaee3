// SPDX-License-Identifier: Apache-2.0

package share

import (
	"errors"
	"io"
	"os"
	"sync/atomic"
	"syscall"

	"github.com/pkg/sftp"
)

var _ sftp.OpenFileWriter = (*server)(nil)

// Fileread opens a file for reading.
func (s *server) Fileread(r *sftp.Request) (io.ReaderAt, error) {
	f, err := s.openFile(r.Filepath, os.O_RDONLY)
	return orNil[io.ReaderAt](f, err)
}

// Filewrite opens a file for writing.
func (s *server) Filewrite(r *sftp.Request) (io.WriterAt, error) {
	f, err := s.openFile(r.Filepath, os.O_WRONLY|flags(r))
	return orNil[io.WriterAt](f, err)
}

// OpenFile opens a file for both.
func (s *server) OpenFile(r *sftp.Request) (sftp.WriterAtReaderAt, error) {
	f, err := s.openFile(r.Filepath, os.O_RDWR|flags(r))
	return orNil[sftp.WriterAtReaderAt](f, err)
}

func orNil[T any](f *file, err error) (T, error) {
	if err != nil {
		var none T
		return none, wire(err)
	}
	return any(f).(T), nil
}

// flags of an open request besides what it is for.
func flags(r *sftp.Request) int {
	var out int
	p := r.Pflags()
	if p.Creat {
		out |= os.O_CREATE
	}
	if p.Excl {
		out |= os.O_EXCL
	}
	if p.Trunc {
		out |= os.O_TRUNC
	}
	if p.Append {
		out |= os.O_APPEND
	}
	return out
}

// openFile opens a regular file. Nothing else is opened, not for a moment: a pipe
// would wait for its other end, and a device may do something.
func (s *server) openFile(name string, flag int) (*file, error) {
	if flag != os.O_RDONLY {
		if err := s.writes(); err != nil {
			return nil, err
		}
	}
	root, name, err := s.at(name)
	if err != nil {
		return nil, err
	}
	info, err := root.Stat(name)
	switch {
	case err == nil && info.IsDir():
		return nil, syscall.EISDIR
	case err == nil && !info.Mode().IsRegular():
		return nil, syscall.EACCES
	case err != nil && flag&os.O_CREATE == 0:
		return nil, err
	}
	if err := s.opened(); err != nil {
		return nil, err
	}
	f, err := root.OpenFile(name, flag|syscall.O_NONBLOCK|syscall.O_NOCTTY, 0o644)
	if err == nil {
		if info, err = f.Stat(); err == nil && !info.Mode().IsRegular() {
			err = syscall.EACCES
		}
		// A process of the guest's would lose these by writing, and so does lab, unless
		// it is root's.
		const raised = os.ModeSetuid | os.ModeSetgid
		if err == nil && flag != os.O_RDONLY && info.Mode()&raised != 0 {
			if err = f.Chmod(info.Mode() &^ raised); errors.Is(err, syscall.EPERM) {
				err = nil // it is somebody else's, and lab not root: the kernel does it at the first write
			}
		}
		if err != nil {
			f.Close()
		}
	}
	if err != nil {
		s.open.Add(-1)
		return nil, err
	}
	return &file{f: f, open: &s.open, appends: flag&os.O_APPEND != 0}, nil
}

// file is an open file.
type file struct {
	f      *os.File
	open   *atomic.Int64
	closed atomic.Bool

	appends bool // whatever offset is said
}

func (f *file) ReadAt(p []byte, off int64) (int, error) {
	n, err := f.f.ReadAt(p, off)
	return n, wire(err)
}

func (f *file) WriteAt(p []byte, off int64) (int, error) {
	if f.appends { // what the host has appended meanwhile stays
		n, err := f.f.Write(p)
		return n, wire(err)
	}
	n, err := f.f.WriteAt(p, off)
	return n, wire(err)
}

func (f *file) Close() error {
	if f.closed.Swap(true) {
		return nil
	}
	f.open.Add(-1)
	return wire(f.f.Close())
}
