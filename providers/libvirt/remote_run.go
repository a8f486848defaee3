// SPDX-License-Identifier: Apache-2.0

package libvirt

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	golibvirt "github.com/digitalocean/go-libvirt"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/providers"
	"github.com/labfile/lab/providers/local"
)

// Start has libvirt start the domain, from a definition made anew.
func (r *Remote) Start(ctx context.Context, g lab.Generation) error {
	if err := r.start(ctx, g); err != nil {
		return fmt.Errorf("starting machine %q: %w", g, err)
	}
	return nil
}

func (r *Remote) start(ctx context.Context, g lab.Generation) error {
	held, d, err := r.p.hold(ctx, g)
	if err != nil {
		return err
	}
	defer held.Close()
	dir := r.p.dir(g)
	if on, err := r.p.goOn(ctx, d); on || err != nil {
		return err
	}
	if err := r.bury(ctx, d, dir); err != nil {
		return err
	}
	def, err := d.definition()
	if err != nil {
		return err
	}
	if err := r.p.join(ctx, def); err != nil {
		return err
	}
	from, err := d.stored()
	if err != nil {
		return err
	}
	files, err := r.pool(ctx)
	if err != nil {
		return err
	}
	from, images, err := r.resend(ctx, files, def, from)
	if err != nil {
		return err
	}
	defer images.Close()
	how, err := r.accel(ctx, files, from.Kernel)
	if err != nil {
		return err
	}
	// A log is one run's.
	if err := files.make(ctx, rawVolume(r.prefix(g)+volumeLog, 0)); err != nil {
		return err
	}
	run := local.Run{ID: rand.Text(), Started: time.Now().UTC(), Accel: how.Name}
	if err := local.WriteJSON(filepath.Join(dir, local.FileRun), run); err != nil {
		return err
	}
	define := func() (golibvirt.Domain, error) {
		defer images.Close() // the domain names them
		return r.define(ctx, files, d.Name, def, from)
	}
	if err := r.p.launch(ctx, define, def); err != nil {
		os.Remove(filepath.Join(dir, local.FileRun)) // it never ran
		return err
	}
	return nil
}

// bury ends the QEMU of a guest that panicked, once it is known how it ended.
func (r *Remote) bury(ctx context.Context, d domain, dir string) error {
	s, why, err := r.p.state(ctx, d)
	if err != nil || s != golibvirt.DomainCrashed {
		return err
	}
	r.record(dir, s, why)
	return r.p.kill(ctx, d)
}

// Stop presses the power button, then has libvirt end the domain.
func (r *Remote) Stop(ctx context.Context, g lab.Generation, grace time.Duration) error {
	if err := r.stop(ctx, g, grace); err != nil {
		return fmt.Errorf("stopping machine %q: %w", g, err)
	}
	return nil
}

func (r *Remote) stop(ctx context.Context, g lab.Generation, grace time.Duration) error {
	if err := r.p.enter(ctx, g); err != nil {
		return err
	}
	d, ok, err := r.p.find(ctx, g)
	if err != nil || !ok {
		return err
	}
	dir := r.p.dir(g)
	s, _, err := r.p.state(ctx, d)
	if err != nil {
		return err
	}
	if !r.p.lives(s) {
		return r.bury(ctx, d, dir)
	}
	// Whatever ends it from now on was asked for.
	r.p.note(local.Intend(dir, "powered off"))
	if err := r.p.shutDown(ctx, d, s, dir, grace); err != nil {
		r.p.note(os.Remove(filepath.Join(dir, local.FileExit)))
		return err
	}
	return nil
}

// lastExit finds out how the last run ended: by what lab or a witness recorded, or by what
// libvirt remembers. s and why are the domain's state; it does not run.
func (r *Remote) lastExit(dir string, s golibvirt.DomainState, why int32) providers.Exit {
	var rec local.ExitRecord
	recorded, _ := local.ReadJSON(filepath.Join(dir, local.FileExit), &rec)
	var run local.Run
	ran, _ := local.ReadJSON(filepath.Join(dir, local.FileRun), &run)
	if recorded && (!ran || rec.Run == run.ID) {
		return providers.Exit{Reason: rec.Reason, Detail: rec.Detail, At: rec.At}
	}
	if !ran {
		return providers.Exit{}
	}
	if s == golibvirt.DomainCrashed {
		return providers.Exit{Reason: providers.ExitPanic, Detail: "guest-panic"}
	}
	switch golibvirt.DomainShutoffReason(why) {
	case golibvirt.DomainShutoffShutdown:
		return providers.Exit{Reason: providers.ExitGuest, Detail: "guest-shutdown"}
	case golibvirt.DomainShutoffDestroyed:
		return providers.Exit{Reason: providers.ExitSignaled, Detail: "destroyed by another user of libvirt"}
	case golibvirt.DomainShutoffCrashed:
		return providers.Exit{Reason: providers.ExitSignaled, Detail: "QEMU ended without a word"}
	case golibvirt.DomainShutoffFailed:
		return providers.Exit{Reason: providers.ExitCrashed, Detail: "QEMU failed"}
	}
	return providers.Exit{Detail: "libvirt does not remember"}
}

