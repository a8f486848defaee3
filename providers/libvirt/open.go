// SPDX-License-Identifier: Apache-2.0

package libvirt

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"time"

	golibvirt "github.com/digitalocean/go-libvirt"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/providers"
	"github.com/labfile/lab/providers/local"
)

// DialNIC connects to the machine's network cable.
func (p *Provider) DialNIC(ctx context.Context, g lab.Generation) (net.Conn, error) {
	c, err := p.dial(ctx, g, socketNIC, hasNIC)
	if err != nil {
		return nil, fmt.Errorf("plugging in machine %q: %w", g, err)
	}
	return c, nil
}

func hasNIC(d local.Definition) error {
	if d.MAC == "" {
		return errors.New("it has no network card")
	}
	return nil
}

func hasAgent(d local.Definition) error {
	if !d.Agent {
		return errors.New("it has no port for the agent")
	}
	return nil
}

// DialAgent connects to the agent's virtio-serial port.
func (p *Provider) DialAgent(ctx context.Context, g lab.Generation) (net.Conn, error) {
	c, err := p.dial(ctx, g, socketAgent, hasAgent)
	if err != nil {
		return nil, fmt.Errorf("dialing the agent of machine %q: %w", g, err)
	}
	return c, nil
}

// Console connects to the serial console, as virsh console does: whoever comes second is
// refused.
func (p *Provider) Console(ctx context.Context, g lab.Generation) (io.ReadWriteCloser, error) {
	c, err := p.console(ctx, g)
	if err != nil {
		return nil, fmt.Errorf("opening the console of machine %q: %w", g, err)
	}
	return c, nil
}

func (p *Provider) console(ctx context.Context, g lab.Generation) (io.ReadWriteCloser, error) {
	d, err := p.running(ctx, g)
	if err != nil {
		return nil, err
	}
	busy, free, err := local.TryLock(filepath.Join(p.dir(g), local.FileBusy))
	if err != nil {
		return nil, err
	}
	if !free {
		return nil, errors.New("somebody else is using it")
	}
	c, err := p.link.stream(ctx, procOpenConsole, func(l *golibvirt.Libvirt, in io.Writer) error {
		return l.DomainOpenConsole(d.Domain, nil, in, uint32(golibvirt.DomainConsoleSafe))
	})
	if err != nil {
		busy.Close()
		return nil, p.ended(ctx, d, err)
	}
	return &local.Console{Conn: &terminal{stream: c, opened: time.Now()}, Busy: busy}, nil
}

// running finds the generation's domain, which must run.
func (p *Provider) running(ctx context.Context, g lab.Generation) (domain, error) {
	if err := p.enter(ctx, g); err != nil {
		return domain{}, err
	}
	d, ok, err := p.find(ctx, g)
	if err != nil {
		return d, err
	}
	if !ok {
		return d, providers.ErrNotFound
	}
	s, _, err := p.state(ctx, d)
	if err == nil && !p.lives(s) {
		err = providers.ErrNotRunning
	}
	return d, err
}

// runningWith is running, of a machine whose definition check does not refuse.
func (p *Provider) runningWith(ctx context.Context, g lab.Generation, check func(local.Definition) error) (domain, error) {
	d, err := p.running(ctx, g)
	if err != nil {
		return d, err
	}
	def, err := d.definition()
	if err != nil {
		return d, err
	}
	return d, check(def)
}

// ended makes a refusal by a domain that has ended meanwhile an ErrNotRunning.
func (p *Provider) ended(ctx context.Context, d domain, err error) error {
	if _, refused := code(err); !refused {
		return err
	}
	if s, _, e := p.state(ctx, d); e == nil && !p.lives(s) {
		return providers.ErrNotRunning
	}
	return fmt.Errorf("libvirt says: %w", err)
}

// dial connects to one of the generation's sockets; check may refuse before.
func (p *Provider) dial(ctx context.Context, g lab.Generation, kind string, check func(local.Definition) error) (net.Conn, error) {
	if _, err := p.runningWith(ctx, g, check); err != nil {
		return nil, err
	}
	alive := func() bool { return findQEMU(p.dir(g)) != 0 }
	var conn net.Conn
	var err error
	if kind == socketNIC {
		conn, err = local.DialCable(ctx, p.socket(g, kind), alive)
	} else {
		conn, err = local.Dial(ctx, p.socket(g, kind))
	}
	if err == nil {
		return conn, nil
	}
	// It ended meanwhile, unless somebody removed the socket.
	if local.NotListening(err) && !alive() {
		return nil, providers.ErrNotRunning
	}
	return nil, err
}
