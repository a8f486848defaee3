// SPDX-License-Identifier: Apache-2.0

package libvirt

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"sync"
	"time"

	golibvirt "github.com/digitalocean/go-libvirt"

	"github.com/labfile/lab/providers/local"
)

// How long the daemon may be silent. It answers in milliseconds; on a busy host,
// or while it looks at its hypervisors for the first time, in a few seconds.
const (
	quietTime = 2 * time.Second  // after which a daemon that owes an answer is asked whether it lives
	hungTime  = 8 * time.Second  // after which one that says nothing to that is hung
	bootTime  = 30 * time.Second // for one that was started just now

	restTime = time.Second // how long a daemon that did not answer is not asked again by whoever wants to connect
)

// link keeps the one connection of this process to a daemon. go-libvirt's calls
// take no context and wait for ever, so each runs beside a watch: it gives up with
// its context, or with the connection once the daemon is dead or deaf.
type link struct {
	addr address
	env  func(string) string
	log  *slog.Logger

	quiet, hung, rest time.Duration // quietTime, hungTime and restTime, but for tests

	dialing sync.Mutex // one at a time makes the connection
	mu      sync.Mutex // guards what follows
	now     *conn
	silent  silence
}

// silence remembers that nobody answered. A command asks several things in a row, and for
// several machines at once, and is not to wait for each of them.
type silence struct {
	err error
	at  time.Time
}

// conn is a connection to the daemon.
type conn struct {
	*golibvirt.Libvirt
	wire *wire

	watching sync.Once
	watchErr error
	mu       sync.Mutex // guards what follows
	ears     map[chan golibvirt.UUID]bool
	models   []string // as confinement tells them; nil until it was asked
}

// dialed is a socket.Dialer for a connection that is there already.
type dialed struct{ conn net.Conn }

func (d dialed) Dial() (net.Conn, error) { return d.conn, nil }

// alive reports whether the connection stands as far as this side knows.
func (c *conn) alive() bool {
	select {
	case <-c.wire.gone:
		return false
	default:
		return true
	}
}

// connect returns the connection, making it if there is none. A session's daemon is
// started if need be and wake allows it.
func (k *link) connect(ctx context.Context, wake bool) (*conn, error) {
	if c := k.current(); c != nil {
		return c, nil
	}
	k.dialing.Lock()
	defer k.dialing.Unlock()
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if c := k.current(); c != nil {
		return c, nil
	}
	if err := k.silence(); err != nil {
		return nil, err
	}
	c, err := k.open(ctx, wake, nil)
	var lost *errLost
	for until := time.Now().Add(k.quiet); errors.As(err, &lost) && time.Now().Before(until); {
		// The daemon was about to end: perhaps the next one is there, or can be started.
		if err := pause(ctx, retry); err != nil {
			return nil, err
		}
		c, err = k.open(ctx, wake, nil)
	}
	if err != nil {
		return nil, err
	}
	k.mu.Lock()
	k.now = c
	k.mu.Unlock()
	return c, nil
}

// silence returns the error of whoever waited in vain just now; nil for nobody.
func (k *link) silence() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if time.Since(k.silent.at) < k.rest {
		return k.silent.err
	}
	return nil
}

// remember has silence return err for a while, if it is of somebody who was waited for in
// vain: by this side or, as ssh does it, by who is in between.
func (k *link) remember(err error, waited time.Duration) {
	var hung *errHung
	var absent *errAbsent
	if errors.As(err, &hung) || errors.As(err, &absent) && waited >= k.quiet {
		k.mu.Lock()
		k.silent = silence{err, time.Now()}
		k.mu.Unlock()
	}
}

func (k *link) current() *conn {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.now != nil && k.now.alive() {
		return k.now
	}
	return nil
}

// open makes a connection of its own. The transport goes through around, if that is not
// nil, before anything is said on it.
func (k *link) open(ctx context.Context, wake bool, around func(net.Conn) net.Conn) (_ *conn, err error) {
	began := time.Now()
	defer func() {
		if ctx.Err() == nil {
			k.remember(err, time.Since(began))
		}
	}()
	limit := k.hung
	if k.addr.transport == viaSSH {
		limit *= 2 // it logs in first
	}
	raw, started, err := k.dial(ctx, wake)
	if err != nil {
		return nil, err
	}
	ssh, _ := raw.(*pipe)
	if around != nil {
		raw = around(raw)
	}
	if started {
		limit = max(limit, bootTime)
	}
	w := newWire(raw)
	c := &conn{Libvirt: golibvirt.NewWithDialer(dialed{w}), wire: w, ears: map[chan golibvirt.UUID]bool{}}
	done := make(chan error, 1)
	go func() {
		err := c.ConnectToURI(golibvirt.ConnectURI(k.addr.driver()))
		if err == nil {
			// A question, so that go-libvirt's goroutines have met before anybody hangs up.
			_, err = c.ConnectGetLibVersion()
		}
		done <- err
	}()
	t := time.NewTimer(limit)
	defer t.Stop()
	select {
	case err = <-done:
		if broken(err) {
			err = k.unmet(w)
		}
	case <-w.gone:
		err = k.unmet(w)
	case <-ctx.Done():
		err = ctx.Err()
	case <-t.C:
		hung := &errHung{where: k.where(), limit: limit}
		if ssh != nil {
			hung.ssh, hung.said = k.addr.sshTry(), ssh.said.String()
		}
		err = hung
	}
	if isRefused(err) {
		err = &errRefused{k.where(), err, k.cure(os.ErrPermission)}
	}
	if err != nil {
		raw.Close()
		return nil, err
	}
	return c, nil
}

