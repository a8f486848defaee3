// SPDX-License-Identifier: Apache-2.0

package share

import (
	"errors"
	"os"
	"path"
	"syscall"

	"github.com/pkg/sftp"
	"golang.org/x/sys/unix"

	"github.com/labfile/lab/internal/guest/agentapi"
)

var (
	_ sftp.PosixRenameFileCmder = (*server)(nil)
	_ sftp.StatVFSFileCmder     = (*server)(nil)
)

// Filecmd changes something besides a file's content.
func (s *server) Filecmd(r *sftp.Request) error { return wire(s.change(r)) }

// PosixRename renames a file; one that has the name already is replaced.
func (s *server) PosixRename(r *sftp.Request) error { return wire(s.rename(r, true)) }

func (s *server) change(r *sftp.Request) error {
	if err := s.writes(); err != nil {
		return err
	}
	switch r.Method {
	case "Setstat":
		return s.setstat(r)
	case "Rename":
		return s.rename(r, false)
	case "Link":
		root, name, err := s.at(r.Target)
		if err != nil {
			return err
		}
		return root.Link(rel(r.Filepath), name)
	case "Symlink": // Filepath is what the link says, and is not looked up
		root, name, err := s.at(r.Target)
		if err != nil {
			return err
		}
		return root.Symlink(r.Filepath, name)
	}
	root, name, err := s.at(r.Filepath)
	if err != nil {
		return err
	}
	switch r.Method {
	case "Mkdir":
		return root.Mkdir(name, 0o755)
	case "Remove", "Rmdir":
		st, err := root.Lstat(name)
		switch {
		case err != nil:
			return err
		case name == ".":
			return syscall.EBUSY
		case r.Method == "Rmdir" && !st.IsDir():
			return syscall.ENOTDIR
		case r.Method == "Remove" && st.IsDir():
			return syscall.EISDIR
		}
		return root.Remove(name)
	}
	return syscall.EOPNOTSUPP
}

func (s *server) rename(r *sftp.Request, replace bool) error {
	if err := s.writes(); err != nil {
		return err
	}
	root, from, err := s.at(r.Filepath)
	if err != nil {
		return err
	}
	to := rel(r.Target)
	if from == "." || to == "." {
		return syscall.EBUSY
	}
	// os.Root would refuse to replace an empty folder, and cannot keep what is there.
	fromDir, err := openDir(root, path.Dir(from))
	if err != nil {
		return err
	}
	defer fromDir.Close()
	toDir, err := openDir(root, path.Dir(to))
	if err != nil {
		return err
	}
	defer toDir.Close()
	var flags uint
	if !replace {
		flags = unix.RENAME_NOREPLACE
	}
	err = unix.Renameat2(int(fromDir.Fd()), path.Base(from), int(toDir.Fd()), path.Base(to), flags)
	if err == unix.EINVAL && !replace { // some network file systems know no flags
		if _, err := root.Lstat(to); err == nil {
			return syscall.EEXIST
		}
		err = unix.Renameat(int(fromDir.Fd()), path.Base(from), int(toDir.Fd()), path.Base(to))
	}
	return err
}

// setstat changes a file's size, permissions and times. It belongs to the host's
// user, whatever the guest says.
func (s *server) setstat(r *sftp.Request) error {
	root, name, err := s.at(r.Filepath)
	if err != nil {
		return err
	}
	attr, flags := r.Attributes(), r.AttrFlags()
	if attr == nil {
		return syscall.EINVAL
	}
	if flags.UidGid {
		return syscall.EPERM
	}
	if flags.Size {
		if attr.Size > 1<<63-1 {
			return syscall.EINVAL
		}
		f, err := s.openFile(r.Filepath, os.O_WRONLY)
		if err != nil {
			return err
		}
		if err := errors.Join(f.f.Truncate(int64(attr.Size)), f.Close()); err != nil {
			return err
		}
	}
	if flags.Permissions {
		// Nothing that a guest writes runs as somebody else on the host.
		if err := root.Chmod(name, os.FileMode(attr.Mode)&os.ModePerm); err != nil {
			return err
		}
	}
	if flags.Acmodtime {
		t := agentapi.Times{Atime: attr.AccessTime(), Mtime: attr.ModTime()}
		if err := setTimes(root, name, t); err != nil {
			return err
		}
	}
	for _, e := range attr.Extended {
		if e.ExtType != agentapi.TimesName {
			continue
		}
		t, err := agentapi.ParseTimes(e.ExtData)
		if err != nil {
			return syscall.EINVAL
		}
		if err := setTimes(root, name, t); err != nil {
			return err
		}
	}
	return nil
}

// setTimes sets the times of a file, or of the link that it is, which os.Root
// cannot. Like rename, it finds the folder that the file lies in without leaving root,
// and follows nothing from there.
func setTimes(root *os.Root, name string, t agentapi.Times) error {
	dir, err := openDir(root, path.Dir(name))
	if err != nil {
		return err
	}
	defer dir.Close()
	ts := []unix.Timespec{{Nsec: unix.UTIME_OMIT}, {Nsec: unix.UTIME_OMIT}}
	if !t.Atime.IsZero() {
		ts[0] = unix.NsecToTimespec(t.Atime.UnixNano())
	}
	if !t.Mtime.IsZero() {
		ts[1] = unix.NsecToTimespec(t.Mtime.UnixNano())
	}
	return unix.UtimesNanoAt(int(dir.Fd()), path.Base(name), ts, unix.AT_SYMLINK_NOFOLLOW)
}

// StatVFS tells how much room there is.
func (s *server) StatVFS(r *sftp.Request) (*sftp.StatVFS, error) {
	root, err := s.current()
	if err != nil {
		return nil, wire(err)
	}
	dir, err := root.Open(".")
	if err != nil {
		return nil, wire(err)
	}
	defer dir.Close()
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(dir.Fd()), &st); err != nil {
		return nil, wire(err)
	}
	return &sftp.StatVFS{
		Bsize: uint64(st.Bsize), Frsize: uint64(st.Frsize), Blocks: st.Blocks, Bfree: st.Bfree, Bavail: st.Bavail,
		Files: st.Files, Ffree: st.Ffree, Favail: st.Ffree, Namemax: uint64(st.Namelen),
	}, nil
}
