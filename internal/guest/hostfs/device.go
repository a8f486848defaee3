// SPDX-License-Identifier: Apache-2.0

//go:build linux

package hostfs

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// device is the kernel's end of a mounted folder, /dev/fuse: it reads requests, and
// writes answers and notices. The messages are those of linux/fuse.h.
//
// One goroutine at a time reads. It carries out what it has read itself, for most
// requests are answered from memory: to hand one to another thread costs more than to
// answer it. Whatever may have to wait calls lend first, so that another goroutine
// reads on.
type device struct {
	fd       int // never closed: the process ends with the folder
	requests *fuse.ProtocolServer

	reading atomic.Bool  // a goroutine reads, or is about to
	busy    atomic.Int64 // requests that are being carried out
	buffers sync.Pool    // of *[2][]byte: a request, an answer

	ended chan struct{} // closed when the folder was taken away
	end   sync.Once
}

var _ fs.ServerCallbacks = (*device)(nil)

// Sizes of messages, in bytes.
const (
	inHeader  = 40
	outHeader = 16
	most      = maxPacket + 8192 // the longest one, with its header and arguments
)

// hot is how long the reader waits for the next request without giving its processor
// away: programs make the next one at once.
const hot = 10 * time.Millisecond

// openDevice mounts a file system of which nothing is served yet.
func openDevice(path, source string, flags uintptr) (*device, error) {
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: "/dev/fuse", Err: err}
	}
	options := fmt.Sprintf("fd=%d,rootmode=%o,user_id=%d,group_id=%d,max_read=%d,allow_other,default_permissions",
		fd, syscall.S_IFDIR, os.Geteuid(), os.Getegid(), maxPacket)
	if err := unix.Mount(source, path, Type, flags, options); err != nil {
		return nil, errors.Join(err, unix.Close(fd))
	}
	return newDevice(fd), nil
}

func newDevice(fd int) *device {
	d := &device{fd: fd, ended: make(chan struct{})}
	d.buffers.New = func() any { return &[2][]byte{make([]byte, most), make([]byte, most)} }
	return d
}

// serveFolder begins to answer requests for a folder.
func (d *device) serveFolder(f *FS) {
	timeout := ttl
	o := fs.Options{
		EntryTimeout: &timeout, AttrTimeout: &timeout, NullPermissions: true, UID: f.config.UID, GID: f.config.GID, ServerCallbacks: d,
		RootStableAttr: &fs.StableAttr{Ino: fuse.FUSE_ROOT_ID},
		MountOptions:   fuse.MountOptions{DisableXAttrs: true, MaxWrite: maxPacket},
	}
	d.requests = fuse.NewProtocolServer(fs.NewNodeFS(f.root, &o), &o.MountOptions)
	f.device, f.link.waits, f.leases.waits = d, d.lend, d.lend
	d.lend()
}

// serve answers requests until the folder is taken away, or another goroutine does.
func (d *device) serve() {
	b, ok := d.buffers.Get().(*[2][]byte)
	if !ok {
		return
	}
	defer d.buffers.Put(b)
	for {
		n, err := d.next(b[0])
		if err != nil {
			d.end.Do(func() { close(d.ended) })
			return
		}
		d.busy.Add(1)
		d.reading.Store(false)
		d.answer(b[0][:n], b[1])
		d.busy.Add(-1)
		if !d.reading.CompareAndSwap(false, true) {
			return
		}
	}
}

// lend is called before something that may have to wait.
func (d *device) lend() {
	if d.reading.CompareAndSwap(false, true) {
		go d.serve()
	}
}

// next reads a request.
func (d *device) next(b []byte) (int, error) {
	for {
		d.wait()
		n, _, no := syscall.RawSyscall(syscall.SYS_READ, uintptr(d.fd), uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)))
		switch no {
		case 0:
			if n < inHeader {
				return 0, io.ErrUnexpectedEOF
			}
			return int(n), nil
		case syscall.EAGAIN, syscall.EINTR, syscall.ENOENT: // ENOENT: the program that asked was killed
		case syscall.ENOMEM:
			time.Sleep(hot)
		default:
			return 0, no
		}
	}
}