// record keeps how the last run ended: libvirt may be restarted and forget it.
func (r *Remote) record(dir string, s golibvirt.DomainState, why int32) providers.Exit {
	e := r.lastExit(dir, s, why)
	var run local.Run
	ok, err := local.ReadJSON(filepath.Join(dir, local.FileRun), &run)
	if err != nil || !ok {
		return e
	}
	if e.At.IsZero() {
		e.At = time.Now().UTC()
	}
	r.p.note(local.Record(dir, run, e))
	return e
}

// Wait returns once the generation's domain has ended, told by libvirt's events.
func (r *Remote) Wait(ctx context.Context, g lab.Generation) (providers.Exit, error) {
	e, err := r.wait(ctx, g)
	if err != nil {
		return e, fmt.Errorf("waiting for machine %q: %w", g, err)
	}
	return e, nil
}

func (r *Remote) wait(ctx context.Context, g lab.Generation) (providers.Exit, error) {
	if err := r.p.enter(ctx, g); err != nil {
		return providers.Exit{}, err
	}
	dir := r.p.dir(g)
	d, runs, err := r.p.look(ctx, g)
	if unreachable(err) && exists(filepath.Join(dir, local.FileRun)) {
		// It went on when it was seen last.
		d, runs, err = domain{Domain: golibvirt.Domain{Name: domainName(g), UUID: uuidOf(r.p.home(g))}}, true, nil
	}
	if err != nil {
		return providers.Exit{}, err
	}
	if runs {
		if err := r.p.await(ctx, d, dir); err != nil {
			return providers.Exit{}, err
		}
	}
	if !exists(dir) {
		return providers.Exit{Reason: providers.ExitHost, Detail: "destroyed", At: time.Now().UTC()}, nil
	}
	s, why, err := r.p.state(ctx, d)
	if err != nil {
		return providers.Exit{}, err
	}
	e := r.record(dir, s, why)
	if s == golibvirt.DomainCrashed {
		if err := r.p.kill(ctx, d); err != nil { // else its memory stays taken
			r.p.log.Debug("ending what is left of a panic", "error", err)
		}
	}
	return e, nil
}

// Inspect asks libvirt.
func (r *Remote) Inspect(ctx context.Context, g lab.Generation) (providers.Machine, error) {
	return r.p.inspect(ctx, g, r.describe)
}

// describe puts together what libvirt and the directory say of a generation.
func (r *Remote) describe(ctx context.Context, g lab.Generation, d *domain) (m providers.Machine, ok bool, err error) {
	m, def, ok := r.p.known(g, d)
	if !ok || m.State == providers.StateBroken {
		return m, ok, nil
	}
	m.Volumes, _ = def.Storage()
	s, why, err := r.p.state(ctx, *d)
	if err != nil {
		return m, false, err
	}
	var missing *errMissing
	switch m.Disk, m.Written, err = r.usage(ctx, g); {
	case errors.As(err, &missing) && !r.p.lives(s):
		m.State, m.Reason = providers.StateBroken, err.Error()
		return m, true, nil
	case unreachable(err) || ctx.Err() != nil:
		return m, false, err
	case err != nil: // a pool that is not active takes nothing from the machine
		r.p.log.Debug("asking for the size of a disk", "machine", g.String(), "error", err)
	}
	if !r.p.lives(s) {
		m.State, m.Exit = providers.StateStopped, r.lastExit(r.p.dir(g), s, why)
		return m, true, nil
	}
	return m, true, r.p.describeRun(&m, s, why)
}

// List asks libvirt for the domains that are lab's and this data home's, and adds
// generations that have a directory only.
func (r *Remote) List(ctx context.Context, id lab.ID) ([]providers.Machine, error) {
	return r.p.list(ctx, id, r.describe)
}

// Check looks at the daemon, the pool and what runs guests there.
func (r *Remote) Check(ctx context.Context) ([]providers.Finding, error) {
	found := append([]providers.Finding{{Topic: "uri", Level: providers.LevelOK, Detail: r.URI()}}, r.p.checkDaemon(ctx)...)
	if !slices.ContainsFunc(found, func(f providers.Finding) bool { return f.Level == providers.LevelError }) {
		found = append(found, r.checkPool(ctx)...)
	}
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("checking the host: %w", err)
	}
	return found, nil
}

// checkPool looks at the storage pool and at acceleration.
func (r *Remote) checkPool(ctx context.Context) []providers.Finding {
	f := providers.Finding{Topic: "pool", Level: providers.LevelOK}
	files, err := r.pool(ctx)
	if err != nil {
		f.Level, f.Detail = providers.LevelError, err.Error()
		var p *errPool
		if errors.As(err, &p) {
			f.Cure = p.cure
		}
		return []providers.Finding{f}
	}
	f.Detail = fmt.Sprintf("machines are kept in the pool %q, %s", files.it.Name, files.dir)
	free, err := answer(ctx, r.p.link, func(l *golibvirt.Libvirt) (uint64, error) {
		_, _, _, free, err := l.StoragePoolGetInfo(files.it)
		return free, err
	})
	if err == nil {
		f.Detail += fmt.Sprintf(", with %s free", lab.Bytes(free))
	}
	return []providers.Finding{f, r.checkAccel(ctx, files)}
}
