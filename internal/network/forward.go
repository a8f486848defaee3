// SPDX-License-Identifier: Apache-2.0

package network

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strconv"
	"sync"
	"syscall"
	"time"
)

// PortError says that a port of the host's loopback cannot be listened on.
type PortError struct {
	Port uint16
	UDP  bool  // it is a port of UDP
	Err  error // EADDRINUSE, EACCES, …
}

func (e *PortError) Error() string {
	port := fmt.Sprintf("port %d", e.Port)
	if e.UDP {
		port = "UDP " + port
	}
	switch {
	case errors.Is(e.Err, syscall.EADDRINUSE):
		return port + " of 127.0.0.1 is taken by another program"
	case errors.Is(e.Err, syscall.EACCES):
		return port + " of 127.0.0.1 is reserved for root"
	}
	return fmt.Sprintf("%s of 127.0.0.1 cannot be listened on: %v", port, e.Err)
}

func (e *PortError) Unwrap() error { return e.Err }

// Hint is the next step for a user.
func (e *PortError) Hint() string {
	if errors.Is(e.Err, syscall.EACCES) {
		return "choose a host port from 1024 up, or 0 to have one picked"
	}
	kind := "t"
	if e.UDP {
		kind = "u"
	}
	return fmt.Sprintf("`ss -l%snp sport = :%d` shows which program listens there; or choose another host port, or 0 to have one picked", kind, e.Port)
}

// Free returns a *PortError if a TCP port of the host's loopback, or one of UDP, cannot
// be listened on at this moment.
func Free(ctx context.Context, hostPort uint16, udp bool) error {
	var l io.Closer
	var err error
	if udp {
		l, err = listenUDP(ctx, hostPort)
	} else {
		l, err = listenTCP(ctx, hostPort)
	}
	if err != nil {
		return err
	}
	return l.Close()
}

// listenTCP listens on a port of the host's loopback. An error is a *PortError.
func listenTCP(ctx context.Context, hostPort uint16) (net.Listener, error) {
	ln, err := (&net.ListenConfig{}).Listen(ctx, "tcp4", net.JoinHostPort("127.0.0.1", strconv.Itoa(int(hostPort))))
	if err != nil {
		return nil, &PortError{Port: hostPort, Err: reason(err)}
	}
	return ln, nil
}

// reason is the system's error below err, if there is one.
func reason(err error) error {
	var sys syscall.Errno
	if errors.As(err, &sys) {
		return sys
	}
	return err
}

// Forward makes a guest port reachable on the host's loopback.
type Forward struct {
	port   uint16
	ln     io.Closer   // of the host's port
	udp    *udpForward // nil for TCP
	cancel context.CancelFunc
	wg     sync.WaitGroup
}

// Listen forwards connections to hostPort of 127.0.0.1 through dial, until Stop
// or the end of ctx. Host port 0 picks a free one. A port that cannot be had is
// a *PortError.
func Listen(ctx context.Context, hostPort uint16, dial func(context.Context) (net.Conn, error)) (*Forward, error) {
	ln, err := listenTCP(ctx, hostPort)
	if err != nil {
		return nil, err
	}
	f := &Forward{ln: ln, port: uint16(ln.Addr().(*net.TCPAddr).Port)}
	ctx, f.cancel = context.WithCancel(ctx)
	context.AfterFunc(ctx, func() { ln.Close() })
	f.wg.Go(func() { f.accept(ctx, ln, dial) })
	return f, nil
}

// Forward makes a TCP port of the machine with the address reachable on the
// host's loopback. The end of the switch stops it.
func (s *Switch) Forward(hostPort uint16, addr netip.Addr, guestPort uint16) (*Forward, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ctx.Err() != nil {
		return nil, fmt.Errorf("forwarding to %v: %w", netip.AddrPortFrom(addr, guestPort), ErrClosed)
	}
	f, err := Listen(s.ctx, hostPort, func(ctx context.Context) (net.Conn, error) {
		return s.DialTCP(ctx, addr, guestPort)
	})
	if err == nil {
		s.wg.Go(f.wg.Wait)
	}
	return f, err
}

// ForwardUDP is Forward, for a UDP port.
func (s *Switch) ForwardUDP(hostPort uint16, addr netip.Addr, guestPort uint16) (*Forward, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ctx.Err() != nil {
		return nil, fmt.Errorf("forwarding to %v: %w", netip.AddrPortFrom(addr, guestPort), ErrClosed)
	}
	f, err := ListenUDP(s.ctx, hostPort, func(ctx context.Context) (net.Conn, error) {
		p := s.portAt(addr)
		if p == nil {
			return nil, ErrUnplugged
		}
		return s.DialUDP(ctx, p, guestPort)
	})
	if err == nil {
		s.wg.Go(f.wg.Wait)
	}
	return f, err
}

// HostPort is the port of 127.0.0.1 that is listened on.
func (f *Forward) HostPort() uint16 { return f.port }

// Stop ends the forward and every connection through it. It may be called again.
func (f *Forward) Stop() {
	f.cancel()
	f.wg.Wait()
}

// Retire stops listening. The connections go on until they end or the forward does; flows
// of UDP end.
func (f *Forward) Retire() { _ = f.ln.Close() }

func (f *Forward) accept(ctx context.Context, ln net.Listener, dial func(context.Context) (net.Conn, error)) {
	for {
		c, err := ln.Accept()
		if err != nil {
			if ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
				return
			}
			// Out of descriptors, or a client that went away: both pass.
			select {
			case <-ctx.Done():
				return
			case <-time.After(50 * time.Millisecond):
			}
			continue
		}
		f.wg.Go(func() { serveForward(ctx, c.(*net.TCPConn), dial) })
	}
}

// serveForward connects a client of the host with the guest. A guest that does
// not take the connection is shown to the client as a reset: a clean end would
// look like an empty answer.
func serveForward(ctx context.Context, client *net.TCPConn, dial func(context.Context) (net.Conn, error)) {
	dctx, cancel := context.WithTimeout(ctx, dialTimeout)
	guest, err := dial(dctx)
	cancel()
	if err != nil {
		_ = client.SetLinger(0)
		_ = client.Close()
		return
	}
	stop := context.AfterFunc(ctx, func() {
		for _, c := range []net.Conn{client, guest} {
			_ = c.SetDeadline(past)
		}
	})
	defer stop()
	Pipe(client, guest)
}
