// SPDX-License-Identifier: Apache-2.0

// Package share shows a folder of the host to a guest, by sftp. The guest is not
// trusted: it stays in the folder, reads no more than regular files, and changes
// nothing that it may not write.
package share

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/pkg/sftp"
	"golang.org/x/sys/unix"

	"github.com/labfile/lab/internal/guest/agentapi"
)

// Folder is what is shared.
type Folder struct {
	Path     string // absolute; no part of it may be a link
	Writable bool
}

// What a guest can ask for at most.
const (
	maxOpen   = 512       // files and folders that are open at a time
	maxPacket = 128 << 10 // bytes that are read by one request
)

// Serve answers the requests that come over conn, until it ends. It closes conn.
//
// The folder need not be there all the time: while it is not, requests are refused.
func Serve(conn io.ReadWriteCloser, f Folder) error {
	defer conn.Close()
	s := &server{folder: f}
	defer s.close()
	h := sftp.Handlers{FileGet: s, FilePut: s, FileCmd: s, FileList: s}
	err := sftp.NewRequestServer(conn, h, sftp.WithRSMaxTxPacket(maxPacket)).Serve()
	if err == nil || errors.Is(err, io.EOF) {
		return nil
	}
	return fmt.Errorf("sharing %s: %w", f.Path, err)
}

// server has the handlers of one connection. Several goroutines call them.
//
// Names of files begin with a slash and are cleaned by the library. All of them are
// looked up in an os.Root, which follows no link out of the folder.
type server struct {
	folder Folder
	open   atomic.Int64

	mu      sync.Mutex
	root    *os.Root
	checked time.Time // when root was last seen to be the folder
}

// rootCheck is how often it is looked after whether the folder was replaced by
// another one of its name, as "git clone" or "rm -r" and "mkdir" do.
const rootCheck = time.Second

// at returns the folder, and the name within it.
func (s *server) at(name string) (*os.Root, string, error) {
	root, err := s.current()
	if err != nil {
		return nil, "", err
	}
	return root, rel(name), nil
}

func rel(name string) string {
	name = strings.TrimPrefix(path.Clean("/"+name), "/")
	if name == "" {
		return "."
	}
	return name
}

func (s *server) current() (*os.Root, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.root != nil && time.Since(s.checked) < rootCheck {
		return s.root, nil
	}
	dir, err := openPath(s.folder.Path)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	if s.root != nil {
		now, err := dir.Stat()
		if err != nil {
			return nil, err
		}
		if old, err := s.root.Stat("."); err == nil && os.SameFile(old, now) {
			s.checked = time.Now()
			return s.root, nil
		}
	}
	root, err := rootOf(dir)
	if err != nil {
		return nil, err
	}
	// The one before is closed by the garbage collector: it may be in use.
	s.root, s.checked = root, time.Now()
	return root, nil
}

// openPath opens a folder for its place alone, and follows no link on the way: a guest
// that writes to another folder above this one must not choose what is shared here.
func openPath(name string) (*os.File, error) {
	fd, err := unix.Open("/", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: "/", Err: err}
	}
	for _, part := range strings.Split(strings.Trim(path.Clean(name), "/"), "/") {
		if part == "" {
			continue
		}
		next, err := unix.Openat(fd, part, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		unix.Close(fd)
		if err != nil {
			return nil, &os.PathError{Op: "open", Path: name, Err: err}
		}
		fd = next
	}
	return os.NewFile(uintptr(fd), name), nil
}

// rootOf returns an open folder as a root.
func rootOf(dir *os.File) (*os.Root, error) {
	return os.OpenRoot(fmt.Sprintf("/proc/self/fd/%d", dir.Fd()))
}

// openDir opens a folder, and nothing else, not for a moment.
func openDir(root *os.Root, name string) (*os.File, error) {
	return root.OpenFile(name, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NONBLOCK, 0)
}

func (s *server) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.root != nil {
		s.root.Close()
	}
}

// opened counts one more open file or folder.
func (s *server) opened() error {
	if s.open.Add(1) > maxOpen {
		s.open.Add(-1)
		return syscall.EMFILE
	}
	return nil
}

// errReadOnly says that the guest wants to change a folder that it only reads.
var errReadOnly error = syscall.EROFS

// writes fails unless the guest may change the folder.
func (s *server) writes() error {
	if !s.folder.Writable {
		return errReadOnly
	}
	return nil
}

// wire is how an error is told to the guest: no word of the host's paths, and with
// the number where sftp has no code for it.
func wire(err error) error {
	if err == nil || err == io.EOF {
		return err
	}
	no := syscall.EIO
	switch {
	case errors.As(err, &no):
	case errors.Is(err, os.ErrNotExist):
		no = syscall.ENOENT
	case errors.Is(err, os.ErrExist):
		no = syscall.EEXIST
	case errors.Is(err, os.ErrInvalid):
		no = syscall.EINVAL
	case strings.Contains(err.Error(), "escapes"): // os.Root has no sentinel for it
		no = syscall.EACCES
	}
	if no == syscall.ENOENT || no == syscall.EACCES {
		return no
	}
	return &agentapi.FolderError{Errno: no}
}
