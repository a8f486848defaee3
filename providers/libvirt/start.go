// SPDX-License-Identifier: Apache-2.0

package libvirt

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	golibvirt "github.com/digitalocean/go-libvirt"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/providers/local"
)

// Start has libvirt start the domain, from a definition made anew: overlays may
// have come and gone since the last one.
func (p *Provider) Start(ctx context.Context, g lab.Generation) error {
	if err := p.start(ctx, g); err != nil {
		return fmt.Errorf("starting machine %q: %w", g, err)
	}
	return nil
}

func (p *Provider) start(ctx context.Context, g lab.Generation) error {
	held, d, err := p.hold(ctx, g)
	if err != nil {
		return err
	}
	defer held.Close()
	dir := p.dir(g)
	if on, err := p.goOn(ctx, d); on || err != nil {
		return err
	}
	def, err := d.definition()
	if err != nil {
		return err
	}
	if err := p.join(ctx, def); err != nil {
		return err
	}
	binary, err := p.binary()
	if err != nil {
		return err
	}
	how, err := p.prober.Accel(ctx, binary, def.Image.Kernel)
	if err != nil {
		return err
	}

	sockets := p.cfg.Dirs.RunLab(g.Lab)
	if err := os.MkdirAll(sockets, 0o700); err != nil {
		return err
	}
	if !p.addr.session {
		if err := share(sockets); err != nil {
			return err
		}
	}
	p.removeSockets(g)
	p.note(local.Settle(dir, p.lastWords(d.Name)))
	if err := local.FreshRecords(dir); err != nil {
		return err
	}
	r := local.Run{ID: rand.Text(), Started: time.Now().UTC(), Accel: how.Name, Boot: local.BootID()}
	if err := local.WriteJSON(filepath.Join(dir, local.FileRun), r); err != nil {
		return err
	}
	define := func() (golibvirt.Domain, error) { return p.define(ctx, d.Name, dir, def) }
	if err := p.launch(ctx, define, def); err != nil {
		// It never ran, so how it ended before is still how it last ended.
		os.Remove(filepath.Join(dir, local.FileRun))
		p.removeSockets(g)
		os.Remove(sockets)
		return err
	}
	return nil
}

// goOn reports whether the domain runs, and lets one go on that is paused.
func (p *Provider) goOn(ctx context.Context, d domain) (bool, error) {
	s, reason, err := p.state(ctx, d)
	if err != nil || !p.lives(s) {
		return false, err
	}
	if s == golibvirt.DomainPaused && golibvirt.DomainPausedReason(reason) != golibvirt.DomainPausedStartingUp {
		err = p.link.do(ctx, func(l *golibvirt.Libvirt) error { return l.DomainResume(d.Domain) })
	}
	return true, err
}

// launch starts the domain that define defines.
func (p *Provider) launch(ctx context.Context, define func() (golibvirt.Domain, error), def local.Definition) error {
	dom, err := define()
	if err != nil {
		return err
	}
	err = p.link.do(ctx, func(l *golibvirt.Libvirt) error {
		return toldWhy(ctx, func() error {
			_, err := l.DomainCreateWithFlags(dom, 0)
			return err
		})
	})
	if err == nil {
		return nil
	}
	if ctx.Err() != nil {
		// libvirt goes on with what it was asked for: let that come to nothing.
		cleanup, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupTime)
		defer cancel()
		if err := p.kill(cleanup, domain{Domain: dom}); err != nil {
			p.log.Debug("undoing a start", "error", err)
		}
		return ctx.Err()
	}
	volumes, _ := def.Storage()
	if inUse := local.VolumeInUse(volumes, err.Error()); inUse != nil {
		return inUse
	}
	var e golibvirt.Error
	if errors.As(err, &e) {
		return fmt.Errorf("libvirt says: %w", err)
	}
	return err
}

// attempts is how often a domain is started whose QEMU ends before it says why.
const attempts = 3

// toldWhy starts a domain. libvirt tells what a QEMU said that could not start only if
// it came to talk to it first: one that was quicker to end is started again for its
// reason, for its guest never ran. One that was ended because ctx did is not.
func toldWhy(ctx context.Context, start func() error) error {
	for n := 1; ; n++ {
		err := start()
		if n == attempts || !silentEnd(err) || ctx.Err() != nil {
			return err
		}
	}
}
