// SPDX-License-Identifier: Apache-2.0

package libvirt

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"time"

	golibvirt "github.com/digitalocean/go-libvirt"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/providers"
	"github.com/labfile/lab/providers/local"
)

// DialNIC connects to the machine's network cable.
func (r *Remote) DialNIC(ctx context.Context, g lab.Generation) (net.Conn, error) {
	c, err := r.dialNIC(ctx, g)
	if err != nil {
		return nil, fmt.Errorf("plugging in machine %q: %w", g, err)
	}
	return c, nil
}

// dialNIC opens the channel of the cable until it is the cable that answers: QEMU makes
// that socket in a thread of its own, after it has said that it runs. Until then it is
// the channel's.
func (r *Remote) dialNIC(ctx context.Context, g lab.Generation) (net.Conn, error) {
	for until := time.Now().Add(local.CableTime); ; {
		c, err := r.channel(ctx, g, cablePort, hasNIC)
		if err != nil {
			return nil, err
		}
		is, err := r.isCable(ctx, g)
		if is {
			return c, nil
		}
		c.Close()
		switch {
		case err != nil:
			return nil, err
		case time.Now().After(until):
			return nil, fmt.Errorf("QEMU did not listen for its cable within %s", local.CableTime)
		}
		if err := pause(ctx, mergeTick); err != nil {
			return nil, err
		}
	}
}

// isCable reports whether it is not the channel that took the connection which was just
// made to the socket of both.
func (r *Remote) isCable(ctx context.Context, g lab.Generation) (bool, error) {
	d, err := r.p.running(ctx, g)
	if err != nil {
		return false, err
	}
	files, err := r.pool(ctx)
	if err != nil {
		return false, err
	}
	path := r.cable(g, files)
	var is bool
	for range 2 { // the first answer may be of before the connection was accepted
		text, err := answer(ctx, r.p.link, func(l *golibvirt.Libvirt) (string, error) {
			return l.QEMUDomainMonitorCommand(d.Domain, `{"execute": "query-chardev"}`, 0)
		})
		if err != nil {
			return false, r.p.ended(ctx, d, err)
		}
		if is, err = unused(text, path); err != nil {
			return false, err
		}
	}
	return is, nil
}

// unused reads QEMU's list of its character devices (QMP reference, query-chardev):
// whether that with the socket at path has no connection.
func unused(list, path string) (bool, error) {
	var said struct {
		Return []struct {
			Filename string `json:"filename"`
		} `json:"return"`
	}
	if err := json.Unmarshal([]byte(list), &said); err != nil {
		return false, fmt.Errorf("reading what QEMU says of its sockets: %w", err)
	}
	for _, dev := range said.Return {
		if strings.Contains(dev.Filename, "unix:"+path+",") {
			return strings.HasPrefix(dev.Filename, "disconnected:"), nil
		}
	}
	return false, fmt.Errorf("QEMU has no socket at %s", path)
}

// DialAgent connects to the agent's virtio-serial port.
func (r *Remote) DialAgent(ctx context.Context, g lab.Generation) (net.Conn, error) {
	c, err := r.channel(ctx, g, providers.AgentPort, hasAgent)
	if err != nil {
		return nil, fmt.Errorf("dialing the agent of machine %q: %w", g, err)
	}
	return c, nil
}

// channel opens one of the domain's channels. Who had it open before loses it.
func (r *Remote) channel(ctx context.Context, g lab.Generation, name string, check func(local.Definition) error) (net.Conn, error) {
	d, err := r.p.runningWith(ctx, g, check)
	if err != nil {
		return nil, err
	}
	c, err := r.p.link.stream(ctx, procOpenChannel, func(l *golibvirt.Libvirt, in io.Writer) error {
		return l.DomainOpenChannel(d.Domain, golibvirt.OptString{name}, in, golibvirt.DomainChannelForce)
	})
	if err != nil {
		return nil, r.p.ended(ctx, d, err)
	}
	return c, nil
}

// Console connects to the serial console.
func (r *Remote) Console(ctx context.Context, g lab.Generation) (io.ReadWriteCloser, error) {
	return r.p.Console(ctx, g)
}

// OpenLog opens a log of the present or last run: the console's, which libvirt writes to
// a volume of the pool. What QEMU printed stays on the other host.
func (r *Remote) OpenLog(ctx context.Context, g lab.Generation, l providers.Log) (io.ReadCloser, error) {
	log, err := r.openLog(ctx, g, l)
	if err != nil {
		return nil, fmt.Errorf("opening the %s log of machine %q: %w", l, g, err)
	}
	return log, nil
}

func (r *Remote) openLog(ctx context.Context, g lab.Generation, l providers.Log) (io.ReadCloser, error) {
	if err := r.p.enter(ctx, g); err != nil {
		return nil, err
	}
	if l != providers.LogConsole && l != providers.LogHypervisor {
		return nil, errors.New("there is no such log")
	}
	d, ok, err := r.p.find(ctx, g)
	if err != nil {
		return nil, err
	}
	if !ok && !exists(r.p.dir(g)) {
		return nil, providers.ErrNotFound
	}
	if l == providers.LogHypervisor {
		name := domainName(g)
		if ok {
			name = d.Name
		}
		return nil, &errFar{r.p.addr, name}
	}
	files, err := r.pool(ctx)
	if err != nil {
		return nil, err
	}
	return &logReader{files: files, name: r.prefix(g) + volumeLog}, nil
}

// errFar is of the log that libvirt writes about a domain of another host.
type errFar struct {
	at     address
	domain string
}

func (e *errFar) Error() string { return "libvirt keeps it on the machine's host, " + e.at.host }

// Hint is the next step.
func (e *errFar) Hint() string {
	if e.at.session {
		return fmt.Sprintf("look there at ~/.cache/libvirt/qemu/log/%s.log", e.domain)
	}
	return fmt.Sprintf("look there at /var/log/libvirt/qemu/%s.log, as root", e.domain)
}

// Unwrap returns providers.ErrIncapable.
func (e *errFar) Unwrap() error { return providers.ErrIncapable }

// logReader reads a volume that grows, and that may be replaced by one that is shorter.
type logReader struct {
	files  *pool
	name   string
	at     int64
	ahead  []byte
	closed bool
}

func (r *logReader) Read(b []byte) (int, error) {
	if r.closed {
		return 0, os.ErrClosed
	}
	if len(r.ahead) == 0 {
		if err := r.fetch(); err != nil {
			return 0, err
		}
	}
	if len(r.ahead) == 0 && len(b) > 0 {
		return 0, io.EOF
	}
	n := copy(b, r.ahead)
	r.ahead = r.ahead[n:]
	return n, nil
}

func (r *logReader) fetch() error {
	ctx, cancel := context.WithTimeout(context.Background(), monitorTimeout)
	defer cancel()
	length, _, err := r.files.size(ctx, r.name)
	switch {
	case isNotFound(err):
		return nil
	case err != nil:
		return err
	case length < r.at:
		r.at = 0
	case length == r.at:
		return nil
	}
	r.ahead, err = r.files.tail(ctx, r.name, r.at)
	r.at += int64(len(r.ahead))
	if isNotFound(err) {
		err = nil
	}
	return err
}

func (r *logReader) Close() error {
	r.closed = true
	return nil
}
