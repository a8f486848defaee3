// SPDX-License-Identifier: Apache-2.0

package share

import (
	"io"
	"os"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/pkg/sftp"

	"github.com/labfile/lab/internal/guest/agentapi"
)

var (
	_ sftp.LstatFileLister    = (*server)(nil)
	_ sftp.ReadlinkFileLister = (*server)(nil)
)

// Filelist lists a folder, or tells of a file behind links.
func (s *server) Filelist(r *sftp.Request) (sftp.ListerAt, error) {
	root, name, err := s.at(r.Filepath)
	if err != nil {
		return nil, wire(err)
	}
	switch r.Method {
	case "Stat":
		return one(root.Stat(name))
	case "List":
		return s.list(root, name)
	}
	return nil, wire(syscall.EOPNOTSUPP)
}

// Lstat tells of a file, or of the link that it is.
func (s *server) Lstat(r *sftp.Request) (sftp.ListerAt, error) {
	root, name, err := s.at(r.Filepath)
	if err != nil {
		return nil, wire(err)
	}
	return one(root.Lstat(name))
}

// Readlink says where a link leads, in the words of the link: to follow it is the
// guest's business, among the guest's files.
func (s *server) Readlink(name string) (string, error) {
	root, name, err := s.at(name)
	if err != nil {
		return "", wire(err)
	}
	target, err := root.Readlink(name)
	return target, wire(err)
}

// single is a list of one file.
type single struct{ os.FileInfo }

func one(info os.FileInfo, err error) (sftp.ListerAt, error) {
	if err != nil {
		return nil, wire(err)
	}
	return single{info}, nil
}

func (l single) ListAt(to []os.FileInfo, _ int64) (int, error) {
	if len(to) == 0 {
		return 0, nil
	}
	to[0] = info(l)
	return 1, nil
}

// listing is a folder that is being listed, in one go from its beginning.
type listing struct {
	folder *os.Root
	names  *os.File
	open   *atomic.Int64
	closed atomic.Bool
}

func (s *server) list(root *os.Root, name string) (sftp.ListerAt, error) {
	st, err := root.Stat(name)
	if err != nil {
		return nil, wire(err)
	}
	if !st.IsDir() {
		return nil, wire(syscall.ENOTDIR)
	}
	if err := s.opened(); err != nil {
		return nil, wire(err)
	}
	l := &listing{open: &s.open}
	if l.names, err = openDir(root, name); err == nil {
		if l.folder, err = rootOf(l.names); err == nil {
			return l, nil
		}
	}
	_ = l.Close()
	return nil, wire(err)
}

// ListAt returns the next entries. Those that vanish meanwhile are left out.
func (l *listing) ListAt(to []os.FileInfo, _ int64) (int, error) {
	n := 0
	for n == 0 {
		names, err := l.names.Readdirnames(len(to))
		if err != nil {
			return 0, wire(err) // io.EOF at the end
		}
		for _, name := range names {
			if st, err := l.folder.Lstat(name); err == nil {
				to[n] = info{st}
				n++
			}
		}
	}
	return n, nil
}

func (l *listing) Close() error {
	if l.closed.Swap(true) {
		return nil
	}
	l.open.Add(-1)
	if l.names != nil {
		l.names.Close()
	}
	if l.folder != nil {
		l.folder.Close()
	}
	return nil
}

// info tells of a file what sftp does not.
type info struct{ os.FileInfo }

var _ sftp.FileInfoExtendedData = info{}

func (i info) Extended() []sftp.StatExtended {
	st, ok := i.Sys().(*syscall.Stat_t)
	if !ok {
		return nil
	}
	at := func(t syscall.Timespec) time.Time { return time.Unix(t.Unix()) }
	return []sftp.StatExtended{{ExtType: agentapi.AttrName, ExtData: agentapi.Attr{
		Dev: st.Dev, Ino: st.Ino, Nlink: st.Nlink, Blocks: uint64(st.Blocks),
		Atime: at(st.Atim), Mtime: at(st.Mtim), Ctime: at(st.Ctim),
	}.String()}}
}

var _ io.Closer = (*listing)(nil)
