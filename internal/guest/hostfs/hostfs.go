// SPDX-License-Identifier: Apache-2.0

//go:build linux

// Package hostfs is a folder of the host as a file system of the guest: FUSE to the
// kernel, sftp to the host. Files are known by their paths. What is known of a folder
// holds until the host says that it changed or, if the host does not tell of it, for a
// fifth of a second; then opening a file shows at once what it is.
package hostfs

import (
	"context"
	"fmt"
	"io"
	"os"
	"runtime"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// Config says how a folder is mounted.
type Config struct {
	Path     string `json:"path"` // an existing folder
	Source   string `json:"source"`
	Writable bool   `json:"writable"`
	UID      uint32 `json:"uid"` // to whom everything belongs
	GID      uint32 `json:"gid"`
}

// Type is the file system's type as /proc/mounts has it.
const Type = "fuse.lab"

// ttl is how long the kernel may remember what it was told of a file.
const ttl = 200 * time.Millisecond

var (
	errNotExist   = os.ErrNotExist
	errPermission = os.ErrPermission
)

// FS is a mounted folder.
type FS struct {
	config Config
	link   *link
	leases *leases
	root   *node
	device *device

	dev   atomic.Uint64 // the host's device of the first file that was seen
	nodes atomic.Uint64 // how many there have been
	walks atomic.Int64  // when files were last read one after the other, as time.Time.UnixNano
}

// Mount mounts a folder, in a process that does nothing else. It answers when Serve has
// connected it with the host.
func Mount(c Config) (*FS, error) {
	runtime.GOMAXPROCS(runtime.NumCPU() + 1) // see device.wait
	f := &FS{config: c, link: newLink()}
	f.root = &node{fs: f}
	f.leases = newLeases(f.changed)
	flags := uintptr(unix.MS_NOSUID | unix.MS_NODEV)
	if !c.Writable {
		flags |= unix.MS_RDONLY
	}
	device, err := openDevice(c.Path, c.Source, flags)
	if err != nil {
		return nil, fmt.Errorf("mounting %s: %w", c.Path, err)
	}
	device.serveFolder(f)
	readAhead(c.Path)
	return f, nil
}

// readAhead has the kernel read ahead, by several requests at once. Without it things are
// slow, and work.
func readAhead(path string) {
	var st unix.Stat_t
	if unix.Lstat(path, &st) == nil {
		name := fmt.Sprintf("/sys/class/bdi/%d:%d/read_ahead_kb", unix.Major(st.Dev), unix.Minor(st.Dev))
		_ = os.WriteFile(name, []byte("1024"), 0)
	}
}

// Serve connects the folder with the host, until conn ends. It takes the place of the
// connection before.
func (f *FS) Serve(conn io.ReadWriteCloser) error { return f.link.serve(conn) }

// ServeCache is Serve for the stream of foldercache, which the folder can do without.
func (f *FS) ServeCache(conn io.ReadWriteCloser) error { return f.leases.serve(conn) }

// changed tells the kernel that a file, or a folder if name is empty, is not what it
// was.
func (f *FS) changed(dir, name string) {
	n := &f.root.Inode
	for part := range strings.SplitSeq(strings.Trim(dir, "/"), "/") {
		if part == "" {
			continue
		}
		if n = n.GetChild(part); n == nil {
			return
		}
	}
	if name == "" {
		for name, child := range n.Children() {
			n.NotifyEntry(name)
			child.NotifyContent(0, 0)
		}
		n.NotifyContent(-1, 0)
		return
	}
	n.NotifyEntry(name)
	if child := n.GetChild(name); child != nil {
		child.NotifyContent(0, 0)
	}
	n.NotifyContent(-1, 0) // attributes alone
}

// Wait returns when the folder was taken away, by whomever.
func (f *FS) Wait() { <-f.device.ended }

// Close takes the folder away, at once from new users, and from those who have a file
// open when they close it.
func (f *FS) Close() error { return unix.Unmount(f.config.Path, unix.MNT_DETACH) }

// node is a file or a folder.
type node struct {
	fs.Inode
	fs *FS

	listed cache // of a folder
	last   lastAttr
	opens  atomic.Int64 // how often the file is open
	reads  inOrder      // of a folder
	asked  atomic.Int64 // how often a folder's files were looked up one by one
}

var (
	_ fs.NodeStatfser   = (*node)(nil)
	_ fs.NodeGetattrer  = (*node)(nil)
	_ fs.NodeSetattrer  = (*node)(nil)
	_ fs.NodeLookuper   = (*node)(nil)
	_ fs.NodeReaddirer  = (*node)(nil)
	_ fs.NodeReadlinker = (*node)(nil)
	_ fs.NodeMkdirer    = (*node)(nil)
	_ fs.NodeUnlinker   = (*node)(nil)
	_ fs.NodeRmdirer    = (*node)(nil)
	_ fs.NodeRenamer    = (*node)(nil)
	_ fs.NodeLinker     = (*node)(nil)
	_ fs.NodeSymlinker  = (*node)(nil)
	_ fs.NodeCreater    = (*node)(nil)
	_ fs.NodeOpener     = (*node)(nil)
	_ fs.NodeFsyncer    = (*node)(nil)
)

// path is the file's name at the host.
func (n *node) path() string { return "/" + n.Path(nil) }

func (n *node) child(name string) string {
	if p := n.path(); p != "/" {
		return p + "/" + name
	}
	return "/" + name
}

// enter makes the node of a child, or finds the one that it has: a file that the
// host replaced under the same name is another one.
func (n *node) enter(ctx context.Context, name string, a attr, out *fuse.EntryOut) *fs.Inode {
	n.fs.fill(&out.Attr, a)
	if old := n.GetChild(name); old != nil {
		if c, ok := old.Operations().(*node); ok && c.last.get().same(a) {
			c.last.set(a)
			return old
		}
	}
	c := &node{fs: n.fs}
	c.last.set(a)
	return n.NewInode(ctx, c, n.fs.identity(a))
}

// identity is what a new node is known by. It has the number that its file has at the
// host, so that an index that git wrote there or before a restart is good here. Numbers
// of other devices of the host could be the same: such files get ones of their own. The
// generation keeps nodes apart all the same, for a file with two names has two nodes.
func (f *FS) identity(a attr) fs.StableAttr {
	id := fs.StableAttr{Mode: a.mode & syscall.S_IFMT, Gen: f.nodes.Add(1)}
	if a.Ino > fuse.FUSE_ROOT_ID && a.Ino < 1<<63 && a.Dev != 0 && a.Dev == f.dev.Load() { // those above are given to others
		id.Ino = a.Ino
	}
	return id
}

// asksFirst is how many files of a folder are asked for one by one until the folder is
// asked for.
const asksFirst = 1

// lease returns what is known of the folder. It is asked for if more and more of its
// files are looked at.
func (n *node) lease(ctx context.Context) *lease {
	dir := n.path()
	if l := n.fs.leases.known(dir); l != nil {
		return l
	}
	if n.asked.Add(1) <= asksFirst {
		return nil
	}
	return n.fs.leases.get(ctx, dir)
}

// leased reports whether what is known of a file holds until it is heard otherwise: one
// with several names may change by another.
func leased(a attr) bool { return a.Nlink == 1 || a.mode&syscall.S_IFMT == syscall.S_IFDIR }

// Lookup finds a child.
func (n *node) Lookup(ctx context.Context, name string, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	if l := n.lease(ctx); l != nil {
		a, ok := l.attrs[name]
		if !ok {
			return nil, syscall.ENOENT
		}
		if leased(a) {
			left := time.Until(l.until)
			out.SetEntryTimeout(left)
			out.SetAttrTimeout(left)
			if a.mode&syscall.S_IFMT == syscall.S_IFDIR {
				out.SetAttrTimeout(time.Nanosecond) // what is done in it changes it, and nobody tells
				if own, until, ok := n.fs.leases.folder(n.child(name)); ok && own.same(a) {
					a = own
					out.SetAttrTimeout(time.Until(until))
				}
			}
			return n.enter(ctx, name, a, out), 0
		}
	}
	a, ok := n.listed.take(name)
	if !ok {
		var no syscall.Errno
		if a, no = n.fs.lstat(ctx, n.child(name)); no != 0 {
			return nil, no
		}
	}
	return n.enter(ctx, name, a, out), 0
}

// Getattr tells of the file. What was deleted or replaced while it is open stays as
// it was last seen.
func (n *node) Getattr(ctx context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	if n.IsRoot() && n.fs.link.new() { // to mount it, the kernel has to know that it is a folder
		n.fs.fill(&out.Attr, attr{mode: syscall.S_IFDIR | 0o755})
		return 0
	}
	if name, parent := n.Parent(); parent != nil {
		p, ok := parent.Operations().(*node)
		if l := (*lease)(nil); ok {
			if l = n.fs.leases.known(p.path()); l != nil {
				if a, ok := l.attrs[name]; ok && leased(a) && a.mode&syscall.S_IFMT != syscall.S_IFDIR && n.last.get().same(a) {
					n.last.set(a)
					n.fs.fill(&out.Attr, a)
					out.SetTimeout(time.Until(l.until))
					return 0
				}
			}
		}
	}
	at, before := n.path(), n.last.get()
	if a, until, ok := n.fs.leases.folder(at); ok && (n.IsRoot() || before.same(a)) {
		n.last.set(a)
		n.fs.fill(&out.Attr, a)
		out.SetTimeout(time.Until(until))
		return 0
	}
	own := n.fs.leases.known(at)
	a, no := n.fs.lstat(ctx, at)
	switch {
	case no == 0 && (n.IsRoot() || before.same(a)):
		if n.IsRoot() {
			n.fs.dev.Store(a.Dev)
		}
		n.last.set(a)
		n.fs.leases.learn(at, own, a)
	case n.opens.Load() > 0 && (no == 0 || no == syscall.ENOENT):
		a = before
	case no == 0:
		return syscall.ESTALE // the kernel looks the name up again
	default:
		return no
	}
	n.fs.fill(&out.Attr, a)
	return 0
}

// Readdir lists the folder.
func (n *node) Readdir(ctx context.Context) (fs.DirStream, syscall.Errno) {
	if l := n.fs.leases.get(ctx, n.path()); l != nil && (!l.loose || time.Since(l.told) < ttl) {
		list := make([]fuse.DirEntry, 0, len(l.files))
		now := map[string]attr{}
		for _, f := range l.files {
			list = append(list, fuse.DirEntry{Name: f.Name, Mode: f.Mode & syscall.S_IFMT})
			if a := l.attrs[f.Name]; !leased(a) {
				now[f.Name] = a
			}
		}
		n.listed.fill(now)
		return fs.NewListDirStream(list), 0
	}
	files, no := n.fs.readDir(ctx, n.path())
	if no != 0 {
		return nil, no
	}
	list := make([]fuse.DirEntry, 0, len(files))
	known := make(map[string]attr, len(files))
	for _, f := range files {
		a := attrOf(f)
		list = append(list, fuse.DirEntry{Name: f.Name(), Mode: a.mode & syscall.S_IFMT})
		known[f.Name()] = a
	}
	n.listed.fill(known)
	return fs.NewListDirStream(list), 0
}
