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
	"time"

	"golang.org/x/sys/unix"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/providers"
)

// DialNIC connects to the machine's network cable.
func (p *Provider) DialNIC(ctx context.Context, g lab.Generation) (net.Conn, error) {
	c, err := p.dial(ctx, g, socketNIC, func(d definition) error {
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
	c, err := p.dial(ctx, g, socketAgent, func(d definition) error {
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
	conn, err := p.dial(ctx, g, socketConsole, func(definition) error {
		f, free, err := tryLock(filepath.Join(p.cfg.Dirs.Generation(g), fileBusy))
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
	return &consoleConn{Conn: conn, busy: busy}, nil
}

// consoleConn frees the console for the next user when it is closed.
type consoleConn struct {
	net.Conn
	busy *os.File
}

func (c *consoleConn) Close() error {
	err := c.Conn.Close()
	c.busy.Close()
	return err
}

// dialRetry is how often a socket whose queue is full is tried again.
const dialRetry = 5 * time.Millisecond

// dial connects to one of the generation's sockets; check may refuse before.
func (p *Provider) dial(ctx context.Context, g lab.Generation, kind string, check func(definition) error) (net.Conn, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if err := checkGeneration(g); err != nil {
		return nil, err
	}
	dir := p.cfg.Dirs.Generation(g)
	def, ok, err := readDefinition(dir, g)
	if err != nil {
		return nil, err
	}
	if !ok {
		return nil, providers.ErrNotFound
	}
	pid, err := lockHolder(filepath.Join(dir, filePID))
	if err != nil {
		return nil, err
	}
	if pid == 0 {
		return nil, providers.ErrNotRunning
	}
	if err := check(def); err != nil {
		return nil, err
	}
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", p.cfg.Dirs.Socket(g, kind))
	for errors.Is(err, unix.EAGAIN) {
		// QEMU listens again only once it has noticed that the one before hung
		// up; until then there is hardly a queue.
		if err := pause(ctx, dialRetry); err != nil {
			return nil, err
		}
		conn, err = d.DialContext(ctx, "unix", p.cfg.Dirs.Socket(g, kind))
	}
	if err == nil {
		return conn, nil
	}
	if errors.Is(err, unix.ECONNREFUSED) || gone(err) {
		// It ended meanwhile, unless somebody removed the socket.
		if pid, err := lockHolder(filepath.Join(dir, filePID)); err == nil && pid == 0 {
			return nil, providers.ErrNotRunning
		}
	}
	return nil, err
}
