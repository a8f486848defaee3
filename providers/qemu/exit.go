// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/providers"
	"github.com/labfile/lab/providers/local"
	"golang.org/x/sys/unix"
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
	if err := local.CheckGeneration(g); err != nil {
		return providers.Exit{}, err
	}
	dir := p.cfg.Dirs.Generation(g)
	if _, err := os.Stat(dir); err != nil {
		if local.Gone(err) {
			err = providers.ErrNotFound
		}
		return providers.Exit{}, err
	}
	said := func() string { return lastWords(dir) }
	proc, err := p.find(ctx, dir)
	if err != nil {
		return providers.Exit{}, err
	}
	var (
		r      local.Run
		status = func() (unix.WaitStatus, bool) { return 0, false }
	)
	if _, err := local.ReadJSON(filepath.Join(dir, local.FileRun), &r); err != nil {
		return providers.Exit{}, err
	}
	if proc != nil {
		defer proc.Close()
		status = proc.Status
		if err := proc.Wait(ctx); err != nil {
			return providers.Exit{}, err
		}
	}
	// An exit that QEMU announced is known at once. Else the status tells more,
	// by way of the kernel or of the process that started QEMU, in a moment.
	e, known := local.LastExit(dir, nil, said)
	for i := 0; i < statusTries && !known; i++ {
		if ws, ok := status(); ok {
			e, _ = local.LastExit(dir, &ws, said)
			break
		}
		if err := local.Pause(ctx, local.LockRetry); err != nil {
			break // the answer is good enough
		}
		e, known = local.LastExit(dir, nil, said)
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
	p.note(local.Record(dir, r, e))
	return e, nil
}

// statusTries bounds, in steps of local.LockRetry, the wait for a status that may never
// come: on older kernels only the parent gets it, and that may be init.
const statusTries = 20

// collected records the exit of a run whose QEMU was a child of this process.
func (p *Provider) collected(dir, id string, ws unix.WaitStatus) {
	var r local.Run
	if ok, err := local.ReadJSON(filepath.Join(dir, local.FileRun), &r); err != nil || !ok || r.ID != id {
		return // it never came up, was destroyed, or runs again
	}
	e, _ := local.LastExit(dir, &ws, func() string { return lastWords(dir) })
	if e.At.IsZero() {
		e.At = time.Now().UTC()
	}
	p.note(local.Record(dir, r, e))
}

// settle records how the last run ended. The generation does not run.
func (p *Provider) settle(dir string) {
	p.note(local.Settle(dir, func() string { return lastWords(dir) }))
}

// note drops the error of a record that could not be made: the directory may be gone.
func (p *Provider) note(err error) {
	if err != nil {
		p.log.Debug("recording an exit", "error", err)
	}
}

// lastWords returns the last line that QEMU printed and that is no warning.
func lastWords(dir string) string {
	b, err := local.ReadTail(filepath.Join(dir, local.FileLog), 16<<10)
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
