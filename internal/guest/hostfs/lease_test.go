// SPDX-License-Identifier: Apache-2.0

//go:build linux

package hostfs

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/labfile/lab/internal/share"
)

// cached connects the second stream, and returns when it is known here.
func (k *kernel) cached() net.Conn {
	k.Helper()
	host, guest := net.Pipe()
	k.wg.Go(func() { _ = share.ServeCache(host, share.Folder{Path: k.dir, Writable: true}) })
	k.wg.Go(func() { _ = k.fs.ServeCache(guest) })
	k.Cleanup(func() { host.Close() })
	k.eventually("the stream is there", func() bool {
		k.fs.leases.mu.Lock()
		defer k.fs.leases.mu.Unlock()
		return k.fs.leases.stream != nil
	})
	return host
}

func (k *kernel) eventually(what string, cond func() bool) {
	k.Helper()
	for end := time.Now().Add(20 * time.Second); !cond(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			k.Fatalf("not within the time: %s", what)
		}
	}
}

// tells waits until the kernel is told of a file.
func (k *kernel) tells(want string) {
	k.Helper()
	late := time.After(20 * time.Second)
	for {
		select {
		case got := <-k.told:
			if got == want {
				return
			}
		case <-late:
			k.Fatalf("the kernel was not told of %q", want)
		}
	}
}

func TestLease(t *testing.T) {
	k := newKernel(t)
	for i := range 10 {
		k.write(fmt.Sprint("f", i), fmt.Sprint("text ", i))
	}
	k.cached()
	nodes := map[string]uint64{}
	for i := range 10 {
		name := fmt.Sprint("f", i)
		out, st := k.lookup(name)
		if !st.Ok() || out.Size != 6 {
			t.Fatalf("%s: %v, %d bytes", name, st, out.Size)
		}
		nodes[name] = out.NodeId
		if long := out.AttrTimeout() > 10*time.Second; long != (i >= asksFirst) {
			t.Errorf("%s may be remembered for %v", name, out.AttrTimeout())
		}
	}
	// The first files are opened at the host; the content of those after them comes along.
	read := func(i int) {
		t.Helper()
		name := fmt.Sprint("f", i)
		fh, st := k.open(nodes[name], syscall.O_RDONLY)
		if !st.Ok() {
			t.Fatalf("open %s: %v", name, st)
		}
		if got, st := k.read(nodes[name], fh); got != fmt.Sprint("text ", i) {
			t.Errorf("%s has %q, %v", name, got, st)
		}
		k.raw.Release(nil, &fuse.ReleaseIn{InHeader: fuse.InHeader{NodeId: nodes[name]}, Fh: fh})
	}
	for i := range 8 {
		read(i)
	}
	k.host.Close() // what is known needs no sftp
	k.eventually("sftp is gone", func() bool { return k.fs.link.now() == nil })
	read(8)
	if out, st := k.lookup("f7"); !st.Ok() || out.Size != 6 {
		t.Errorf("f7: %v, %d bytes", st, out.Size)
	}
	if _, st := k.lookup("none"); st != fuse.ENOENT {
		t.Errorf("none: %v", st)
	}
}

func TestLeaseEnds(t *testing.T) {
	k := newKernel(t)
	if err := os.Mkdir(filepath.Join(k.dir, "sub"), 0o755); err != nil {
		t.Fatal(err)
	}
	k.write("sub/deep", "1")
	cache := k.cached()
	known := func(dir string) bool { return k.fs.leases.known(dir) != nil }
	get := func(dir string) {
		t.Helper()
		k.eventually(dir+" is told of", func() bool {
			k.fs.leases.mu.Lock()
			delete(k.fs.leases.refused, dir) // which a change at once is the reason for
			k.fs.leases.mu.Unlock()
			return k.fs.leases.get(t.Context(), dir) != nil
		})
	}
	size := func(name string) uint64 {
		out, st := k.lookup(name)
		if !st.Ok() {
			t.Errorf("%s: %v", name, st)
		}
		return out.Size
	}
	get("/")
	k.write("file", "longer")
	k.tells("/ file")
	if known("/") || size("file") != 6 {
		t.Errorf("after a write at the host: known %v, %d bytes", known("/"), size("file"))
	}

	// What is done here is known at once.
	get("/")
	if st := k.raw.Unlink(nil, &fuse.InHeader{NodeId: 1}, "file"); !st.Ok() {
		t.Fatal(st)
	}
	if known("/") {
		t.Error("still known after a file was removed here")
	}
	if _, st := k.lookup("file"); st != fuse.ENOENT {
		t.Errorf("file: %v", st)
	}

	// A folder that is moved takes everything within it along.
	k.tells("/ file")
	get("/")
	get("/sub")
	if err := os.Rename(filepath.Join(k.dir, "sub"), filepath.Join(k.dir, "other")); err != nil {
		t.Fatal(err)
	}
	k.tells("/ other")
	if known("/") || known("/sub") {
		t.Errorf("after a folder was moved: %v, %v", known("/"), known("/sub"))
	}

	// Without the stream nothing is known.
	get("/")
	cache.Close()
	k.eventually("everything is forgotten", func() bool { return !known("/") })
}

