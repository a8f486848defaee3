// SPDX-License-Identifier: Apache-2.0

package local

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/labfile/lab/providers"
	"github.com/labfile/lab/providers/qmp"
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
		FileEvents + ".in":  `{"execute":"qmp_capabilities"}` + "\n",
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
