// SPDX-License-Identifier: Apache-2.0

//go:build linux

package sshd

import (
	"fmt"
	"os"

	"golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"
)

// openPTY returns both ends of a new terminal. The master honours deadlines, which a
// master opened the ordinary way does not.
func openPTY() (master, terminal *os.File, err error) {
	fd, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("opening /dev/ptmx: %w", err)
	}
	if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
		unix.Close(fd)
		return nil, nil, fmt.Errorf("unlocking a terminal: %w", err)
	}
	peer, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.TIOCGPTPEER, unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC)
	if errno != 0 {
		unix.Close(fd)
		return nil, nil, fmt.Errorf("opening a terminal: %w", errno)
	}
	return os.NewFile(uintptr(fd), "pty"), os.NewFile(peer, "tty"), nil
}

// ptyRequest is RFC 4254, section 6.2.
type ptyRequest struct {
	Term          string
	Columns, Rows uint32
	Width, Height uint32
	Modes         string
}

// windowChange is RFC 4254, section 6.7.
type windowChange struct {
	Columns, Rows uint32
	Width, Height uint32
}

func resize(f *os.File, w windowChange) error {
	c, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var ierr error
	err = c.Control(func(fd uintptr) {
		ierr = unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, &unix.Winsize{
			Row: uint16(w.Rows), Col: uint16(w.Columns), Xpixel: uint16(w.Width), Ypixel: uint16(w.Height),
		})
	})
	if err != nil {
		return err
	}
	return ierr
}

// The terminal modes of RFC 4254, section 8, that a client may want changed.
var (
	inputModes = map[byte]uint32{
		30: unix.IGNPAR, 31: unix.PARMRK, 32: unix.INPCK, 33: unix.ISTRIP, 34: unix.INLCR, 35: unix.IGNCR,
		36: unix.ICRNL, 37: unix.IUCLC, 38: unix.IXON, 39: unix.IXANY, 40: unix.IXOFF, 41: unix.IMAXBEL, 42: unix.IUTF8,
	}
	localModes = map[byte]uint32{
		50: unix.ISIG, 51: unix.ICANON, 52: unix.XCASE, 53: unix.ECHO, 54: unix.ECHOE, 55: unix.ECHOK, 56: unix.ECHONL,
		57: unix.NOFLSH, 58: unix.TOSTOP, 59: unix.IEXTEN, 60: unix.ECHOCTL, 61: unix.ECHOKE, 62: unix.PENDIN,
	}
	outputModes = map[byte]uint32{
		70: unix.OPOST, 71: unix.OLCUC, 72: unix.ONLCR, 73: unix.OCRNL, 74: unix.ONOCR, 75: unix.ONLRET,
	}
	controlChars = map[byte]int{
		1: unix.VINTR, 2: unix.VQUIT, 3: unix.VERASE, 4: unix.VKILL, 5: unix.VEOF, 6: unix.VEOL, 7: unix.VEOL2,
		8: unix.VSTART, 9: unix.VSTOP, 10: unix.VSUSP, 12: unix.VREPRINT, 13: unix.VWERASE, 14: unix.VLNEXT,
	}
)

// setModes applies the modes a client sent with its pty request, as far as they
// mean something on Linux.
func setModes(tty *os.File, modes string) error {
	fd := int(tty.Fd())
	t, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	if err != nil {
		return err
	}
	for b := []byte(modes); len(b) >= 5 && b[0] != 0 && b[0] < 160; b = b[5:] {
		var m struct {
			Op    byte
			Value uint32
		}
		if err := ssh.Unmarshal(b[:5], &m); err != nil {
			return err
		}
		set := func(flags *uint32, bit uint32) {
			if *flags &^= bit; m.Value != 0 {
				*flags |= bit
			}
		}
		if bit, ok := inputModes[m.Op]; ok {
			set(&t.Iflag, bit)
		} else if bit, ok := localModes[m.Op]; ok {
			set(&t.Lflag, bit)
		} else if bit, ok := outputModes[m.Op]; ok {
			set(&t.Oflag, bit)
		} else if i, ok := controlChars[m.Op]; ok {
			if m.Value >= 255 {
				m.Value = 0 // 255 means none; Linux writes that as 0
			}
			t.Cc[i] = byte(m.Value)
		}
	}
	return unix.IoctlSetTermios(fd, unix.TCSETS, t)
}
