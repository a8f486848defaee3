// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/providers"
	"github.com/labfile/lab/providers/qemu/qmp"
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
	if err := checkGeneration(g); err != nil {
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
		if !gone(err) {
			return m, false, err
		}
		if len(trashOf(dir)) > 0 {
			m.State, m.Reason = providers.StateBroken, "its removal was interrupted"
			return m, true, nil
		}
		return m, false, nil
	}
	var unread error
	m.Disk, m.Written, unread = usage(dir)
	if m.PID, err = lockHolder(filepath.Join(dir, filePID)); err != nil {
		return m, false, err
	}
	def, defined, err := readDefinition(dir, g)
	if err == nil {
		err = unread
	}
	switch {
	case err != nil:
		m.State, m.Reason = providers.StateBroken, err.Error()
		return m, true, nil
	case !defined:
		m.State, m.Reason = providers.StateBroken, "its creation was interrupted"
		if _, err := os.Stat(dir); gone(err) {
			return p.inspect(g) // destroyed while we looked
		}
		return m, true, nil
	}
	m.Image = def.Image.Digest
	if m.PID == 0 {
		m.State = providers.StateStopped
		m.Exit, _ = lastExit(dir, nil)
		return m, true, nil
	}
	m.State = providers.StateRunning
	switch isPaused, why := paused(dir); {
	case isPaused:
		m.State, m.Reason = providers.StatePaused, why
	case halted(m.PID):
		m.State, m.Reason = providers.StatePaused, "QEMU's process is stopped (SIGCONT lets it go on)"
	}
	var r run
	if _, err := readJSON(filepath.Join(dir, fileRun), &r); err != nil {
		return m, false, err
	}
	m.Since, m.Accel = r.Started, r.Accel
	return m, true, nil
}

// paused reports whether the guest's processors are halted, by QEMU's own word,
// and why if it was QEMU who halted them: a write that found the disk full is
// tried again when the machine goes on, so that the guest never sees it.
func paused(dir string) (is bool, why string) {
	_, events := readEvents(dir)
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

// List reads the directories of all generations.
func (p *Provider) List(ctx context.Context, id lab.ID) ([]providers.Machine, error) {
	labs := []string{string(id)}
	if id == "" {
		var err error
		if labs, err = names(p.cfg.Dirs.Labs()); err != nil {
			return nil, fmt.Errorf("listing machines: %w", err)
		}
	} else if !lab.ValidLabel(string(id)) {
		return nil, fmt.Errorf("listing machines: %q is not the id of a lab", id)
	}
	var found []providers.Machine
	for _, l := range labs {
		if !lab.ValidLabel(l) || len(l) > lab.MaxID {
			continue // not a lab's directory
		}
		ms, err := p.list(ctx, lab.ID(l))
		if err != nil {
			return nil, fmt.Errorf("listing machines: %w", err)
		}
		found = append(found, ms...)
	}
	slices.SortFunc(found, func(a, b providers.Machine) int {
		return cmp.Or(cmp.Compare(a.Lab, b.Lab), cmp.Compare(a.Machine, b.Machine), cmp.Compare(a.Number, b.Number))
	})
	return found, nil
}

func (p *Provider) list(ctx context.Context, id lab.ID) ([]providers.Machine, error) {
	root := p.cfg.Dirs.Machines(id)
	machines, err := names(root)
	if err != nil {
		return nil, err
	}
	var found []providers.Machine
	for _, name := range machines {
		if !lab.ValidLabel(name) {
			continue
		}
		entries, err := names(filepath.Join(root, name))
		if err != nil {
			return nil, err
		}
		numbers := map[int]bool{}
		for _, e := range entries {
			// A directory on its way out counts as its generation.
			if rest, ok := strings.CutPrefix(e, trashPrefix+"-"); ok {
				e, _, _ = strings.Cut(rest, "-")
			}
			if n, err := strconv.Atoi(e); err == nil && n > 0 && strconv.Itoa(n) == e {
				numbers[n] = true
			}
		}
		for n := range numbers {
			if err := ctx.Err(); err != nil {
				return nil, err
			}
			m, ok, err := p.inspect(lab.Generation{Lab: id, Machine: lab.Name(name), Number: n})
			if err != nil {
				return nil, err
			}
			if ok {
				found = append(found, m)
			}
		}
	}
	return found, nil
}

// names returns the entries of a directory; an absent one has none.
func names(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		if gone(err) {
			return nil, nil
		}
		return nil, err
	}
	var found []string
	for _, e := range entries {
		if e.IsDir() {
			found = append(found, e.Name())
		}
	}
	return found, nil
}
