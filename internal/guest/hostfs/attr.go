// SPDX-License-Identifier: Apache-2.0

//go:build linux

package hostfs

import (
	"context"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"github.com/pkg/sftp"

	"github.com/labfile/lab/internal/guest/agentapi"
)

// attr is what the host tells of a file.
type attr struct {
	agentapi.Attr
	mode uint32 // as stat(2) has it
	size uint64
}

func attrOf(info os.FileInfo) attr {
	st, ok := info.Sys().(*sftp.FileStat)
	if !ok {
		return attr{}
	}
	a := attr{mode: st.Mode, size: st.Size}
	a.Nlink, a.Blocks = 1, (st.Size+511)/512
	a.Atime, a.Mtime, a.Ctime = st.AccessTime(), st.ModTime(), st.ModTime()
	for _, e := range st.Extended {
		if more, err := agentapi.ParseAttr(e.ExtData); e.ExtType == agentapi.AttrName && err == nil {
			a.Attr = more
		}
	}
	return a
}

// same reports whether both are one file at the host.
func (a attr) same(b attr) bool {
	return a.Dev == b.Dev && a.Ino == b.Ino && a.mode&syscall.S_IFMT == b.mode&syscall.S_IFMT
}

// unchanged reports whether the file's content is, as far as that can be told.
func (a attr) unchanged(b attr) bool {
	return a.size == b.size && a.Mtime.Equal(b.Mtime) && a.Ctime.Equal(b.Ctime)
}

// fill says it in the kernel's words. Everything belongs to one user of the guest,
// whoever it belongs to on the host, and runs with the rights of who starts it.
func (f *FS) fill(out *fuse.Attr, a attr) {
	out.Mode = a.mode & (syscall.S_IFMT | 0o777)
	out.Size, out.Blocks, out.Blksize, out.Nlink = a.size, a.Blocks, 4096, uint32(a.Nlink)
	out.Owner = fuse.Owner{Uid: f.config.UID, Gid: f.config.GID}
	out.SetTimes(&a.Atime, &a.Mtime, &a.Ctime)
}

func (f *FS) lstat(ctx context.Context, path string) (attr, syscall.Errno) {
	return query(ctx, f.link, func(c *sftp.Client) (attr, error) {
		info, err := c.Lstat(path)
		if err != nil {
			return attr{}, err
		}
		return attrOf(info), nil
	})
}

func (f *FS) readDir(ctx context.Context, path string) ([]os.FileInfo, syscall.Errno) {
	return query(ctx, f.link, func(c *sftp.Client) ([]os.FileInfo, error) { return c.ReadDir(path) })
}

// query asks the host for something, which does no harm.
func query[T any](ctx context.Context, l *link, f func(*sftp.Client) (T, error)) (T, syscall.Errno) {
	answers := make(chan T, 2) // one that nobody waits for any more stays in it
	no := l.again(ctx, func(c *sftp.Client) error {
		v, err := f(c)
		if err == nil {
			answers <- v
		}
		return err
	})
	if no != 0 {
		var none T
		return none, no
	}
	return <-answers, 0
}

// lastAttr is what was last seen of a file.
type lastAttr struct {
	mu sync.Mutex
	a  attr
}

func (l *lastAttr) get() attr {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.a
}

func (l *lastAttr) set(a attr) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.a = a
}

// cache is what a listing said of a folder's files, for the lookups that follow it at
// once: the kernel makes one for each entry.
type cache struct {
	mu    sync.Mutex
	files map[string]attr
	until time.Time
}

func (c *cache) fill(files map[string]attr) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.files, c.until = files, time.Now().Add(ttl)
}

// take returns what is known of a file, once.
func (c *cache) take(name string) (attr, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if time.Now().After(c.until) {
		c.files = nil
	}
	a, ok := c.files[name]
	delete(c.files, name)
	return a, ok
}

// forget drops it all: something has changed.
func (c *cache) forget() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.files = nil
}