// unmet is the error of a connection that ended before anything was said on it. One of
// this host was to a daemon that was ending; another has an ssh, or somebody else, in
// between, who may have said why.
func (k *link) unmet(w *wire) error {
	if k.addr.transport == viaUnix {
		return &errLost{k.where()}
	}
	err := errors.New("the connection was closed at once")
	select {
	case <-w.gone:
		if w.end != nil && !errors.Is(w.end, net.ErrClosed) && w.end != io.EOF {
			err = w.end
		}
	case <-time.After(retry):
	}
	cure := ""
	if k.addr.transport == viaSSH {
		cure = fmt.Sprintf("%q must work, ask nothing and print nothing; and libvirt must be installed there", k.addr.sshTry())
	}
	return &errAbsent{where: k.addr.uri, err: err, cure: cure}
}

// where names the daemon in errors.
func (k *link) where() string {
	if k.addr.transport != viaUnix {
		return k.addr.uri
	}
	paths := k.addr.sockets(k.runtime())
	for _, path := range paths {
		if exists(path) {
			return path
		}
	}
	return paths[len(paths)-1]
}

// do has the daemon carry something out. If the connection is lost meanwhile, nobody
// knows whether it did.
func (k *link) do(ctx context.Context, f func(*golibvirt.Libvirt) error) error {
	c, err := k.connect(ctx, true)
	if err != nil {
		return err
	}
	return k.on(ctx, c, f)
}

// ask puts a question, once more if the connection was lost under it.
func (k *link) ask(ctx context.Context, f func(*golibvirt.Libvirt) error) error {
	err := k.do(ctx, f)
	var lost *errLost
	if errors.As(err, &lost) && ctx.Err() == nil {
		err = k.do(ctx, f)
	}
	return err
}

// answer puts a question as ask does. An answer that comes when nobody waits for it any
// more is dropped.
func answer[T any](ctx context.Context, k *link, question func(*golibvirt.Libvirt) (T, error)) (T, error) {
	var none T
	got := make(chan T, 2) // ask may ask twice; the first answer to arrive is as good as the other
	err := k.ask(ctx, func(l *golibvirt.Libvirt) error {
		v, err := question(l)
		if err == nil {
			got <- v
		}
		return err
	})
	if err != nil {
		return none, err
	}
	return <-got, nil
}

// on runs f on a connection and gives up when that makes sense; f itself goes on
// until the daemon answers or the connection ends: it writes to nothing that its caller
// reads (see answer).
func (k *link) on(ctx context.Context, c *conn, f func(*golibvirt.Libvirt) error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	done := make(chan error, 1)
	go func() { done <- f(c.Libvirt) }()
	return k.watch(ctx, c, done)
}

// watch waits for what was asked on a connection, as long as that makes sense.
func (k *link) watch(ctx context.Context, c *conn, done <-chan error) error {
	quiet := time.NewTicker(k.quiet)
	defer quiet.Stop()
	moved := c.wire.moved.Load()
	for {
		select {
		case err := <-done:
			if broken(err) {
				return &errLost{k.where()}
			}
			return err
		case <-c.wire.gone:
			return &errLost{k.where()}
		case <-ctx.Done():
			return ctx.Err()
		case <-quiet.C:
			// What was asked may take long, a question on a connection of its own
			// does not, unless the daemon is deaf.
			// That one more connection cannot be had says nothing of this one.
			if now := c.wire.moved.Load(); now != moved {
				moved = now
				continue
			}
			err := k.ping(ctx)
			var hung *errHung
			if errors.As(err, &hung) {
				c.wire.Close() // what waits on it is not left waiting
				return err
			}
			if err != nil {
				k.log.Debug("asking whether libvirt lives", "error", err)
			}
		}
	}
}

// ping finds out whether the daemon answers at all.
func (k *link) ping(ctx context.Context) error {
	c, err := k.open(ctx, false, nil)
	if err != nil {
		return err
	}
	return c.wire.Close()
}

// close ends the connection.
func (k *link) close() {
	if c := k.current(); c != nil {
		c.wire.Close()
	}
}

// listen has every change of a domain's life told to the channel that it returns,
// until stop is called. A full channel misses some: whoever listens looks at the
// domain anyway.
func (k *link) listen(ctx context.Context, c *conn) (news <-chan golibvirt.UUID, stop func(), err error) {
	c.watching.Do(func() {
		c.watchErr = k.on(ctx, c, func(l *golibvirt.Libvirt) error {
			events, err := l.LifecycleEvents(context.Background()) // they end with the connection
			if err == nil {
				go c.tell(events)
			}
			return err
		})
	})
	if c.watchErr != nil {
		c.wire.Close() // the next connection tries again
		return nil, nil, fmt.Errorf("asking libvirt for its events: %w", c.watchErr)
	}
	ear := make(chan golibvirt.UUID, 64)
	c.mu.Lock()
	c.ears[ear] = true
	c.mu.Unlock()
	return ear, func() {
		c.mu.Lock()
		delete(c.ears, ear)
		c.mu.Unlock()
	}, nil
}

func (c *conn) tell(events <-chan golibvirt.DomainEventLifecycleMsg) {
	for e := range events {
		c.mu.Lock()
		for ear := range c.ears {
			select {
			case ear <- e.Dom.UUID:
			default:
			}
		}
		c.mu.Unlock()
	}
}

// runtime is the directory below which session daemons listen (libvirt uses
// glib's notion of it).
func (k *link) runtime() string { return runtimeDir(k.env) }

// retry is how often an absent daemon is looked for.
const retry = 10 * time.Millisecond

func pause(ctx context.Context, d time.Duration) error { return local.Pause(ctx, d) }