// TestWalk goes through two folders, file by file: in the second one nothing needs to be
// asked for one by one, not even the first file.
func TestWalk(t *testing.T) {
	k := newKernel(t)
	for _, dir := range []string{"a", "b"} {
		if err := os.Mkdir(filepath.Join(k.dir, dir), 0o755); err != nil {
			t.Fatal(err)
		}
		for i := range 5 {
			k.write(fmt.Sprint(dir, "/f", i), fmt.Sprint("text ", i))
		}
	}
	k.cached()
	file := func(dir uint64, name string) uint64 {
		t.Helper()
		var out fuse.EntryOut
		if st := k.raw.Lookup(nil, &fuse.InHeader{NodeId: dir}, name, &out); !st.Ok() {
			t.Fatalf("%s: %v", name, st)
		}
		return out.NodeId
	}
	open := func(node uint64) {
		t.Helper()
		fh, st := k.open(node, syscall.O_RDONLY)
		if !st.Ok() {
			t.Fatal(st)
		}
		defer k.release(node, fh)
		if got, st := k.read(node, fh); len(got) != 6 {
			t.Errorf("read %q, %v", got, st)
		}
	}
	dirs := map[string]uint64{}
	for _, dir := range []string{"a", "b"} {
		dirs[dir] = file(1, dir)
		if k.fs.leases.get(t.Context(), "/"+dir) == nil {
			t.Fatalf("nothing is told of %s", dir)
		}
	}
	// Out of the blue the first file of a folder is opened at the host, alone.
	open(file(dirs["b"], "f0"))
	if n := len(k.fs.leases.known("/b").content); n > 0 {
		t.Errorf("the content of %d files was asked for", n)
	}
	for i := range 5 {
		open(file(dirs["a"], fmt.Sprint("f", i)))
	}
	open(file(dirs["b"], "f0"))
	if n := len(k.fs.leases.known("/b").content); n != 4 {
		t.Errorf("the content of %d more files is here", n)
	}
}

// TestFolderItself has the kernel remember the attributes of a folder, which it needs for
// every name in it, until something in the folder changes.
func TestFolderItself(t *testing.T) {
	k := newKernel(t)
	if err := os.Mkdir(filepath.Join(k.dir, "sub"), 0o755); err != nil {
		t.Fatal(err)
	}
	k.cached()
	sub, st := k.lookup("sub")
	if !st.Ok() || k.fs.leases.get(t.Context(), "/") == nil || k.fs.leases.get(t.Context(), "/sub") == nil {
		t.Fatalf("sub: %v", st)
	}
	attrs := func(node uint64) fuse.AttrOut {
		t.Helper()
		var out fuse.AttrOut
		if st := k.raw.GetAttr(nil, &fuse.GetAttrIn{InHeader: fuse.InHeader{NodeId: node}}, &out); !st.Ok() {
			t.Fatal(st)
		}
		return out
	}
	for _, node := range []uint64{1, sub.NodeId} {
		attrs(node) // from the host
		if out := attrs(node); out.Timeout() < 10*time.Second {
			t.Errorf("node %d may be remembered for %v", node, out.Timeout())
		}
	}
	if out, _ := k.lookup("sub"); out.AttrTimeout() < 10*time.Second {
		t.Errorf("sub may be remembered for %v", out.AttrTimeout())
	}
	before := attrs(sub.NodeId)
	if err := os.Mkdir(filepath.Join(k.dir, "sub", "new"), 0o755); err != nil {
		t.Fatal(err)
	}
	k.tells("/sub new")
	if out := attrs(sub.NodeId); out.Nlink != before.Nlink+1 && out.Mtime == before.Mtime && out.Mtimensec == before.Mtimensec {
		t.Errorf("after a folder was made in it: %+v, before: %+v", out.Attr, before.Attr)
	}
	if err := os.Chmod(filepath.Join(k.dir, "sub"), 0o700); err != nil {
		t.Fatal(err)
	}
	k.tells("/ sub")
	if out := attrs(sub.NodeId); out.Mode&0o777 != 0o700 {
		t.Errorf("after chmod: %o", out.Mode)
	}
}
