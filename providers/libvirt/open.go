// SPDX-License-Identifier: Apache-2.0

package libvirt

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/providers"
	"github.com/labfile/lab/providers/local"
)

// DialNIC connects to the machine's network cable.
func (p *Provider) DialNIC(ctx context.Context, g lab.Generation) (net.Conn, error) {
	c, err := p.dial(ctx, g, socketNIC, func(d local.Definition) error {
		if d.MAC == "" {
			return errors.New("it has no network card")
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("plugging in machine %q: %w", g, err)
	}
	return c, nil
}

// DialAgent connects to the agent's virtio-serial port.
func (p *Provider) DialAgent(ctx context.Context, g lab.Generation) (net.Conn, error) {
	c, err := p.dial(ctx, g, socketAgent, func(d local.Definition) error {
		if !d.Agent {
			return errors.New("it has no port for the agent")
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("dialing the agent of machine %q: %w", g, err)
	}
	return c, nil
}

// Console connects to the serial console. A second user of lab is refused; virsh
// console finds it taken, too, and waits.
func (p *Provider) Console(ctx context.Context, g lab.Generation) (io.ReadWriteCloser, error) {
	var busy *os.File
	conn, err := p.dial(ctx, g, socketConsole, func(local.Definition) error {
		f, free, err := local.TryLock(filepath.Join(p.dir(g), local.FileBusy))
		if err == nil && !free {
			err = errors.New("somebody else is using it")
		}
		busy = f
		return err
	})
	if err != nil {
		if busy != nil {
			busy.Close()
		}
		return nil, fmt.Errorf("opening the console of machine %q: %w", g, err)
	}
	return &local.Console{Conn: conn, Busy: busy}, nil
}

// dial connects to one of the generation's sockets; check may refuse before.
func (p *Provider) dial(ctx context.Context, g lab.Generation, kind string, check func(local.Definition) error) (net.Conn, error) {
	if err := p.enter(ctx, g); err != nil {
		return nil, err
	}
	d, ok, err := p.find(ctx, g)
	if err != nil {
		return nil, err
	}
	if !ok {
		return nil, providers.ErrNotFound
	}
	s, _, err := p.state(ctx, d)
	if err != nil {
		return nil, err
	}
	if !p.lives(s) {
		return nil, providers.ErrNotRunning
	}
	def, err := d.definition()
	if err != nil {
		return nil, err
	}
	if err := check(def); err != nil {
		return nil, err
	}
	conn, err := local.Dial(ctx, p.socket(g, kind))
	if err == nil {
		return conn, nil
	}
	if errors.Is(err, unix.ECONNREFUSED) || local.Gone(err) {
		// It ended meanwhile, unless somebody removed the socket.
		if findQEMU(p.dir(g)) == 0 {
			return nil, providers.ErrNotRunning
		}
	}
	return nil, err
}
