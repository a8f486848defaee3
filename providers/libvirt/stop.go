// SPDX-License-Identifier: Apache-2.0

package libvirt

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	golibvirt "github.com/digitalocean/go-libvirt"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/providers"
	"github.com/labfile/lab/providers/local"
)

const (
	commandTimeout = 2 * time.Second // what a QEMU that answers at all needs for a command, many times over
	buttonInterval = 3 * time.Second // between two presses of the power button
)

// Stop presses the power button, then has libvirt end the domain. ErrUnasked if libvirt
// cannot press it.
func (p *Provider) Stop(ctx context.Context, g lab.Generation, grace time.Duration) error {
	if err := p.stop(ctx, g, grace); err != nil {
		return fmt.Errorf("stopping machine %q: %w", g, err)
	}
	return nil
}

func (p *Provider) stop(ctx context.Context, g lab.Generation, grace time.Duration) error {
	if err := p.enter(ctx, g); err != nil {
		return err
	}
	d, ok, err := p.find(ctx, g)
	if err != nil || !ok {
		return err
	}
	s, _, err := p.state(ctx, d)
	if err != nil {
		return err
	}
	dir := p.dir(g)
	if p.lives(s) {
		if err := p.shutDown(ctx, d, s, dir, grace); err != nil {
			return err
		}
		p.note(local.Settle(dir, p.lastWords(d.Name)))
	}
	// The sockets of a killed QEMU stay behind. Whoever holds the lock for long
	// starts or destroys the machine, and removes them as well.
	limited, cancel := context.WithTimeout(ctx, commandTimeout)
	defer cancel()
	held, err := local.Lock(limited, filepath.Join(dir, local.FileLock))
	if errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil {
		return nil
	}
	if err != nil {
		return local.IgnoreGone(err)
	}
	defer held.Close()
	if s, _, err := p.state(ctx, d); err == nil && !p.lives(s) {
		p.removeSockets(g)
		os.Remove(p.cfg.Dirs.RunLab(g.Lab))
	}
	return nil
}

// shutDown ends the domain, which is in the state s. It returns nil once that is so.
func (p *Provider) shutDown(ctx context.Context, d domain, s golibvirt.DomainState, dir string, grace time.Duration) error {
	if s == golibvirt.DomainPaused && grace > 0 {
		// libvirt would take the request, and the guest would never see it.
		return fmt.Errorf("%w: it is paused", providers.ErrUnasked)
	}
	until := time.Now().Add(grace)
	asked := false
	for left := grace; left > 0; left = time.Until(until) {
		// The button is pressed again and again: a guest that is still booting
		// does not notice the first time.
		if err := p.press(ctx, d); err != nil {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			p.log.Debug("power button", "domain", d.Name, "error", err)
			if !asked {
				return fmt.Errorf("%w: %w", providers.ErrUnasked, err)
			}
		}
		asked = true
		limited, cancel := context.WithTimeout(ctx, min(left, buttonInterval))
		err := p.await(limited, d, dir)
		cancel()
		if err == nil {
			return nil
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if !errors.Is(err, context.DeadlineExceeded) {
			return err
		}
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	p.note(local.Intend(dir, providers.DetailForced))
	return p.kill(ctx, d)
}

// press presses the power button.
func (p *Provider) press(ctx context.Context, d domain) error {
	ctx, cancel := context.WithTimeout(ctx, commandTimeout)
	defer cancel()
	err := p.link.do(ctx, func(l *golibvirt.Libvirt) error {
		return l.DomainShutdownFlags(d.Domain, golibvirt.DomainShutdownAcpiPowerBtn)
	})
	if isInvalid(err) || isNotFound(err) { // it ended just now
		return nil
	}
	return err
}
