// SPDX-License-Identifier: Apache-2.0

//go:build linux

package share

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/labfile/lab/internal/guest/agentapi"
	"github.com/labfile/lab/internal/guest/foldercache"
)

// maxWatches bounds how many folders of one mount are watched: a user has some ten
// thousand or more for everything.
const maxWatches = 4096

// watched are the events by which a folder is not what was told of it.
const watched = unix.IN_MODIFY | unix.IN_ATTRIB | unix.IN_CREATE | unix.IN_DELETE | unix.IN_MOVED_FROM | unix.IN_MOVED_TO |
	unix.IN_DELETE_SELF | unix.IN_MOVE_SELF | unix.IN_UNMOUNT | unix.IN_ONLYDIR

// far are the kinds of file systems that others may change without the kernel here
// knowing (statfs(2)): NFS, SMB, 9p, FUSE, Ceph, AFS.
var far = []int64{0x6969, 0x517b, 0xff534d42, 0xfe534d42, 0x01021997, 0x65735546, 0x00c36400, 0x5346414f}

// ServeCache answers what a guest that has mounted the folder asks for at once, and
// tells it what changes, until conn ends. It closes conn. The guest is confined as by
// Serve.
func ServeCache(conn io.ReadWriteCloser, f Folder) error {
	defer conn.Close()
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return fmt.Errorf("watching %s: %w", f.Path, err)
	}
	c := &cacheServer{
		server: &server{folder: f}, out: foldercache.NewWriter(conn), events: os.NewFile(uintptr(fd), "inotify"),
		byWatch: map[int32]string{}, byPath: map[string]int32{}, changes: map[string]uint64{},
	}
	defer c.server.close()
	var wg sync.WaitGroup
	defer wg.Wait()
	defer c.events.Close()
	stop := make(chan struct{})
	defer close(stop)
	wg.Go(func() {
		defer conn.Close()
		c.watch()
	})
	wg.Go(func() { c.sameRoot(stop, conn) })
	in := foldercache.NewReader(conn)
	for {
		q, err := in.Request()
		if errors.Is(err, io.EOF) || errors.Is(err, os.ErrClosed) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("sharing %s: %w", f.Path, err)
		}
		if err := c.say(c.answer(q)); err != nil {
			return nil
		}
	}
}

// cacheServer has one connection.
type cacheServer struct {
	server *server
	events *os.File

	writing sync.Mutex
	out     *foldercache.Writer

	mu      sync.Mutex
	byWatch map[int32]string // path by watch
	byPath  map[string]int32
	changes map[string]uint64 // how often a folder that is watched has changed
}

func (c *cacheServer) say(m foldercache.Message) error {
	c.writing.Lock()
	defer c.writing.Unlock()
	return c.out.Message(m)
}

// sameRoot ends the connection when the folder was replaced by another of its name:
// whatever the guest knows is of the one before.
func (c *cacheServer) sameRoot(stop <-chan struct{}, conn io.Closer) {
	var first *os.Root
	t := time.NewTicker(rootCheck)
	defer t.Stop()
	for {
		root, err := c.server.current()
		if first == nil {
			first = root
		}
		if err != nil || root != first {
			conn.Close()
			return
		}
		select {
		case <-stop:
			return
		case <-t.C:
		}
	}
}

func (c *cacheServer) answer(q foldercache.Request) foldercache.Message {
	m := foldercache.Message{Kind: foldercache.Listing, ID: q.ID, Path: q.Path}
	if q.From != "" {
		m.Kind = foldercache.Content
	}
	if err := c.fill(&m, q); err != nil {
		m.Files = nil
		m.Errno = syscall.EIO
		_ = errors.As(err, &m.Errno)
	}
	return m
}

