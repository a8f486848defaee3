// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/providers"
	"github.com/labfile/lab/providers/qemu/qmp"
)

// Wait returns once the generation's QEMU is gone.
func (p *Provider) Wait(ctx context.Context, g lab.Generation) (providers.Exit, error) {
	e, err := p.wait(ctx, g)
	if err != nil {
		return e, fmt.Errorf("waiting for machine %q: %w", g, err)
	}
	return e, nil
}

func (p *Provider) wait(ctx context.Context, g lab.Generation) (providers.Exit, error) {
	if err := checkGeneration(g); err != nil {
		return providers.Exit{}, err
	}
	dir := p.cfg.Dirs.Generation(g)
	if _, err := os.Stat(dir); err != nil {
		if gone(err) {
			err = providers.ErrNotFound
		}
		return providers.Exit{}, err
	}
	proc, err := p.find(ctx, dir)
	if err != nil {
		return providers.Exit{}, err
	}
	var (
		r      run
		status = func() (unix.WaitStatus, bool) { return 0, false }
	)
	if _, err := readJSON(filepath.Join(dir, fileRun), &r); err != nil {
		return providers.Exit{}, err
	}
	if proc != nil {
		defer proc.close()
		status = proc.status
		if err := proc.wait(ctx); err != nil {
			return providers.Exit{}, err
		}
	}
	// An exit that QEMU announced is known at once. Else the status tells more,
	// by way of the kernel or of the process that started QEMU, in a moment.
	e, known := lastExit(dir, nil)
	for i := 0; i < statusTries && !known; i++ {
		if ws, ok := status(); ok {
			e, _ = lastExit(dir, &ws)
			break
		}
		if err := pause(ctx, lockRetry); err != nil {
			break // the answer is good enough
		}
		e, known = lastExit(dir, nil)
	}
	if _, err := os.Stat(dir); err != nil {
		return providers.Exit{Reason: providers.ExitHost, Detail: "destroyed", At: time.Now().UTC()}, nil
	}
	if proc == nil && known {
		return e, nil // told before, or nothing to tell
	}
	if e.At.IsZero() {
		e.At = time.Now().UTC()
	}
	p.record(dir, r, e)
	return e, nil
}

// statusTries bounds, in steps of lockRetry, the wait for a status that may never
// come: on older kernels only the parent gets it, and that may be init.
const statusTries = 20

// settle records how the last run ended, so that it is still known when the run's
// own records are gone. The generation does not run.
func (p *Provider) settle(dir string) {
	var r run
	if ok, err := readJSON(filepath.Join(dir, fileRun), &r); err != nil || !ok {
		return
	}
	e, _ := lastExit(dir, nil)
	p.record(dir, r, e)
}

// collected records the exit of a run whose QEMU was a child of this process.
func (p *Provider) collected(dir, id string, ws unix.WaitStatus) {
	var r run
	if ok, err := readJSON(filepath.Join(dir, fileRun), &r); err != nil || !ok || r.ID != id {
		return // it never came up, was destroyed, or runs again
	}
	e, _ := lastExit(dir, &ws)
	if e.At.IsZero() {
		e.At = time.Now().UTC()
	}
	p.record(dir, r, e)
}

// record writes exit.json, unless what it says is already there.
func (p *Provider) record(dir string, r run, e providers.Exit) {
	rec := exitRecord{Run: r.ID, Reason: e.Reason, Detail: e.Detail, At: e.At}
	var old exitRecord
	if ok, err := readJSON(filepath.Join(dir, fileExit), &old); err == nil && ok && old == rec {
		return
	}
	if err := writeJSON(filepath.Join(dir, fileExit), rec); err != nil {
		p.log.Debug("recording an exit", "error", err) // the directory may be gone
	}
}

// lastExit finds out how the last run ended, from the most to the least
// trustworthy source: what QEMU said, what lab or a witness recorded, the
// process's status if the caller has it, the host's boot and QEMU's last words.
// known is false if only the status could tell more. The run has ended.
func lastExit(dir string, ws *unix.WaitStatus) (e providers.Exit, known bool) {
	var rec exitRecord
	recorded, _ := readJSON(filepath.Join(dir, fileExit), &rec)
	var r run
	ran, _ := readJSON(filepath.Join(dir, fileRun), &r)
	spoke, events := readEvents(dir)
	if !ran || !spoke {
		// The last start came to nothing, or there was none: what was recorded
		// is of the run before.
		return rec.exit(), true
	}
	recorded = recorded && rec.Run == r.ID
	if e, ok := announced(events); ok {
		if recorded && rec.Reason == providers.ExitHost && e.Reason == providers.ExitHost {
			e.Detail = rec.Detail
		}
		return e, true
	}
	switch {
	case recorded:
		return rec.exit(), true
	case ws != nil:
		return exitOfStatus(*ws, lastWords(dir)), true
	case r.Boot != bootID():
		return providers.Exit{Detail: "the host was restarted"}, true
	}
	if said := lastWords(dir); said != "" {
		return providers.Exit{Reason: providers.ExitCrashed, Detail: said}, false
	}
	return providers.Exit{Reason: providers.ExitSignaled, Detail: "killed"}, false
}

// announced reads the exit from QEMU's events; ok is false if QEMU died before
// it could say anything.
func announced(events []qmp.Event) (e providers.Exit, ok bool) {
	asked := false
	for _, ev := range events {
		switch ev.Name {
		case "POWERDOWN": // lab pressed the power button
			asked = true
		case "SHUTDOWN":
			var d struct {
				Reason string `json:"reason"`
			}
			json.Unmarshal(ev.Data, &d) // an unknown reason is one of the host's
			e = providers.Exit{Detail: d.Reason, At: ev.At.UTC()}
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
			ok = true
		}
	}
	return e, ok
}

// exitOfStatus reads the exit of a QEMU that announced none from its status.
func exitOfStatus(ws unix.WaitStatus, said string) providers.Exit {
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

// lastWords returns the last line that QEMU printed and that is no warning.
func lastWords(dir string) string {
	b, err := readTail(filepath.Join(dir, fileLog), 16<<10)
	if err != nil {
		return ""
	}
	said := ""
	for line := range bytes.Lines(b) {
		line = bytes.TrimSpace(line)
		if len(line) > 0 && !bytes.Contains(line, []byte("warning:")) {
			said = string(line)
		}
	}
	return said
}

// maxEventTail bounds how much of the event record is read. A guest can make it
// grow, by resetting itself in a loop; what matters stands at its end.
const maxEventTail = 256 << 10

// readEvents returns the events of the present or last run; spoke is false if
// QEMU did not get as far as its greeting.
func readEvents(dir string) (spoke bool, events []qmp.Event) {
	b, err := readTail(filepath.Join(dir, fileEvents+".out"), maxEventTail)
	if err != nil || len(b) == 0 {
		return false, nil
	}
	events, err = qmp.ReadEvents(bytes.NewReader(b))
	if err != nil {
		return false, nil
	}
	return true, events
}

// readTail returns the last n bytes of a file, or all of a shorter one.
func readTail(path string, n int64) ([]byte, error) {
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
