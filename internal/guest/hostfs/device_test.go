// SPDX-License-Identifier: Apache-2.0

//go:build linux

package hostfs

import (
	"encoding/binary"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestDevice speaks to a device as the kernel does: messages over a socket.
func TestDevice(t *testing.T) {
	k := newKernel(t)
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	d := newDevice(fds[0])
	f := &FS{config: Config{UID: 1000, GID: 1001}, link: k.fs.link, leases: k.fs.leases}
	f.root = &node{fs: f}
	d.serveFolder(f)
	gone := false
	vanish := func() {
		if !gone {
			gone = true
			unix.Close(fds[1])
			<-d.ended
			unix.Close(fds[0])
		}
	}
	t.Cleanup(vanish)

	send := func(op uint32, unique, node uint64, body ...byte) {
		t.Helper()
		b := make([]byte, inHeader, 200)
		binary.NativeEndian.PutUint32(b, uint32(inHeader+len(body)))
		binary.NativeEndian.PutUint32(b[4:], op)
		binary.NativeEndian.PutUint64(b[8:], unique)
		binary.NativeEndian.PutUint64(b[16:], node)
		if _, err := unix.Write(fds[1], append(b, body...)); err != nil {
			t.Fatal(err)
		}
	}
	receive := func() (unique uint64, errno int32, body []byte) {
		t.Helper()
		p := []unix.PollFd{{Fd: int32(fds[1]), Events: unix.POLLIN}}
		for end := time.Now().Add(20 * time.Second); ; {
			if n, err := unix.Poll(p, 1000); n > 0 && err == nil {
				break
			}
			if time.Now().After(end) {
				t.Fatal("no answer")
			}
		}
		b := make([]byte, most)
		n, err := unix.Read(fds[1], b)
		if err != nil || n < outHeader || n != int(binary.NativeEndian.Uint32(b)) {
			t.Fatalf("a message of %d bytes: %v", n, err)
		}
		return binary.NativeEndian.Uint64(b[8:]), int32(binary.NativeEndian.Uint32(b[4:])), b[outHeader:n]
	}
	const (
		lookup  = 1
		initial = 26
		opendir = 27
	)
	first := make([]byte, 64)
	binary.NativeEndian.PutUint32(first, 7)
	binary.NativeEndian.PutUint32(first[4:], 36)
	send(initial, 1, 0, first...)
	if unique, errno, body := receive(); unique != 1 || errno != 0 || binary.NativeEndian.Uint32(body) != 7 {
		t.Fatalf("INIT: %d, %d, % x", unique, errno, body)
	}
	send(lookup, 2, 1, []byte("file\x00")...)
	unique, errno, body := receive()
	if unique != 2 || errno != 0 || len(body) < 128 {
		t.Fatalf("LOOKUP: %d, %d, % x", unique, errno, body)
	}
	node := binary.NativeEndian.Uint64(body)
	send(lookup, 3, 1, []byte("none\x00")...)
	if unique, errno, _ := receive(); unique != 3 || errno != -int32(syscall.ENOENT) {
		t.Errorf("LOOKUP of nothing: %d, %d", unique, errno)
	}

	// While one request waits for a host that is lost, another is answered.
	k.disconnect()
	k.eventually("the host is lost", func() bool { return k.fs.link.now() == nil })
	send(lookup, 4, 1, []byte("other\x00")...)
	send(opendir, 5, 1, make([]byte, 8)...)
	if unique, errno, _ := receive(); unique != 5 || errno != 0 {
		t.Errorf("OPENDIR: %d, %d", unique, errno)
	}
	k.connect()
	if unique, errno, _ := receive(); unique != 4 || errno != -int32(syscall.ENOENT) {
		t.Errorf("LOOKUP after a while: %d, %d", unique, errno)
	}

	// Notices are no answers, and say what kind they are.
	f.changed("/", "file")
	const entry, inode = 3, 2 // enum fuse_notify_code of linux/fuse.h
	for _, want := range []int32{entry, inode, inode} {
		unique, code, body := receive()
		if unique != 0 || code != want {
			t.Fatalf("notice %d, %d, want %d", unique, code, want)
		}
		if want == entry && string(body[16:]) != "file\x00" {
			t.Errorf("the name is %q", body[16:])
		}
	}
	vanish()
	if node == 0 || f.root.GetChild("file") == nil {
		t.Error("the file is not known")
	}
}
