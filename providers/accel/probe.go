// SPDX-License-Identifier: Apache-2.0

package accel

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"github.com/labfile/lab/internal/program"
)

// A Payload is guest code that shows whether an accelerator is of use.
type Payload struct {
	Append string   // for a kernel
	Words  []string // of which one is seen on the serial console once it ran
	// Limit is how long that may take. With working KVM a kernel needs a second and
	// firmware a tenth of one (so it does under emulation); what takes much longer is
	// of no use even if it gets through.
	Limit time.Duration
	Says  string // what was seen then
}

// Kernel is a payload for any Linux kernel. One that is given nothing to mount has set up
// memory, processors, timers and drivers by the time it complains.
var Kernel = Payload{
	Append: "console=ttyS0 panic=-1 root=/dev/lab-probe",
	Words:  []string{"Unable to mount root fs", "No working init found"},
	Limit:  10 * time.Second, Says: "a guest kernel ran",
}

// Firmware is the payload that boots Sector.
var Firmware = Payload{Words: []string{sectorWord}, Limit: 2 * time.Second, Says: "guest code ran"}

const sectorWord = "lab probe"

// probe runs guest code and reports whether it did its work in time; reason says
// how that was seen, or what went wrong. kernel may be empty: then a boot sector
// is run behind the firmware. It returns an error only if ctx ended, the host
// could not even try, or the guest took too long (a *slowError), and never leaves
// a process behind.
func probe(ctx context.Context, binary string, accel []string, kernel, tmp string) (usable bool, reason string, err error) {
	if err := ctx.Err(); err != nil {
		return false, "", err
	}
	args := append([]string{
		"-nodefaults", "-no-user-config",
		"-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
		"-machine", "pc", "-smp", "1", "-m", "256", "-display", "none", "-no-reboot", "-serial", "stdio",
	}, accel...)
	load := Kernel
	if kernel != "" {
		args = append(args, "-kernel", kernel, "-append", load.Append)
	} else {
		load = Firmware
		disk, err := os.CreateTemp(tmp, "probe-*.img")
		if err != nil {
			return false, "", err
		}
		defer os.Remove(disk.Name())
		_, err = disk.Write(Sector())
		if e := disk.Close(); err == nil {
			err = e
		}
		if err != nil {
			return false, "", err
		}
		node, err := json.Marshal(map[string]any{
			"driver": "raw", "node-name": "probe", "read-only": true,
			"file": map[string]any{"driver": "file", "filename": disk.Name(), "read-only": true},
		})
		if err != nil {
			return false, "", err
		}
		args = append(args, "-blockdev", string(node), "-device", "virtio-blk-pci,drive=probe,bootindex=1")
	}

	limited, cancel := context.WithTimeout(ctx, load.Limit)
	defer cancel()
	cmd := exec.CommandContext(limited, binary, args...)
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	cmd.WaitDelay = time.Second
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	seen := &watcher{words: load.Words, found: cancel}
	cmd.Stdout = seen
	err = program.Run(cmd)
	switch {
	case seen.ok:
		return true, load.Says, nil
	case ctx.Err() != nil:
		return false, "", ctx.Err()
	case errors.Is(limited.Err(), context.DeadlineExceeded):
		return false, "", &slowError{load.Limit}
	case len(bytes.TrimSpace(stderr.Bytes())) > 0:
		return false, LastLine(stderr.String()), nil
	case err != nil:
		return false, err.Error(), nil
	}
	return false, "the guest ended without having run", nil
}

// slowError says that guest code did not show itself in time. The accelerator may
// be of no use, or the host busy.
type slowError struct{ limit time.Duration }

func (e *slowError) Error() string {
	return fmt.Sprintf("guest code did not get through in %s", e.limit)
}

// LastLine returns the last line of what a program printed.
func LastLine(s string) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	return strings.TrimSpace(lines[len(lines)-1])
}

// watcher looks for words in what is written to it.
type watcher struct {
	words []string
	found func()
	tail  []byte
	ok    bool
}

var _ io.Writer = (*watcher)(nil)

func (w *watcher) Write(b []byte) (int, error) {
	w.tail = append(w.tail, b...)
	for _, word := range w.words {
		if !w.ok && bytes.Contains(w.tail, []byte(word)) {
			w.ok = true
			w.found()
		}
	}
	// A word may be cut in two by the next write.
	const keep = 256
	if len(w.tail) > keep {
		w.tail = append(w.tail[:0], w.tail[len(w.tail)-keep:]...)
	}
	return len(b), nil
}

// Sector is a disk with a boot sector that prints its word on the first serial port and
// halts.
func Sector() []byte {
	code := []byte{
		0xfa,       // cli
		0x31, 0xc0, // xor ax, ax
		0x8e, 0xd8, // mov ds, ax
		0xbe, 0x1f, 0x7c, // mov si, 0x7c1f: the text below
		0xac,       // next: lodsb
		0x84, 0xc0, // test al, al
		0x74, 0x11, // jz done
		0x88, 0xc3, // mov bl, al
		0xba, 0xfd, 0x03, // mov dx, 0x3fd: line status
		0xec,       // wait: in al, dx
		0xa8, 0x20, // test al, 0x20: room for a byte
		0x74, 0xfb, // jz wait
		0xb2, 0xf8, // mov dl, 0xf8: data
		0x88, 0xd8, // mov al, bl
		0xee,       // out dx, al
		0xeb, 0xea, // jmp next
		0xf4, // done: hlt
	}
	sector := make([]byte, 1<<20) // the firmware ignores disks of less than a cylinder
	n := copy(sector, code)
	copy(sector[n:], sectorWord+"\n")
	sector[510], sector[511] = 0x55, 0xaa
	return sector
}
