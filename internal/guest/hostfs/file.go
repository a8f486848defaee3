// SPDX-License-Identifier: Apache-2.0

//go:build linux

package hostfs

import (
	"context"
	"errors"
	"io"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"github.com/pkg/sftp"
)

// Open opens the file. Whoever opens it sees what it is now: what the kernel
// remembers of it is checked before.
func (n *node) Open(ctx context.Context, flags uint32) (fs.FileHandle, uint32, syscall.Errno) {
	path := n.path()
	if b, ok := n.small(ctx, flags); ok {
		n.opens.Add(1)
		return &ready{node: n, data: b, flags: flags}, 0, 0
	}
	if flags&syscall.O_TRUNC != 0 {
		defer n.changes(path)()
	}
	a, no := n.fs.lstat(ctx, path)
	if no != 0 {
		return nil, 0, no
	}
	before := n.last.get()
	if !before.same(a) {
		return nil, 0, syscall.ESTALE // the kernel looks the name up again
	}
	f, no := n.fs.open(ctx, path, access(flags)|int(flags)&os.O_TRUNC)
	if no != 0 {
		return nil, 0, no
	}
	n.last.set(a)
	if !before.unchanged(a) {
		n.NotifyContent(-1, 0) // attributes alone
	}
	return n.handle(f, flags), direct(flags), 0
}

// Create makes a file and opens it.
func (n *node) Create(ctx context.Context, name string, flags, mode uint32, out *fuse.EntryOut) (*fs.Inode, fs.FileHandle, uint32, syscall.Errno) {
	path := n.child(name)
	defer n.changes(path)()
	f, no := n.fs.open(ctx, path, access(flags)|os.O_CREATE|os.O_EXCL)
	made := no == 0
	if no == syscall.EEXIST && flags&syscall.O_EXCL == 0 { // the host was faster
		f, no = n.fs.open(ctx, path, access(flags)|int(flags)&os.O_TRUNC)
	}
	if no != 0 {
		return nil, nil, 0, no
	}
	enter := n.made
	if made {
		enter = func(ctx context.Context, name string, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
			return n.madeWith(ctx, name, mode, out)
		}
	}
	inode, no := enter(ctx, name, out)
	if no != 0 {
		go f.Close()
		return nil, nil, 0, no
	}
	c, ok := inode.Operations().(*node)
	if !ok {
		return nil, nil, 0, syscall.EIO
	}
	return inode, c.handle(f, flags), direct(flags), 0
}

// small returns the content of a small file that is only read, if the host has said it
// in advance and nothing since.
func (n *node) small(ctx context.Context, flags uint32) ([]byte, bool) {
	name, parent := n.Parent()
	if access(flags) != syscall.O_RDONLY || flags&(syscall.O_TRUNC|syscall.O_APPEND) != 0 || parent == nil {
		return nil, false
	}
	p, ok := parent.Operations().(*node)
	if !ok {
		return nil, false
	}
	l := n.fs.leases.known(p.path())
	if l == nil || !n.fs.walk(p.reads.next(name), name == l.first) {
		return nil, false
	}
	a, ok := l.attrs[name]
	if !ok || !leased(a) || a.mode&syscall.S_IFMT != syscall.S_IFREG || !n.last.get().same(a) || !n.last.get().unchanged(a) {
		return nil, false
	}
	return n.fs.leases.data(ctx, p.path(), name, a)
}

// walk reports whether more files of a folder will be read: the program reads one after
// the other, or begins with the folder's first one and has done so in another folder just now.
func (f *FS) walk(inOrder, first bool) bool {
	now := time.Now()
	if inOrder {
		f.walks.Store(now.UnixNano())
	}
	return inOrder || first && now.Sub(time.Unix(0, f.walks.Load())) < time.Second
}

// ready is an open file whose content is here.
type ready struct {
	node  *node
	data  []byte
	flags uint32
}

var (
	_ fs.FileReader   = (*ready)(nil)
	_ fs.FileFlusher  = (*ready)(nil)
	_ fs.FileReleaser = (*ready)(nil)
)

// Read reads from the file.
func (r *ready) Read(_ context.Context, dest []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	if off < 0 || off > int64(len(r.data)) {
		return fuse.ReadResultData(nil), 0
	}
	return fuse.ReadResultData(r.data[off:min(off+int64(len(dest)), int64(len(r.data)))]), 0
}

// Flush is as a handle's.
func (r *ready) Flush(context.Context) syscall.Errno { return syscall.ENOSYS }

// Release closes the file.
func (r *ready) Release(context.Context) syscall.Errno {
	r.node.opens.Add(-1)
	return 0
}

// access is what the file is opened for.
func access(flags uint32) int {
	how := int(flags) & syscall.O_ACCMODE
	if how != syscall.O_RDONLY {
		how |= int(flags) & syscall.O_APPEND
	}
	return how
}

