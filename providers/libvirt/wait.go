// SPDX-License-Identifier: Apache-2.0

package libvirt

import (
	"context"
	"fmt"
	"path/filepath"
	"time"

	golibvirt "github.com/digitalocean/go-libvirt"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/providers"
	"github.com/labfile/lab/providers/local"
)

// Wait returns once the generation's domain has ended, told by libvirt's events, or
// by the kernel while there is no daemon.
func (p *Provider) Wait(ctx context.Context, g lab.Generation) (providers.Exit, error) {
	e, err := p.wait(ctx, g)
	if err != nil {
		return e, fmt.Errorf("waiting for machine %q: %w", g, err)
	}
	return e, nil
}

func (p *Provider) wait(ctx context.Context, g lab.Generation) (providers.Exit, error) {
	if err := p.enter(ctx, g); err != nil {
		return providers.Exit{}, err
	}
	dir := p.dir(g)
	d, ran, err := p.look(ctx, g)
	if unreachable(err) && findQEMU(dir) != 0 {
		// The kernel knows about a machine that runs, daemon or not.
		d, ran, err = domain{Domain: golibvirt.Domain{Name: domainName(g), UUID: uuidOf(dir)}}, true, nil
	}
	if err != nil {
		return providers.Exit{}, err
	}
	if ran {
		if err := p.await(ctx, d, dir); err != nil {
			return providers.Exit{}, err
		}
	}
	if !exists(dir) {
		return providers.Exit{Reason: providers.ExitHost, Detail: "destroyed", At: time.Now().UTC()}, nil
	}
	e, known := local.LastExit(dir, nil, p.lastWords(d.Name))
	if !ran && known {
		return e, nil // told before, or nothing to tell
	}
	if e.At.IsZero() {
		e.At = time.Now().UTC()
	}
	var r local.Run
	if ok, err := local.ReadJSON(filepath.Join(dir, local.FileRun), &r); err == nil && ok {
		p.note(local.Record(dir, r, e))
	}
	return e, nil
}

// look finds the generation's domain, if it has one, and whether that runs.
// ErrNotFound if there is nothing of the generation.
func (p *Provider) look(ctx context.Context, g lab.Generation) (d domain, runs bool, err error) {
	d, ok, err := p.find(ctx, g)
	if err != nil {
		return d, false, err
	}
	if !ok {
		if !exists(p.dir(g)) {
			err = providers.ErrNotFound
		}
		return d, false, err
	}
	s, _, err := p.state(ctx, d)
	return d, p.lives(s), err
}

const (
	// reconnectInterval is how often a daemon that is gone is looked for.
	reconnectInterval = time.Second
	// noticeTime is how long libvirt may take to notice that a QEMU has ended.
	noticeTime = 3 * time.Second
)

// await returns once the domain has ended.
func (p *Provider) await(ctx context.Context, d domain, dir string) error {
	dead, stop := p.death(ctx, dir)
	defer stop()
	for {
		ended, err := p.listen(ctx, d, dead)
		if ended || err != nil && ctx.Err() != nil {
			return err
		}
		if err == nil {
			continue // there is news
		}
		if !unreachable(err) {
			return err
		}
		// The daemon is gone or deaf. The machine goes on, and if it ends the kernel
		// tells.
		p.log.Debug("waiting without libvirt", "domain", d.Name, "error", err)
		t := time.NewTimer(reconnectInterval)
		select {
		case <-dead:
			t.Stop()
			return nil
		case <-ctx.Done():
			t.Stop()
			return ctx.Err()
		case <-t.C:
		}
	}
}

// listen returns when there is news of the domain; ended says that it is over.
func (p *Provider) listen(ctx context.Context, d domain, dead <-chan struct{}) (ended bool, err error) {
	c, err := p.link.connect(ctx, false)
	if err != nil {
		return false, err
	}
	news, stop, err := p.link.listen(ctx, c)
	if err != nil {
		return false, err
	}
	defer stop()
	if s, _, err := p.state(ctx, d); err != nil || !p.lives(s) {
		return err == nil, err
	}
	for {
		select {
		case id := <-news:
			if id == d.UUID {
				return false, nil
			}
		case <-dead:
			return p.noticed(ctx, d, news)
		case <-c.wire.gone:
			return false, &errLost{p.link.where()}
		case <-ctx.Done():
			return false, ctx.Err()
		}
	}
}

// noticed gives libvirt the time to notice that a QEMU has ended, so that what is
// asked next finds it knowing.
func (p *Provider) noticed(ctx context.Context, d domain, news <-chan golibvirt.UUID) (bool, error) {
	t := time.NewTimer(noticeTime)
	defer t.Stop()
	for {
		s, _, err := p.state(ctx, d)
		if err != nil || !p.lives(s) {
			return ctx.Err() == nil, ctx.Err()
		}
		select {
		case <-news:
		case <-t.C:
			return true, nil
		case <-ctx.Done():
			return false, ctx.Err()
		}
	}
}

// death returns a channel that is closed when the generation's QEMU has ended; one
// that is never closed if there is no QEMU to be seen.
func (p *Provider) death(ctx context.Context, dir string) (dead <-chan struct{}, stop func()) {
	pid := findQEMU(dir)
	if pid == 0 {
		return nil, func() {}
	}
	proc, err := local.OpenProcess(pid)
	if err != nil {
		return nil, func() {} // it ended just now: libvirt tells
	}
	ctx, cancel := context.WithCancel(ctx)
	over, c := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(over)
		if proc.Wait(ctx) == nil {
			close(c)
		}
	}()
	return c, func() {
		cancel()
		<-over
		proc.Close()
	}
}
