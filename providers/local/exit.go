// SPDX-License-Identifier: Apache-2.0

package local

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/labfile/lab/providers"
	"github.com/labfile/lab/providers/qmp"
	"golang.org/x/sys/unix"
)

// Settle records how the last run ended, so that it is still known when the run's
// own records are gone. The generation does not run.
func Settle(dir string, said func() string) error {
	var r Run
	if ok, err := ReadJSON(filepath.Join(dir, FileRun), &r); err != nil || !ok {
		return err
	}
	e, _ := LastExit(dir, nil, said)
	return Record(dir, r, e)
}

// Record writes exit.json, unless what it says is already there.
func Record(dir string, r Run, e providers.Exit) error {
	rec := ExitRecord{Run: r.ID, Reason: e.Reason, Detail: e.Detail, At: e.At}
	var old ExitRecord
	if ok, err := ReadJSON(filepath.Join(dir, FileExit), &old); err == nil && ok && old == rec {
		return nil
	}
	return WriteJSON(filepath.Join(dir, FileExit), rec)
}

// LastExit finds out how the last run ended, from the most to the least
// trustworthy source: what QEMU said, what lab or a witness recorded, the
// process's status if the caller has it, the host's boot and QEMU's last words.
// known is false if only the status could tell more. The run has ended.
func LastExit(dir string, ws *unix.WaitStatus, said func() string) (e providers.Exit, known bool) {
	var rec ExitRecord
	recorded, _ := ReadJSON(filepath.Join(dir, FileExit), &rec)
	var r Run
	ran, _ := ReadJSON(filepath.Join(dir, FileRun), &r)
	spoke, events := ReadEvents(dir)
	if !ran || !spoke {
		// The last start came to nothing, or there was none: what was recorded
		// is of the run before.
		return rec.exit(), true
	}
	recorded = recorded && rec.Run == r.ID
	if e, ok := Announced(events); ok {
		if recorded && rec.Reason == providers.ExitHost && (e.Reason == providers.ExitHost || e.Reason == providers.ExitSignaled) {
			e.Reason, e.Detail = providers.ExitHost, rec.Detail // the signal was lab's
		}
		return e, true
	}
	switch {
	case recorded:
		return rec.exit(), true
	case ws != nil:
		return ExitOfStatus(*ws, said()), true
	case r.Boot != BootID():
		return providers.Exit{Detail: "the host was restarted"}, true
	}
	if words := said(); words != "" {
		return providers.Exit{Reason: providers.ExitCrashed, Detail: words}, false
	}
	return providers.Exit{Reason: providers.ExitSignaled, Detail: "killed"}, false
}

// Announced reads the exit from QEMU's events; ok is false if QEMU died before
// it could say anything. The first word counts: under libvirt QEMU waits, after the
// guest's end, for the signal that ends itself, which it announces as well.
func Announced(events []qmp.Event) (e providers.Exit, ok bool) {
	asked := false
	for _, ev := range events {
		switch ev.Name {
		case "RESUME": // it runs, whatever was said before
			e, ok, asked = providers.Exit{}, false, false
		case "POWERDOWN": // lab pressed the power button
			asked = true
		case "GUEST_PANICKED":
			if !ok {
				e, ok = providers.Exit{Reason: providers.ExitPanic, Detail: "guest-panic", At: ev.At.UTC()}, true
			}
		case "SHUTDOWN":
			if !ok {
				e, ok = shutdown(ev, asked), true
			}
		}
	}
	return e, ok
}

// shutdown reads a SHUTDOWN event; asked says that the power button was pressed.
func shutdown(ev qmp.Event, asked bool) providers.Exit {
	var d struct {
		Reason string `json:"reason"`
	}
	json.Unmarshal(ev.Data, &d) // an unknown reason is one of the host's
	e := providers.Exit{Detail: d.Reason, At: ev.At.UTC()}
	switch d.Reason {
	case "guest-panic":
		e.Reason = providers.ExitPanic
	case "guest-shutdown", "guest-reset":
		e.Reason = providers.ExitGuest
		if asked {
			e.Reason = providers.ExitHost
		}
	case "host-signal":
		e.Reason = providers.ExitSignaled
	case "host-error":
		e.Reason = providers.ExitCrashed
	default:
		e.Reason = providers.ExitHost
	}
	return e
}

// ExitOfStatus reads the exit of a QEMU that announced none from its status.
func ExitOfStatus(ws unix.WaitStatus, said string) providers.Exit {
	if !ws.Signaled() {
		if said == "" {
			said = fmt.Sprintf("exit status %d", ws.ExitStatus())
		}
		return providers.Exit{Reason: providers.ExitCrashed, Detail: said}
	}
	e := providers.Exit{Reason: providers.ExitSignaled, Detail: unix.SignalName(ws.Signal())}
	switch ws.Signal() {
	case unix.SIGABRT, unix.SIGBUS, unix.SIGFPE, unix.SIGILL, unix.SIGSEGV, unix.SIGSYS, unix.SIGTRAP:
		e.Reason = providers.ExitCrashed
		if said != "" {
			e.Detail += ": " + said
		}
	}
	return e
}

// MaxEventTail bounds how much of the event record is read. A guest can make it
// grow, by resetting itself in a loop; what matters stands at its end.
const MaxEventTail = 256 << 10

// ReadEvents returns the events of the present or last run; spoke is false if
// QEMU did not get as far as its greeting.
func ReadEvents(dir string) (spoke bool, events []qmp.Event) {
	b, err := ReadTail(filepath.Join(dir, FileEvents+".out"), MaxEventTail)
	if err != nil || len(b) == 0 {
		return false, nil
	}
	events, err = qmp.ReadEvents(bytes.NewReader(b))
	if err != nil {
		return false, nil
	}
	return true, events
}

// ReadTail returns the last n bytes of a file, or all of a shorter one.
func ReadTail(path string, n int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return nil, err
	}
	return io.ReadAll(io.NewSectionReader(f, max(0, fi.Size()-n), n))
}

// Intend records that the present run is about to be ended by lab, for a process
// that is killed cannot say so itself.
func Intend(dir, why string) error {
	var r Run
	if ok, err := ReadJSON(filepath.Join(dir, FileRun), &r); err != nil || !ok {
		return err
	}
	rec := ExitRecord{Run: r.ID, Reason: providers.ExitHost, Detail: why, At: time.Now().UTC()}
	return WriteJSON(filepath.Join(dir, FileExit), rec)
}
