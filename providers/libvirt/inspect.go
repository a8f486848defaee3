// SPDX-License-Identifier: Apache-2.0

package libvirt

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"

	golibvirt "github.com/digitalocean/go-libvirt"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/providers"
	"github.com/labfile/lab/providers/local"
)

// Inspect asks libvirt, which answers without asking QEMU, and the kernel.
func (p *Provider) Inspect(ctx context.Context, g lab.Generation) (providers.Machine, error) {
	m, err := p.inspect(ctx, g)
	if err != nil {
		return providers.Machine{}, fmt.Errorf("inspecting machine %q: %w", g, err)
	}
	return m, nil
}

func (p *Provider) inspect(ctx context.Context, g lab.Generation) (providers.Machine, error) {
	if err := p.enter(ctx, g); err != nil {
		return providers.Machine{}, err
	}
	d, ok, err := p.find(ctx, g)
	if err != nil {
		return providers.Machine{}, err
	}
	found := &d
	if !ok {
		found = nil
	}
	m, ok, err := p.describe(ctx, g, found)
	if err == nil && !ok {
		err = providers.ErrNotFound
	}
	return m, err
}

// describe puts together what libvirt and the directory say of a generation; d is
// nil if it has no domain. ok is false if there is nothing of it.
func (p *Provider) describe(ctx context.Context, g lab.Generation, d *domain) (m providers.Machine, ok bool, err error) {
	m.Generation = g
	dir := p.dir(g)
	broken := func(why string) (providers.Machine, bool, error) {
		m.State, m.Reason = providers.StateBroken, why
		return m, true, nil
	}
	switch {
	case d == nil && exists(dir):
		return broken("it has no domain: its creation was interrupted, or the domain was undefined")
	case d == nil && len(local.TrashOf(dir)) > 0:
		return broken("its removal was interrupted")
	case d == nil:
		return m, false, nil
	}
	def, err := d.definition()
	if err != nil {
		return broken(err.Error())
	}
	m.Image = def.Image.Digest
	m.PID = findQEMU(dir)
	if !exists(dir) {
		return broken("its directory is gone: " + dir)
	}
	if m.Disk, m.Written, err = local.Usage(dir); err != nil {
		return broken(err.Error())
	}
	m.Volumes, _ = def.Storage()
	s, reason, err := p.state(ctx, *d)
	if err != nil {
		return m, false, err
	}
	if !p.lives(s) || m.PID == 0 { // libvirt may not have noticed the end of a QEMU yet
		m.PID, m.State = 0, providers.StateStopped
		m.Exit, _ = local.LastExit(dir, nil, p.lastWords(d.Name))
		return m, true, nil
	}
	m.State = providers.StateRunning
	switch why := golibvirt.DomainPausedReason(reason); {
	case s == golibvirt.DomainPaused && why != golibvirt.DomainPausedStartingUp:
		m.State = providers.StatePaused
		if _, m.Reason = local.Paused(dir); m.Reason == "" && why == golibvirt.DomainPausedIoerror {
			m.Reason = "its disk failed"
		}
	case local.Halted(m.PID):
		m.State, m.Reason = providers.StatePaused, "QEMU's process is stopped (SIGCONT lets it go on)"
	}
	var r local.Run
	if _, err := local.ReadJSON(filepath.Join(dir, local.FileRun), &r); err != nil {
		return m, false, err
	}
	m.Since, m.Accel = r.Started, r.Accel
	return m, true, nil
}

// List asks libvirt for the domains that are lab's, whatever they are called now,
// and adds generations that have a directory only.
func (p *Provider) List(ctx context.Context, id lab.ID) ([]providers.Machine, error) {
	found, err := p.list(ctx, id)
	if err != nil {
		return nil, fmt.Errorf("listing machines: %w", err)
	}
	return found, nil
}

func (p *Provider) list(ctx context.Context, id lab.ID) ([]providers.Machine, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	generations, err := local.Generations(p.cfg.Dirs.Labs(), p.cfg.Dirs.Domains, id)
	if err != nil {
		return nil, err
	}
	if p.bad != nil {
		return nil, p.bad
	}
	domains, err := p.domains(ctx, id, len(generations) > 0)
	if err != nil {
		return nil, err
	}
	for g := range domains {
		if !slices.Contains(generations, g) {
			generations = append(generations, g)
		}
	}
	slices.SortFunc(generations, local.Compare)
	var found []providers.Machine
	for _, g := range generations {
		m, ok, err := p.describe(ctx, g, domains[g])
		if err != nil {
			return nil, err
		}
		if ok {
			found = append(found, m)
		}
	}
	return found, nil
}

// domains lists lab's domains. If nothing is known to be there, no daemon is started
// to find that out, and one that cannot be used is nobody's trouble.
func (p *Provider) domains(ctx context.Context, id lab.ID, wake bool) (map[lab.Generation]*domain, error) {
	if _, err := p.link.connect(ctx, wake); err != nil {
		if !wake && ctx.Err() == nil {
			p.log.Debug("listing domains", "error", err)
			return nil, nil
		}
		return nil, err
	}
	return answer(ctx, p.link, func(l *golibvirt.Libvirt) (map[lab.Generation]*domain, error) {
		found := map[lab.Generation]*domain{}
		all, _, err := l.ConnectListAllDomains(1, 0)
		if err != nil {
			return nil, err
		}
		for _, dom := range all {
			d, err := identify(l, dom)
			if isNotFound(err) {
				continue // not lab's, or gone
			}
			if err != nil {
				return nil, err
			}
			g := d.generation()
			if local.CheckGeneration(g) != nil || d.Directory != p.home(g) || id != "" && g.Lab != id {
				continue // of another data home
			}
			found[g] = &d
		}
		return found, nil
	})
}

// findQEMU returns the pid of the generation's QEMU, 0 if there is none: the process
// that was told to record its events in the generation's directory. libvirt does not
// tell it.
func findQEMU(dir string) int {
	argument := []byte("\x00pipe,id=labevents,path=" + comma(dir+"/"+local.FileEvents) + "\x00")
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return 0
	}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		b, err := os.ReadFile(filepath.Join("/proc", e.Name(), "cmdline"))
		if err == nil && bytes.Contains(b, argument) {
			return pid
		}
	}
	return 0
}
