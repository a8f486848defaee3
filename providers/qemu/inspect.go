// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/providers"
	"github.com/labfile/lab/providers/local"
)

// Inspect reads the generation's files and locks. It never talks to QEMU, so a
// QEMU that hangs cannot make it hang.
func (p *Provider) Inspect(ctx context.Context, g lab.Generation) (providers.Machine, error) {
	fail := func(err error) (providers.Machine, error) {
		return providers.Machine{}, fmt.Errorf("inspecting machine %q: %w", g, err)
	}
	if err := ctx.Err(); err != nil {
		return fail(err)
	}
	if err := local.CheckGeneration(g); err != nil {
		return fail(err)
	}
	m, ok, err := p.inspect(g)
	if err != nil {
		return fail(err)
	}
	if !ok {
		return fail(providers.ErrNotFound)
	}
	return m, nil
}

func (p *Provider) inspect(g lab.Generation) (m providers.Machine, ok bool, err error) {
	m.Generation = g
	dir := p.cfg.Dirs.Generation(g)
	if _, err := os.Stat(dir); err != nil {
		if !local.Gone(err) {
			return m, false, err
		}
		if len(local.TrashOf(dir)) > 0 {
			m.State, m.Reason = providers.StateBroken, "its removal was interrupted"
			return m, true, nil
		}
		return m, false, nil
	}
	var unread error
	m.Disk, m.Written, unread = local.Usage(dir)
	if m.PID, err = lockHolder(filepath.Join(dir, local.FilePID)); err != nil {
		return m, false, err
	}
	def, defined, err := local.ReadDefinition(dir, g)
	if err == nil {
		err = unread
	}
	switch {
	case err != nil:
		m.State, m.Reason = providers.StateBroken, err.Error()
		return m, true, nil
	case !defined:
		m.State, m.Reason = providers.StateBroken, "its creation was interrupted"
		if _, err := os.Stat(dir); local.Gone(err) {
			return p.inspect(g) // destroyed while we looked
		}
		return m, true, nil
	}
	m.Image = def.Image.Digest
	m.Volumes, _ = def.Storage()
	if m.PID == 0 {
		m.State = providers.StateStopped
		m.Exit, _ = local.LastExit(dir, nil, func() string { return lastWords(dir) })
		return m, true, nil
	}
	m.State = providers.StateRunning
	m.Unreachable = local.SocketsGone(p.sockets(g))
	if is, why := paused(dir, m.PID); is {
		m.State, m.Reason = providers.StatePaused, why
	}
	var r local.Run
	if _, err := local.ReadJSON(filepath.Join(dir, local.FileRun), &r); err != nil {
		return m, false, err
	}
	m.Since, m.Accel = r.Started, r.Accel
	return m, true, nil
}

// paused reports whether the guest of a QEMU that lives stands still, and why, if that is
// known.
func paused(dir string, pid int) (is bool, why string) {
	if is, why := local.Paused(dir); is {
		return true, why
	}
	if local.Halted(pid) {
		return true, "QEMU's process is stopped (SIGCONT lets it go on)"
	}
	return false, ""
}

// List reads the directories of all generations.
func (p *Provider) List(ctx context.Context, id lab.ID) ([]providers.Machine, error) {
	found, err := local.List(ctx, p.cfg.Dirs.Labs(), p.cfg.Dirs.Machines, id, p.inspect)
	if err != nil {
		return nil, fmt.Errorf("listing machines: %w", err)
	}
	return found, nil
}
