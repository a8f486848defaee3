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
	return p.inspect(ctx, g, p.describe)
}

// describer puts together what there is to be known of a generation; d is nil if it has no
// domain. ok is false if there is nothing of it.
type describer func(ctx context.Context, g lab.Generation, d *domain) (m providers.Machine, ok bool, err error)

func (p *Provider) inspect(ctx context.Context, g lab.Generation, describe describer) (providers.Machine, error) {
	m, err := p.inspectOne(ctx, g, describe)
	if err != nil {
		return providers.Machine{}, fmt.Errorf("inspecting machine %q: %w", g, err)
	}
	return m, nil
}

func (p *Provider) inspectOne(ctx context.Context, g lab.Generation, describe describer) (m providers.Machine, err error) {
	if err := p.enter(ctx, g); err != nil {
		return m, err
	}
	d, ok, err := p.find(ctx, g)
	if err != nil {
		return m, err
	}
	found := &d
	if !ok {
		found = nil
	}
	m, ok, err = describe(ctx, g, found)
	if err == nil && !ok {
		err = providers.ErrNotFound
	}
	return m, err
}

// known begins a description: with StateBroken and the reason if the generation is not
// whole. ok is false if there is nothing of it.
func (p *Provider) known(g lab.Generation, d *domain) (m providers.Machine, def local.Definition, ok bool) {
	m.Generation = g
	dir := p.dir(g)
	broken := func(why string) (providers.Machine, local.Definition, bool) {
		m.State, m.Reason = providers.StateBroken, why
		return m, def, true
	}
	switch {
	case d == nil && !p.claims(dir):
		return m, def, false
	case d == nil && exists(dir):
		return broken("it has no domain: its creation was interrupted, or the domain was undefined")
	case d == nil && len(local.TrashOf(dir)) > 0:
		return broken("its removal was interrupted")
	case d == nil:
		return m, def, false
	}
	def, err := d.definition()
	if err != nil {
		return broken(err.Error())
	}
	m.Image = def.Image.Digest
	if !exists(dir) {
		return broken("its directory is gone: " + dir)
	}
	return m, def, true
}

// describeRun completes the description of a machine that runs in that state: it may be paused.
func (p *Provider) describeRun(m *providers.Machine, s golibvirt.DomainState, reason int32) error {
	m.State = providers.StateRunning
	if why := golibvirt.DomainPausedReason(reason); s == golibvirt.DomainPaused && why != golibvirt.DomainPausedStartingUp {
		m.State = providers.StatePaused
		if why == golibvirt.DomainPausedIoerror {
			m.Reason = "its disk failed"
		}
	}
	var r local.Run
	_, err := local.ReadJSON(filepath.Join(p.dir(m.Generation), local.FileRun), &r)
	m.Since, m.Accel = r.Started, r.Accel
	return err
}

// describe puts together what libvirt, the directory and the kernel say of a generation.
func (p *Provider) describe(ctx context.Context, g lab.Generation, d *domain) (m providers.Machine, ok bool, err error) {
	dir := p.dir(g)
	m, def, ok := p.known(g, d)
	if d != nil {
		m.PID = findQEMU(dir)
	}
	if !ok || m.State == providers.StateBroken {
		return m, ok, nil
	}
	if m.Disk, m.Written, err = local.Usage(dir); err != nil {
		m.State, m.Reason = providers.StateBroken, err.Error()
		return m, true, nil
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
	if err := p.describeRun(&m, s, reason); err != nil {
		return m, false, err
	}
	m.Unreachable = p.socketsGone(def, m.Since)
	switch {
	case m.State == providers.StatePaused:
		if _, why := local.Paused(dir); why != "" {
			m.Reason = why
		}
	case local.Halted(m.PID):
		m.State, m.Reason = providers.StatePaused, "QEMU's process is stopped (SIGCONT lets it go on)"
	}
	return m, true, nil
}

// List asks libvirt for the domains that are lab's, whatever they are called now,
// and adds generations that have a directory only.
func (p *Provider) List(ctx context.Context, id lab.ID) ([]providers.Machine, error) {
	return p.list(ctx, id, p.describe)
}

func (p *Provider) list(ctx context.Context, id lab.ID, describe describer) ([]providers.Machine, error) {
	found, err := p.listAll(ctx, id, describe)
	if err != nil {
		return nil, fmt.Errorf("listing machines: %w", err)
	}
	return found, nil
}

func (p *Provider) listAll(ctx context.Context, id lab.ID, describe describer) ([]providers.Machine, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	generations, err := local.Generations(p.cfg.Dirs.Labs(), p.cfg.Dirs.Domains, id)
	if err != nil {
		return nil, err
	}
	generations = slices.DeleteFunc(generations, func(g lab.Generation) bool { return !p.claims(p.dir(g)) })
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
		m, ok, err := describe(ctx, g, domains[g])
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

// fileDaemon holds the URI of the daemon whose domain belongs to a generation's directory:
// those of all daemons lie side by side.
const fileDaemon = "uri.json"

// claim notes that a directory is this daemon's.
func (p *Provider) claim(dir string) error {
	if daemonOf(dir) == p.cfg.URI {
		return nil
	}
	return local.WriteJSON(filepath.Join(dir, fileDaemon), p.cfg.URI)
}

// claims reports whether a directory is this daemon's, or nobody's.
func (p *Provider) claims(dir string) bool {
	uri := daemonOf(dir)
	return uri == "" || uri == p.cfg.URI
}

// daemonOf returns the URI that a directory names; empty if it names none.
func daemonOf(dir string) (uri string) {
	_, _ = local.ReadJSON(filepath.Join(dir, fileDaemon), &uri)
	return uri
}

// Daemons looks at the directories of the lab's generations.
func (p *Provider) Daemons(id lab.ID) ([]string, error) {
	generations, err := local.Generations(p.cfg.Dirs.Labs(), p.cfg.Dirs.Domains, id)
	if err != nil {
		return nil, fmt.Errorf("looking for machines of %s: %w", id, err)
	}
	var all []string
	for _, g := range generations {
		if uri := daemonOf(p.dir(g)); uri != "" {
			all = append(all, uri)
		}
	}
	slices.Sort(all)
	return slices.Compact(all), nil
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