// wait returns when there may be a request.
//
// A thread that waits in a system call has its processor (a "P") taken away by the Go
// runtime, and the thread that does so is woken for every call. On one slow processor
// that costs several times what answering does. So the runtime is not told at first.
// Nothing waits for this thread meanwhile: Mount sees to it that there is another P, and
// the signal by which a garbage collection stops threads interrupts the call.
func (d *device) wait() {
	p := unix.PollFd{Fd: int32(d.fd), Events: unix.POLLIN}
	if d.busy.Load() == 0 {
		t := unix.NsecToTimespec(int64(hot))
		if n, _, no := syscall.RawSyscall6(unix.SYS_PPOLL, uintptr(unsafe.Pointer(&p)), 1, uintptr(unsafe.Pointer(&t)), 0, 0, 0); no == 0 && n > 0 {
			return
		}
	}
	_, _ = unix.Ppoll([]unix.PollFd{p}, nil, nil) // next sees what is wrong
}

// quick reports whether a request is answered at once, or by something that calls lend.
func quick(op uint32) bool {
	switch op {
	case 1, 2, 3, 14, 15, 18, 26, 27, 28, 29, 36, 44:
		// LOOKUP, FORGET, GETATTR, OPEN, READ, RELEASE, INIT, OPENDIR, READDIR, RELEASEDIR,
		// INTERRUPT, READDIRPLUS. Not BATCH_FORGET, after which go-fuse may collect garbage.
		return true
	}
	return false
}

// closes reports whether a request gives back an open file or folder. go-fuse has it wait for
// the GETATTR requests that use the file, and these may wait for the host.
func closes(op uint32) bool { return op == 18 || op == 29 } // RELEASE, RELEASEDIR

// answer carries out a request, and answers it if there is to be an answer.
func (d *device) answer(in, out []byte) {
	if op := binary.NativeEndian.Uint32(in[4:]); !quick(op) || closes(op) && d.busy.Load() > 1 {
		d.lend()
	}
	n, st := d.requests.HandleRequest([][]byte{in}, [][]byte{out})
	if !st.Ok() {
		n = outHeader
		binary.NativeEndian.PutUint32(out, outHeader)
		binary.NativeEndian.PutUint32(out[4:], uint32(-int32(st)))
		copy(out[8:outHeader], in[8:16])
	}
	if n > 0 {
		// That it fails says that nobody waits for it any more.
		_, _, _ = syscall.RawSyscall(syscall.SYS_WRITE, uintptr(d.fd), uintptr(unsafe.Pointer(&out[0])), uintptr(n))
	}
}

// notify tells the kernel something unasked.
func (d *device) notify(code int32, args ...any) fuse.Status {
	b := make([]byte, outHeader, 128)
	var err error
	for _, a := range args {
		if b, err = binary.Append(b, binary.NativeEndian, a); err != nil {
			return fuse.EINVAL
		}
	}
	binary.NativeEndian.PutUint32(b, uint32(len(b)))
	binary.NativeEndian.PutUint32(b[4:], uint32(-code)) // go-fuse has the kernel's numbers negated
	d.lend()                                            // it may have to wait until somebody has read a page
	_, err = unix.Write(d.fd, b)
	return fuse.ToStatus(err)
}

// EntryNotify says that a name is not what it was.
func (d *device) EntryNotify(parent uint64, name string) fuse.Status {
	return d.notify(fuse.NOTIFY_INVAL_ENTRY, parent, uint32(len(name)), uint32(0), []byte(name+"\x00"))
}

// InodeNotify says that a file's attributes are not what they were, and, unless off is
// negative, nor its content from there on; all of it if length is 0.
func (d *device) InodeNotify(node uint64, off, length int64) fuse.Status {
	return d.notify(fuse.NOTIFY_INVAL_INODE, node, off, length)
}

// DeleteNotify is not needed here.
func (d *device) DeleteNotify(uint64, uint64, string) fuse.Status { return fuse.ENOSYS }

// InodeRetrieveCache is not needed here.
func (d *device) InodeRetrieveCache(uint64, int64, []byte) (int, fuse.Status) { return 0, fuse.ENOSYS }

// InodeNotifyStoreCache is not needed here.
func (d *device) InodeNotifyStoreCache(uint64, int64, []byte) fuse.Status { return fuse.ENOSYS }