// direct has what is appended written past the kernel's cache: where the file ends, the
// host knows.
func direct(flags uint32) uint32 {
	if flags&syscall.O_APPEND != 0 {
		return fuse.FOPEN_DIRECT_IO
	}
	return 0
}

// remote is a file that is open at the host.
type remote struct {
	*sftp.File
	host *sftp.Client // as long as this is the link's
}

// open opens a file at the host. One that nobody waits for any more is closed again.
func (f *FS) open(ctx context.Context, path string, flags int) (*remote, syscall.Errno) {
	var (
		mu   sync.Mutex
		file *remote
		over bool
	)
	no := f.link.again(ctx, func(c *sftp.Client) error {
		opened, err := c.OpenFile(path, flags)
		if err != nil {
			return err
		}
		mu.Lock()
		defer mu.Unlock()
		if over {
			return opened.Close()
		}
		file = &remote{opened, c}
		return nil
	})
	mu.Lock()
	defer mu.Unlock()
	over = true
	if no != 0 && file != nil {
		go file.Close()
	}
	return file, no
}

func (n *node) handle(f *remote, flags uint32) *handle {
	n.opens.Add(1)
	return &handle{node: n, flags: access(flags), file: f}
}

// handle is an open file. It is opened again if the host was lost meanwhile.
type handle struct {
	node  *node
	flags int

	mu   sync.Mutex
	file *remote
}

var (
	_ fs.FileReader   = (*handle)(nil)
	_ fs.FileWriter   = (*handle)(nil)
	_ fs.FileFlusher  = (*handle)(nil)
	_ fs.FileReleaser = (*handle)(nil)
)

func (h *handle) now() *remote {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.file
}

// reopen opens the file again in place of old, if it is still the same one.
func (h *handle) reopen(ctx context.Context, old *remote) syscall.Errno {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.file != old {
		return 0 // somebody has done it
	}
	path := h.node.path()
	a, no := h.node.fs.lstat(ctx, path)
	if no == 0 && !h.node.last.get().same(a) {
		no = syscall.ESTALE
	}
	if no != 0 {
		return no
	}
	f, no := h.node.fs.open(ctx, path, h.flags)
	if no == 0 {
		h.file = f
	}
	return no
}

// do uses the open file, twice if it must and may: to read and to write at an offset
// does no harm when it is done again.
func (h *handle) do(ctx context.Context, again bool, f func(*sftp.File) error) syscall.Errno {
	h.node.fs.link.wait()
	file := h.now()
	if !again && file.host != h.node.fs.link.now() { // it would be lost for sure
		if no := h.reopen(ctx, file); no != 0 {
			return no
		}
		file = h.now()
	}
	answer := make(chan error, 1)
	no := h.node.fs.link.on(ctx, func() error { err := f(file.File); answer <- err; return err })
	if no != errLost || !lost(<-answer) {
		return no
	}
	no = h.reopen(ctx, file)
	switch {
	case no != 0:
		return no
	case !again:
		return errLost
	}
	file = h.now()
	return h.node.fs.link.on(ctx, func() error { return f(file.File) })
}

// lost reports whether an answer will never come.
func lost(err error) bool {
	var status *sftp.StatusError
	return errors.Is(err, sftp.ErrSSHFxConnectionLost) || err != nil && !errors.As(err, &status)
}

// Read reads from the file.
func (h *handle) Read(ctx context.Context, dest []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	got := make(chan []byte, 2)
	size := len(dest)
	no := h.do(ctx, true, func(f *sftp.File) error {
		buf := make([]byte, size) // dest is the kernel's again when nobody waits any more
		n, err := f.ReadAt(buf, off)
		if err == nil || errors.Is(err, io.EOF) {
			got <- buf[:n]
			return nil
		}
		return err
	})
	if no != 0 {
		return nil, no
	}
	return fuse.ReadResultData(<-got), 0
}

// Write writes to the file.
func (h *handle) Write(ctx context.Context, data []byte, off int64) (uint32, syscall.Errno) {
	h.node.listed.forget()
	defer h.node.changes(h.node.path())()
	data = slices.Clone(data) // as above
	no := h.do(ctx, h.flags&syscall.O_APPEND == 0, func(f *sftp.File) error {
		_, err := f.WriteAt(data, off)
		return err
	})
	if no != 0 {
		return 0, no
	}
	return uint32(len(data)), 0
}

// Flush is called when a program closes the file: what it wrote is at the host
// already, so the kernel need not ask any more.
func (h *handle) Flush(context.Context) syscall.Errno { return syscall.ENOSYS }

// Release closes the file. Nobody waits for it.
func (h *handle) Release(context.Context) syscall.Errno {
	h.node.opens.Add(-1)
	go func() { _ = h.now().Close() }()
	return 0
}