func (c *cacheServer) fill(m *foldercache.Message, q foldercache.Request) error {
	root, name, err := c.server.at(q.Path)
	if err != nil {
		return err
	}
	if err := c.server.opened(); err != nil {
		return err
	}
	defer c.server.open.Add(-1)
	dir, err := openDir(root, name)
	if err != nil {
		return err
	}
	defer dir.Close()
	folder, err := rootOf(dir)
	if err != nil {
		return err
	}
	defer folder.Close()
	if q.From != "" {
		return contents(m, dir, folder, q.From)
	}
	key := "/" + strings.TrimPrefix(path.Clean("/"+q.Path), "/")
	before, err := c.add(key, dir)
	if err != nil {
		return err
	}
	for range 3 {
		if m.Files, err = list(dir, folder); err != nil {
			return err
		}
		c.mu.Lock()
		now, there := c.changes[key]
		c.mu.Unlock()
		if !there {
			return syscall.EAGAIN // it was removed or moved
		}
		if now == before {
			return nil
		}
		before = now
	}
	return syscall.EAGAIN // it never stands still
}

// add watches a folder and returns how often it has changed.
func (c *cacheServer) add(key string, dir *os.File) (uint64, error) {
	var fs unix.Statfs_t
	if err := unix.Fstatfs(int(dir.Fd()), &fs); err != nil {
		return 0, err
	}
	if slices.Contains(far, int64(fs.Type)) {
		return 0, syscall.EOPNOTSUPP
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.byPath) >= maxWatches {
		return 0, syscall.ENOSPC
	}
	raw, err := c.events.SyscallConn()
	if err != nil {
		return 0, err
	}
	var wd int
	var werr error
	if err := raw.Control(func(fd uintptr) {
		wd, werr = unix.InotifyAddWatch(int(fd), fmt.Sprintf("/proc/self/fd/%d", dir.Fd()), watched)
	}); err != nil || werr != nil {
		return 0, errors.Join(err, werr)
	}
	if old, ok := c.byWatch[int32(wd)]; ok && old != key {
		return 0, syscall.EXDEV // one folder in two places: it has one watch
	}
	c.byWatch[int32(wd)], c.byPath[key] = key, int32(wd)
	c.changes[key]++
	return c.changes[key], nil
}

// list reads a folder with everything that is known of its files.
func list(dir *os.File, folder *os.Root) ([]foldercache.File, error) {
	if _, err := dir.Seek(0, io.SeekStart); err != nil {
		return nil, err
	}
	names, err := dir.Readdirnames(foldercache.MaxFiles + 1)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	if len(names) > foldercache.MaxFiles {
		return nil, syscall.EFBIG
	}
	slices.Sort(names)
	files := make([]foldercache.File, 0, len(names))
	for _, name := range names {
		if f, ok := describe(folder.Lstat(name)); ok {
			f.Name = name
			files = append(files, f)
		}
	}
	return files, nil
}

func describe(fi os.FileInfo, err error) (foldercache.File, bool) {
	if err != nil {
		return foldercache.File{}, false
	}
	st, ok := fi.Sys().(*syscall.Stat_t)
	if !ok {
		return foldercache.File{}, false
	}
	at := func(t syscall.Timespec) time.Time { return time.Unix(t.Unix()) }
	return foldercache.File{Mode: st.Mode, Size: uint64(st.Size), Attr: agentapi.Attr{
		Dev: st.Dev, Ino: st.Ino, Nlink: st.Nlink, Blocks: uint64(st.Blocks),
		Atime: at(st.Atim), Mtime: at(st.Mtim), Ctime: at(st.Ctim),
	}}, true
}

// contents reads small files from one on, as many as one answer holds.
func contents(m *foldercache.Message, dir *os.File, folder *os.Root, from string) error {
	names, err := dir.Readdirnames(foldercache.MaxFiles + 1)
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	slices.Sort(names)
	first, _ := slices.BinarySearch(names, from)
	total := 0
	for _, name := range names[first:] {
		f, ok := describe(folder.Lstat(name))
		if !ok || f.Mode&syscall.S_IFMT != syscall.S_IFREG || f.Size > foldercache.SmallFile {
			continue
		}
		b, ok := small(folder, name, &f)
		if !ok {
			continue
		}
		f.Name, f.Data = name, b
		m.Files = append(m.Files, f)
		if total += len(b) + 100; foldercache.Full(total) {
			break
		}
	}
	return nil
}

