// SPDX-License-Identifier: Apache-2.0

package local

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/labfile/lab/providers"
	"github.com/labfile/lab/providers/qmp"
	"golang.org/x/sys/unix"
)

// Run is what run.json holds: written before QEMU starts, removed if it fails to.
type Run struct {
	ID      string    `json:"id"` // random; tells one run from the next
	Started time.Time `json:"started"`
	Accel   string    `json:"accel"`
	Boot    string    `json:"boot"` // the host's boot id
}

// ExitRecord is what exit.json holds.
type ExitRecord struct {
	Run    string               `json:"run"`
	Reason providers.ExitReason `json:"reason"`
	Detail string               `json:"detail,omitempty"`
	At     time.Time            `json:"at,omitzero"`
}

func (e ExitRecord) exit() providers.Exit {
	return providers.Exit{Reason: e.Reason, Detail: e.Detail, At: e.At}
}

// Paused reports whether the guest's processors are halted, by QEMU's own word,
// and why if it was QEMU who halted them: a write that found the disk full is
// tried again when the machine goes on, so that the guest never sees it.
func Paused(dir string) (is bool, why string) {
	_, events := ReadEvents(dir)
	for i, e := range slices.Backward(events) {
		switch e.Name {
		case "RESUME":
			return false, ""
		case "STOP":
			if i > 0 && events[i-1].Name == "BLOCK_IO_ERROR" {
				return true, ioError(events[i-1])
			}
			return true, ""
		}
	}
	return false, ""
}

// ioError says what a BLOCK_IO_ERROR event is about (QEMU QMP reference, "Block
// devices").
func ioError(e qmp.Event) string {
	var d struct {
		Operation string `json:"operation"`
		Reason    string `json:"reason"`
		NoSpace   bool   `json:"nospace"`
	}
	if json.Unmarshal(e.Data, &d) != nil {
		return ""
	}
	if d.NoSpace {
		return "no space left on device for what it writes to its disk"
	}
	return fmt.Sprintf("the %s of its disk failed: %s", d.Operation, d.Reason)
}

// eventsSetup is what makes QEMU's second monitor speak.
const eventsSetup = `{"execute":"qmp_capabilities"}` + "\n"

// OpenEvents makes the input of QEMU's second monitor a FIFO that holds what makes the
// monitor speak, instead of a file that ends: so the power button can be pressed by way of
// the machine's directory when its sockets are gone (Press). The result is closed once
// QEMU has opened the FIFO. Where the file system has no FIFOs, the file stays and the
// result is nil.
func OpenEvents(dir string) (*os.File, error) {
	path := filepath.Join(dir, FileEvents+".in")
	if err := unix.Mkfifo(path+".new", 0o600); err != nil && !errors.Is(err, unix.EEXIST) {
		return nil, nil
	}
	if err := os.Rename(path+".new", path); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	if _, err := f.WriteString(eventsSetup); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// Press presses the power button of a machine that runs by way of its directory, and
// returns once QEMU says that it did, or ctx ends.
func Press(ctx context.Context, dir string) error {
	path := filepath.Join(dir, FileEvents+".in")
	fi, err := os.Stat(path)
	if err != nil {
		return err
	}
	if fi.Mode()&os.ModeNamedPipe == 0 {
		return fmt.Errorf("%s is no FIFO", path)
	}
	before := pressed(dir)
	f, err := os.OpenFile(path, os.O_WRONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.WriteString(`{"execute":"system_powerdown"}` + "\n"); err != nil {
		return err
	}
	for pressed(dir) == before {
		if err := Pause(ctx, LockRetry); err != nil {
			return fmt.Errorf("QEMU does not answer by %s: %w", path, err)
		}
	}
	return nil
}

// pressed returns how often QEMU says that its power button was pressed in this run.
func pressed(dir string) int {
	n := 0
	_, events := ReadEvents(dir)
	for _, e := range events {
		if e.Name == "POWERDOWN" {
			n++
		}
	}
	return n
}

// FreshRecords empties what a run leaves behind: logs and events are of one run.
func FreshRecords(dir string, logs ...string) error {
	console := filepath.Join(dir, FileConsole)
	if fi, err := os.Stat(console); err == nil && fi.Size() > 0 {
		if err := os.Rename(console, filepath.Join(dir, FileConsoleOld)); err != nil {
			return err
		}
	}
	// New files instead of truncated ones: a reader of the old keeps it whole.
	fresh := map[string]string{
		FileConsole:         "",
		FileEvents + ".in":  eventsSetup,
		FileEvents + ".out": "",
	}
	for _, name := range logs {
		fresh[name] = ""
	}
	for name, content := range fresh {
		path := filepath.Join(dir, name)
		if err := os.Remove(path); err != nil && !Gone(err) {
			return err
		}
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			return err
		}
	}
	return nil
}

// SocketsGone says that none of a running machine's sockets is there any more; empty if
// one is.
func SocketsGone(paths []string) string {
	for _, path := range paths {
		if _, err := os.Lstat(path); !Gone(err) {
			return ""
		}
	}
	return fmt.Sprintf("its sockets in %s are gone", filepath.Dir(paths[0]))
}
