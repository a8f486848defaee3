// SPDX-License-Identifier: Apache-2.0

//go:build linux

package hostfs

import (
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"go.uber.org/goleak"

	"github.com/labfile/lab/internal/share"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// kernel stands in for the guest's: it makes the requests that a mounted folder gets.
type kernel struct {
	*testing.T
	raw  fuse.RawFileSystem
	fs   *FS
	dir  string      // at the host
	told chan string // of what the kernel is told
	wg   sync.WaitGroup
	host net.Conn
}

func newKernel(t *testing.T) *kernel {
	t.Helper()
	f := &FS{config: Config{UID: 1000, GID: 1001}, link: newLink()}
	k := &kernel{T: t, fs: f, dir: t.TempDir(), told: make(chan string, 1000)}
	f.root = &node{fs: f}
	f.leases = newLeases(func(dir, name string) { k.told <- dir + " " + name })
	k.raw = fs.NewNodeFS(f.root, &fs.Options{NullPermissions: true})
	k.write("file", "one")
	k.connect()
	t.Cleanup(k.disconnect)
	return k
}

func (k *kernel) write(name, text string) {
	k.Helper()
	if err := os.WriteFile(filepath.Join(k.dir, name), []byte(text), 0o640); err != nil {
		k.Fatal(err)
	}
}

// connect begins to serve the folder, and returns when that is known here.
func (k *kernel) connect() {
	host, guest := net.Pipe()
	k.host = host
	k.fs.link.mu.Lock()
	changed := k.fs.link.changed
	k.fs.link.mu.Unlock()
	k.wg.Go(func() { _ = share.Serve(host, share.Folder{Path: k.dir, Writable: true}) })
	k.wg.Go(func() { _ = k.fs.Serve(guest) })
	<-changed
}

func (k *kernel) disconnect() {
	k.host.Close()
	k.wg.Wait()
}

func (k *kernel) lookup(name string) (fuse.EntryOut, fuse.Status) {
	var out fuse.EntryOut
	return out, k.raw.Lookup(nil, &fuse.InHeader{NodeId: 1}, name, &out)
}

func (k *kernel) open(node uint64, flags uint32) (uint64, fuse.Status) {
	var out fuse.OpenOut
	st := k.raw.Open(nil, &fuse.OpenIn{InHeader: fuse.InHeader{NodeId: node}, Flags: flags}, &out)
	return out.Fh, st
}

func (k *kernel) read(node, fh uint64) (string, fuse.Status) {
	buf := make([]byte, 100)
	r, st := k.raw.Read(nil, &fuse.ReadIn{InHeader: fuse.InHeader{NodeId: node}, Fh: fh, Size: 100}, buf)
	if !st.Ok() {
		return "", st
	}
	b, st := r.Bytes(buf)
	return string(b), st
}

func (k *kernel) release(node, fh uint64) {
	k.raw.Release(nil, &fuse.ReleaseIn{InHeader: fuse.InHeader{NodeId: node}, Fh: fh})
}

func TestLookup(t *testing.T) {
	k := newKernel(t)
	e, st := k.lookup("file")
	if !st.Ok() || e.Mode != syscall.S_IFREG|0o640 || e.Size != 3 || e.Uid != 1000 || e.Gid != 1001 || e.Nlink != 1 {
		t.Errorf("got %+v, %v", e.Attr, st)
	}
	if same, _ := k.lookup("file"); same.NodeId != e.NodeId {
		t.Error("a file that is the same has become another one")
	}
	if _, st := k.lookup("none"); st != fuse.ENOENT {
		t.Error(st)
	}
	// An editor replaces a file by another one of its name.
	k.write("new", "another")
	if err := os.Rename(filepath.Join(k.dir, "new"), filepath.Join(k.dir, "file")); err != nil {
		t.Fatal(err)
	}
	if _, st := k.open(e.NodeId, syscall.O_RDONLY); st != fuse.Status(syscall.ESTALE) {
		t.Errorf("opening a file that was replaced: %v", st)
	}
	next, st := k.lookup("file")
	if !st.Ok() || next.NodeId == e.NodeId || next.Size != 7 {
		t.Errorf("got %+v, %v", next, st)
	}
}

// TestReconnect goes on with an open file when the host is back, unless it is another
// file then.
func TestReconnect(t *testing.T) {
	k := newKernel(t)
	e, _ := k.lookup("file")
	fh, st := k.open(e.NodeId, syscall.O_RDWR)
	if !st.Ok() {
		t.Fatal(st)
	}
	for range 2 {
		k.disconnect()
		k.connect()
		if got, st := k.read(e.NodeId, fh); got != "one" || !st.Ok() {
			t.Errorf("read %q, %v", got, st)
		}
	}
	k.disconnect()
	k.connect()
	n, st := k.raw.Write(nil, &fuse.WriteIn{InHeader: fuse.InHeader{NodeId: e.NodeId}, Fh: fh, Offset: 3}, []byte(", two"))
	if n != 5 || !st.Ok() {
		t.Errorf("wrote %d, %v", n, st)
	}
	if got, err := os.ReadFile(filepath.Join(k.dir, "file")); string(got) != "one, two" || err != nil {
		t.Errorf("the host has %q, %v", got, err)
	}
	k.disconnect()
	k.write("new", "another")
	if err := os.Rename(filepath.Join(k.dir, "new"), filepath.Join(k.dir, "file")); err != nil {
		t.Fatal(err)
	}
	k.connect()
	if got, st := k.read(e.NodeId, fh); st != fuse.Status(syscall.ESTALE) {
		t.Errorf("read %q, %v of a file that was replaced", got, st)
	}
	k.release(e.NodeId, fh)
}

// TestNoHost fails when nobody is there, after a moment, and at once when that is over.
func TestNoHost(t *testing.T) {
	k := newKernel(t)
	k.disconnect()
	k.fs.link.patience = time.Millisecond
	for range 2 {
		if _, st := k.lookup("file"); st != fuse.EIO {
			t.Errorf("got %v", st)
		}
	}
	k.connect()
	if _, st := k.lookup("file"); !st.Ok() {
		t.Errorf("got %v", st)
	}
}

// TestInterrupted lets go whoever waits for a host that does not answer.
func TestInterrupted(t *testing.T) {
	k := newKernel(t)
	k.fs.link.patience = time.Millisecond
	k.disconnect()
	host, guest := net.Pipe()
	k.host = host
	k.wg.Go(func() { _ = k.fs.Serve(guest) })
	asked := make(chan struct{})
	k.wg.Go(func() {
		b := make([]byte, 9)
		if _, err := io.ReadFull(host, b); err != nil {
			t.Error(err)
		}
		if _, err := host.Write([]byte{0, 0, 0, 5, 2, 0, 0, 0, 3}); err != nil { // version 3
			t.Error(err)
		}
		_, _ = host.Read(b)
		close(asked)
		_, _ = io.Copy(io.Discard, host)
	})
	cancel := make(chan struct{})
	go func() { <-asked; close(cancel) }()
	var out fuse.EntryOut
	if st := k.raw.Lookup(cancel, &fuse.InHeader{NodeId: 1}, "file", &out); st != fuse.EINTR {
		t.Errorf("got %v", st)
	}
}

// TestSignals has programs that get signals all the time, as a shell does whose children
// end: what they ask of a host that answers is done, once, and they are told so.
func TestSignals(t *testing.T) {
	k := newKernel(t)
	signal := make(chan struct{})
	close(signal)
	var e fuse.EntryOut
	if st := k.raw.Lookup(signal, &fuse.InHeader{NodeId: 1}, "file", &e); !st.Ok() {
		t.Fatal(st)
	}
	var out fuse.OpenOut
	if st := k.raw.Open(signal, &fuse.OpenIn{InHeader: fuse.InHeader{NodeId: e.NodeId}, Flags: syscall.O_WRONLY}, &out); !st.Ok() {
		t.Fatal(st)
	}
	for i := range 50 {
		in := &fuse.WriteIn{InHeader: fuse.InHeader{NodeId: e.NodeId}, Fh: out.Fh, Offset: uint64(3 + i)}
		if n, st := k.raw.Write(signal, in, []byte(".")); n != 1 || !st.Ok() {
			t.Fatalf("wrote %d, %v", n, st)
		}
	}
	k.release(e.NodeId, out.Fh)
}

// TestAppend leaves alone what the host has appended meanwhile.
func TestAppend(t *testing.T) {
	k := newKernel(t)
	e, _ := k.lookup("file")
	var out fuse.OpenOut
	st := k.raw.Open(nil, &fuse.OpenIn{InHeader: fuse.InHeader{NodeId: e.NodeId}, Flags: syscall.O_WRONLY | syscall.O_APPEND}, &out)
	if !st.Ok() || out.OpenFlags&fuse.FOPEN_DIRECT_IO == 0 {
		t.Fatalf("%+v, %v", out, st)
	}
	add := func(text string, known uint64) fuse.Status {
		_, st := k.raw.Write(nil, &fuse.WriteIn{InHeader: fuse.InHeader{NodeId: e.NodeId}, Fh: out.Fh, Offset: known}, []byte(text))
		return st
	}
	if st := add(", two", 3); !st.Ok() {
		t.Fatal(st)
	}
	k.write("file", "one, two, host")
	if st := add(", four", 8); !st.Ok() {
		t.Fatal(st)
	}
	// A host that was away while nothing was under way is not noticed.
	k.disconnect()
	k.connect()
	if st := add(", five", 20); !st.Ok() {
		t.Error(st)
	}
	if got, err := os.ReadFile(filepath.Join(k.dir, "file")); string(got) != "one, two, host, four, five" || err != nil {
		t.Errorf("the host has %q, %v", got, err)
	}
	k.release(e.NodeId, out.Fh)
}

// TestDeletedWhileOpen is what programs do with their temporary files.
func TestDeletedWhileOpen(t *testing.T) {
	k := newKernel(t)
	e, _ := k.lookup("file")
	fh, st := k.open(e.NodeId, syscall.O_RDONLY)
	if !st.Ok() {
		t.Fatal(st)
	}
	if st := k.raw.Unlink(nil, &fuse.InHeader{NodeId: 1}, "file"); !st.Ok() {
		t.Fatal(st)
	}
	if got, st := k.read(e.NodeId, fh); got != "one" || !st.Ok() {
		t.Errorf("read %q, %v", got, st)
	}
	var out fuse.AttrOut
	if st := k.raw.GetAttr(nil, &fuse.GetAttrIn{InHeader: fuse.InHeader{NodeId: e.NodeId}}, &out); !st.Ok() || out.Size != 3 {
		t.Errorf("got %+v, %v", out, st)
	}
	k.release(e.NodeId, fh)
}

// TestErrors says in the guest what went wrong at the host.
func TestErrors(t *testing.T) {
	k := newKernel(t)
	if err := os.MkdirAll(filepath.Join(k.dir, "dir", "sub"), 0o755); err != nil {
		t.Fatal(err)
	}
	root := fuse.InHeader{NodeId: 1}
	var out fuse.EntryOut
	for name, c := range map[string]struct {
		got  fuse.Status
		want syscall.Errno
	}{
		"mkdir":  {k.raw.Mkdir(nil, &fuse.MkdirIn{InHeader: root, Mode: 0o755}, "dir", &out), syscall.EEXIST},
		"rmdir":  {k.raw.Rmdir(nil, &root, "dir"), syscall.ENOTEMPTY},
		"unlink": {k.raw.Unlink(nil, &root, "none"), syscall.ENOENT},
		"rename": {k.raw.Rename(nil, &fuse.RenameIn{InHeader: root, Newdir: 1}, "file", "dir"), syscall.EISDIR},
	} {
		if c.got != fuse.Status(c.want) {
			t.Errorf("%s: got %v, want %v", name, c.got, c.want)
		}
	}
	e, _ := k.lookup("file")
	set := &fuse.SetAttrIn{SetAttrInCommon: fuse.SetAttrInCommon{InHeader: fuse.InHeader{NodeId: e.NodeId}, Valid: fuse.FATTR_UID, Owner: fuse.Owner{Uid: 7}}}
	var attr fuse.AttrOut
	if st := k.raw.SetAttr(nil, set, &attr); st != fuse.EPERM {
		t.Errorf("giving a file away: %v", st)
	}
	set.Uid = 1000
	if st := k.raw.SetAttr(nil, set, &attr); !st.Ok() {
		t.Errorf("giving it to its owner: %v", st)
	}
}

// TestNumbers has files with the numbers that they have at the host; each name of a file
// with two of them is a node all the same.
func TestNumbers(t *testing.T) {
	k := newKernel(t)
	if err := os.Link(filepath.Join(k.dir, "file"), filepath.Join(k.dir, "second")); err != nil {
		t.Fatal(err)
	}
	st, err := os.Stat(filepath.Join(k.dir, "file"))
	if err != nil {
		t.Fatal(err)
	}
	host, ok := st.Sys().(*syscall.Stat_t)
	if !ok {
		t.Fatal("no numbers here")
	}
	if no := k.fs.root.Getattr(t.Context(), nil, &fuse.AttrOut{}); no != 0 {
		t.Fatal(no)
	}
	one, _ := k.lookup("file")
	two, _ := k.lookup("second")
	if one.Ino != host.Ino || two.Ino != host.Ino || one.NodeId == two.NodeId {
		t.Errorf("numbers %d and %d of nodes %d and %d; the host says %d", one.Ino, two.Ino, one.NodeId, two.NodeId, host.Ino)
	}

	// A number of another device of the host may be anybody's.
	other := attr{mode: syscall.S_IFREG}
	other.Dev, other.Ino = host.Dev+1, host.Ino
	if id := k.fs.identity(other); id.Ino != 0 {
		t.Errorf("a file of another device has the number %d", id.Ino)
	}
}