// small reads a small file, with what is known of it.
func small(folder *os.Root, name string, f *foldercache.File) ([]byte, bool) {
	file, err := folder.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK|syscall.O_NOCTTY|syscall.O_NOFOLLOW, 0)
	if err != nil {
		return nil, false
	}
	defer file.Close()
	before, ok := describe(file.Stat())
	if !ok || before.Mode&syscall.S_IFMT != syscall.S_IFREG {
		return nil, false
	}
	b, err := io.ReadAll(io.LimitReader(file, foldercache.SmallFile+1))
	if err != nil || len(b) > foldercache.SmallFile {
		return nil, false
	}
	after, ok := describe(file.Stat())
	*f = after
	return b, ok && before.Size == after.Size && uint64(len(b)) == after.Size && before.Attr.Mtime.Equal(after.Attr.Mtime)
}

// watch tells the guest what changes.
func (c *cacheServer) watch() {
	buf := make([]byte, 64<<10)
	for {
		n, err := c.events.Read(buf)
		if err != nil {
			return
		}
		said := map[[2]string]bool{} // a file that is written has many events
		for b := buf[:n]; len(b) >= unix.SizeofInotifyEvent; {
			wd := int32(binary.NativeEndian.Uint32(b))
			mask := binary.NativeEndian.Uint32(b[4:])
			length := int(binary.NativeEndian.Uint32(b[12:]))
			name := strings.TrimRight(string(b[unix.SizeofInotifyEvent:unix.SizeofInotifyEvent+length]), "\x00")
			b = b[unix.SizeofInotifyEvent+length:]
			m, ok := c.event(wd, mask, name)
			if key := [2]string{m.Path, m.Name}; ok && !said[key] {
				said[key] = true
				if c.say(m) != nil {
					return
				}
			}
		}
	}
}

// event makes a message of an event, if anybody was told of the folder.
func (c *cacheServer) event(wd int32, mask uint32, name string) (foldercache.Message, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if mask&unix.IN_Q_OVERFLOW != 0 {
		for key := range c.changes {
			c.changes[key]++
		}
		return foldercache.Message{Kind: foldercache.Forget}, true
	}
	key, ok := c.byWatch[wd]
	if !ok {
		return foldercache.Message{}, false
	}
	c.changes[key]++
	if mask&(unix.IN_DELETE_SELF|unix.IN_MOVE_SELF|unix.IN_UNMOUNT|unix.IN_IGNORED) != 0 {
		c.drop(key)
		return foldercache.Message{Kind: foldercache.Changed, Path: key}, true
	}
	if mask&unix.IN_ISDIR != 0 && mask&(unix.IN_MOVED_FROM|unix.IN_DELETE|unix.IN_MOVED_TO) != 0 {
		c.drop(path.Join(key, name)) // what is there now is another one
	}
	return foldercache.Message{Kind: foldercache.Changed, Path: key, Name: name}, true
}

// drop ends the watches of a folder and of all within it.
func (c *cacheServer) drop(dir string) {
	raw, err := c.events.SyscallConn()
	if err != nil {
		return
	}
	for key, wd := range c.byPath {
		if key == dir || strings.HasPrefix(key, strings.TrimSuffix(dir, "/")+"/") {
			_ = raw.Control(func(fd uintptr) { _, _ = unix.InotifyRmWatch(int(fd), uint32(wd)) })
			delete(c.byPath, key)
			delete(c.byWatch, wd)
			delete(c.changes, key)
		}
	}
}
