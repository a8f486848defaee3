// SPDX-License-Identifier: Apache-2.0

//go:build linux

package hostfs

import (
	"context"
	"os"
	"path"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"github.com/pkg/sftp"
	"golang.org/x/sys/unix"

	"github.com/labfile/lab/internal/guest/agentapi"
)

// changes is called before files are changed, and what it returns afterwards.
func (n *node) changes(paths ...string) func() {
	var dirs []string
	for _, p := range paths {
		dirs = append(dirs, path.Dir(p), p)
	}
	return n.fs.leases.changing(dirs...)
}

// Statfs tells how much room there is.
func (n *node) Statfs(ctx context.Context, out *fuse.StatfsOut) syscall.Errno {
	st, no := query(ctx, n.fs.link, func(c *sftp.Client) (*sftp.StatVFS, error) { return c.StatVFS("/") })
	if no != 0 {
		return no
	}
	out.Bsize, out.Frsize = uint32(st.Bsize), uint32(st.Frsize)
	out.Blocks, out.Bfree, out.Bavail = st.Blocks, st.Bfree, st.Bavail
	out.Files, out.Ffree, out.NameLen = st.Files, st.Ffree, uint32(st.Namemax)
	return 0
}

// Fsync has nothing to do: what was written is at the host before write(2) returns. To the kernel
// ENOSYS means that fsync(2) succeeds, also of folders; any other error would be the caller's.
func (n *node) Fsync(context.Context, fs.FileHandle, uint32) syscall.Errno { return syscall.ENOSYS }

// Setattr changes size, permissions and times. Nothing can be given away.
func (n *node) Setattr(ctx context.Context, h fs.FileHandle, in *fuse.SetAttrIn, out *fuse.AttrOut) syscall.Errno {
	at := n.path()
	defer n.changes(at)()
	if uid, ok := in.GetUID(); ok && uid != n.fs.config.UID {
		return syscall.EPERM
	}
	if gid, ok := in.GetGID(); ok && gid != n.fs.config.GID {
		return syscall.EPERM
	}
	if size, ok := in.GetSize(); ok {
		if no := n.fs.link.ask(ctx, func(c *sftp.Client) error { return c.Truncate(at, int64(size)) }); no != 0 {
			return no
		}
	}
	if mode, ok := in.GetMode(); ok {
		if no := n.fs.chmod(ctx, at, mode); no != 0 {
			return no
		}
	}
	var t agentapi.Times
	if at, ok := in.GetATime(); ok {
		t.Atime = at
	}
	if mt, ok := in.GetMTime(); ok {
		t.Mtime = mt
	}
	if t != (agentapi.Times{}) {
		ext := []sftp.StatExtended{{ExtType: agentapi.TimesName, ExtData: t.String()}}
		if no := n.fs.link.ask(ctx, func(c *sftp.Client) error { return c.SetExtendedData(at, ext) }); no != 0 {
			return no
		}
	}
	n.changes(at)()
	return n.Getattr(ctx, h, out)
}

func (f *FS) chmod(ctx context.Context, at string, mode uint32) syscall.Errno {
	return f.link.ask(ctx, func(c *sftp.Client) error { return c.Chmod(at, os.FileMode(mode)&os.ModePerm) })
}

// Readlink says where a link leads.
func (n *node) Readlink(ctx context.Context) ([]byte, syscall.Errno) {
	at := n.path()
	target, no := query(ctx, n.fs.link, func(c *sftp.Client) (string, error) { return c.ReadLink(at) })
	return []byte(target), no
}

// made enters a file that was just made.
func (n *node) made(ctx context.Context, name string, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	a, no := n.fs.lstat(ctx, n.child(name))
	if no != 0 {
		return nil, no
	}
	return n.enter(ctx, name, a, out), 0
}

// madeWith is made for what has permissions: sftp does not carry them when it makes
// a file, and the host's umask is not the guest's.
func (n *node) madeWith(ctx context.Context, name string, mode uint32, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	at := n.child(name)
	a, no := n.fs.lstat(ctx, at)
	if no != 0 {
		return nil, no
	}
	if mode &= 0o777; a.mode&0o777 != mode {
		if no := n.fs.chmod(ctx, at, mode); no != 0 {
			return nil, no
		}
		a.mode = a.mode&syscall.S_IFMT | mode
	}
	return n.enter(ctx, name, a, out), 0
}

// Mkdir makes a folder.
func (n *node) Mkdir(ctx context.Context, name string, mode uint32, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	defer n.changes(n.child(name))()
	if no := n.fs.link.ask(ctx, func(c *sftp.Client) error { return c.Mkdir(n.child(name)) }); no != 0 {
		return nil, no
	}
	return n.madeWith(ctx, name, mode, out)
}

// Symlink makes a link.
func (n *node) Symlink(ctx context.Context, target, name string, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	defer n.changes(n.child(name))()
	if no := n.fs.link.ask(ctx, func(c *sftp.Client) error { return c.Symlink(target, n.child(name)) }); no != 0 {
		return nil, no
	}
	return n.made(ctx, name, out)
}

// Link gives a file one more name.
func (n *node) Link(ctx context.Context, target fs.InodeEmbedder, name string, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	old, ok := target.(*node)
	if !ok {
		return nil, syscall.EXDEV
	}
	from := old.path()
	defer n.changes(n.child(name), from)()
	if no := n.fs.link.ask(ctx, func(c *sftp.Client) error { return c.Link(from, n.child(name)) }); no != 0 {
		return nil, no
	}
	return n.made(ctx, name, out)
}

// Unlink removes a file.
func (n *node) Unlink(ctx context.Context, name string) syscall.Errno {
	n.listed.forget()
	defer n.changes(n.child(name))()
	return n.fs.link.ask(ctx, func(c *sftp.Client) error { return c.Remove(n.child(name)) })
}

// Rmdir removes a folder.
func (n *node) Rmdir(ctx context.Context, name string) syscall.Errno {
	n.listed.forget()
	defer n.changes(n.child(name))()
	return n.fs.link.ask(ctx, func(c *sftp.Client) error { return c.RemoveDirectory(n.child(name)) })
}

// Rename gives a file another name.
func (n *node) Rename(ctx context.Context, name string, to fs.InodeEmbedder, newName string, flags uint32) syscall.Errno {
	dir, ok := to.(*node)
	if !ok {
		return syscall.EXDEV
	}
	n.listed.forget()
	dir.listed.forget()
	defer func() { // what is in it has other paths now
		n.fs.leases.drop(n.path(), name)
		n.fs.leases.drop(dir.path(), newName)
	}()
	defer n.changes(n.child(name), dir.child(newName))()
	return n.fs.link.ask(ctx, func(c *sftp.Client) error {
		switch flags {
		case 0:
			return c.PosixRename(n.child(name), dir.child(newName))
		case unix.RENAME_NOREPLACE:
			return c.Rename(n.child(name), dir.child(newName))
		}
		return syscall.EINVAL
	})
}
