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
