// SPDX-License-Identifier: Apache-2.0

//go:build linux

package agent

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Kernel is the Machine that this process runs on. It needs to be root.
type Kernel struct{}

var _ Machine = Kernel{}

// SetHostname sets the host name of the running system.
func (Kernel) SetHostname(name string) error {
	if old, err := os.Hostname(); err == nil && old == name {
		return nil
	}
	return unix.Sethostname([]byte(name))
}

// clockSlack is how far the clock may be off: less than what a slow answer costs.
const clockSlack = 100 * time.Millisecond

// SetClock sets the clock if it is off.
func (Kernel) SetClock(t time.Time) error {
	if d := time.Since(t); d.Abs() < clockSlack {
		return nil
	}
	ts := unix.NsecToTimespec(t.UnixNano())
	if err := unix.ClockSettime(unix.CLOCK_REALTIME, &ts); err != nil {
		return fmt.Errorf("setting the clock: %w", err)
	}
	return nil
}

// AddEntropy stirs b into the kernel's random numbers, counts it as fully random,
// and makes the kernel use it at once: a machine restored from a template must not
// draw the numbers its siblings draw. The parameters are those of random(4).
func (Kernel) AddEntropy(b []byte) error {
	f, err := os.OpenFile("/dev/urandom", os.O_WRONLY, 0)
	if err != nil {
		return fmt.Errorf("adding entropy: %w", err)
	}
	defer f.Close()
	p := binary.NativeEndian.AppendUint32(nil, uint32(8*len(b)))
	p = binary.NativeEndian.AppendUint32(p, uint32(len(b)))
	p = append(p, b...)
	if err := ioctl(f, unix.RNDADDENTROPY, unsafe.Pointer(&p[0])); err != nil {
		return fmt.Errorf("adding entropy: %w", err)
	}
	const reseed = 0x5207 // RNDRESEEDCRNG, since Linux 4.14
	if err := ioctl(f, reseed, nil); err != nil {
		return fmt.Errorf("reseeding random numbers: %w", err)
	}
	return nil
}

func ioctl(f *os.File, req uint, arg unsafe.Pointer) error {
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), uintptr(req), uintptr(arg)); errno != 0 {
		return errno
	}
	return nil
}

// GrowRoot makes an ext4 root file system as large as its block device.
func (Kernel) GrowRoot() error {
	var fs unix.Statfs_t
	if err := unix.Statfs("/", &fs); err != nil {
		return err
	}
	if fs.Type != unix.EXT4_SUPER_MAGIC {
		return nil
	}
	var st unix.Stat_t
	if err := unix.Stat("/", &st); err != nil {
		return err
	}
	dev := filepath.Join("/sys/dev/block", fmt.Sprintf("%d:%d", unix.Major(st.Dev), unix.Minor(st.Dev)))
	b, err := os.ReadFile(filepath.Join(dev, "size"))
	if err != nil {
		return err
	}
	sectors, err := strconv.ParseUint(strings.TrimSpace(string(b)), 10, 64)
	if err != nil {
		return err
	}
	target, err := filepath.EvalSymlinks(dev)
	if err != nil {
		return err
	}
	sb := make([]byte, 1024)
	disk, err := os.Open(filepath.Join("/dev", filepath.Base(target)))
	if err != nil {
		return err
	}
	_, err = disk.ReadAt(sb, 1024)
	disk.Close()
	if err != nil {
		return err
	}
	have, size, err := ext4Blocks(sb)
	if err != nil {
		return err
	}
	// Less than a block group's worth of new space is not worth having.
	want := sectors * 512 / size
	if want < have+8*size {
		return nil
	}
	root, err := os.Open("/")
	if err != nil {
		return err
	}
	defer root.Close()
	const resize = 0x40086610 // EXT4_IOC_RESIZE_FS
	return ioctl(root, resize, unsafe.Pointer(&want))
}

// ext4Blocks reads the number of blocks and the size of one, in bytes, from a
// superblock.
func ext4Blocks(sb []byte) (blocks, size uint64, err error) {
	le := binary.LittleEndian
	if le.Uint16(sb[0x38:]) != 0xef53 {
		return 0, 0, errors.New("the root device has no ext4 superblock")
	}
	const has64bit = 0x80
	blocks = uint64(le.Uint32(sb[0x4:]))
	if le.Uint32(sb[0x60:])&has64bit != 0 {
		blocks |= uint64(le.Uint32(sb[0x150:])) << 32
	}
	return blocks, 1024 << (le.Uint32(sb[0x18:]) & 7), nil
}

// Sync writes everything to the disks.
func (Kernel) Sync() error {
	unix.Sync()
	return nil
}

// Shutdown tells the init system to end. It returns before that has begun.
func (Kernel) Shutdown(reboot bool) error {
	// systemd(1) listens to signals, which work when little else does.
	if _, err := os.Stat("/run/systemd/system"); err == nil {
		const rtmin = 34 // the C library's SIGRTMIN
		sig := unix.Signal(rtmin + 4)
		if reboot {
			sig = rtmin + 5
		}
		return unix.Kill(1, sig)
	}
	word := "poweroff"
	if reboot {
		word = "reboot"
	}
	path, err := exec.LookPath(word)
	if err != nil {
		return err
	}
	cmd := exec.Command(path)
	if err := cmd.Start(); err != nil {
		return err
	}
	go func() { _ = cmd.Wait() }()
	return nil
}
