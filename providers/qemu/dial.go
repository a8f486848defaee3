// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"

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

// Console connects to the serial console. A second user is refused: QEMU would
// let him wait without a word.
func (p *Provider) Console(ctx context.Context, g lab.Generation) (io.ReadWriteCloser, error) {
	c, err := p.console(ctx, g)
	if err != nil {
		return nil, fmt.Errorf("opening the console of machine %q: %w", g, err)
	}
	return c, nil
}

func (p *Provider) console(ctx context.Context, g lab.Generation) (io.ReadWriteCloser, error) {
	var busy *os.File
	conn, err := p.dial(ctx, g, socketConsole, func(local.Definition) error {
		f, free, err := local.TryLock(filepath.Join(p.cfg.Dirs.Generation(g), local.FileBusy))
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
		return nil, err
	}
	return &local.Console{Conn: conn, Busy: busy}, nil
}

// dial connects to one of the generation's sockets; check may refuse before.
func (p *Provider) dial(ctx context.Context, g lab.Generation, kind string, check func(local.Definition) error) (net.Conn, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if err := local.CheckGeneration(g); err != nil {
		return nil, err
	}
	dir := p.cfg.Dirs.Generation(g)
	def, ok, err := local.ReadDefinition(dir, g)
	if err != nil {
		return nil, err
	}
	if !ok {
		return nil, providers.ErrNotFound
	}
	pid, err := lockHolder(filepath.Join(dir, local.FilePID))
	if err != nil {
		return nil, err
	}
	if pid == 0 {
		return nil, providers.ErrNotRunning
	}
	if err := check(def); err != nil {
		return nil, err
	}
	alive := func() bool {
		pid, err := lockHolder(filepath.Join(dir, local.FilePID))
		return err != nil || pid != 0
	}
	path := p.cfg.Dirs.Socket(g, kind)
	var conn net.Conn
	if kind == socketNIC {
		conn, err = local.DialCable(ctx, path, alive)
	} else {
		conn, err = local.Dial(ctx, path)
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
