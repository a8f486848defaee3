// SPDX-License-Identifier: Apache-2.0

// Package network is a lab's switch: an Ethernet segment for its machines, with
// a gateway that hands out addresses and names and lets them reach the world,
// all in user space. Guests are hostile: what they send is bounded and checked
// before anything else sees it, and none of them can hold up the others.
//
// The segment's forwarding table never changes: an address decides its hardware
// address (lab.MACOf), so a frame's destination names its port, and a frame that
// claims another sender than its own port is dropped. Two generations of a machine
// may share an address while one hands over to the other (PlugStandby, Promote).
package network

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/labfile/lab/internal/lab"
)

// Sentinel errors. Callers branch with errors.Is.
var (
	// ErrUnplugged says that no machine is plugged at the address, or that a
	// port's cable was pulled by Unplug.
	ErrUnplugged = errors.New("not plugged into the switch")
	// ErrReplaced says that a newer cable was plugged in at the same address.
	ErrReplaced = errors.New("replaced by a newer cable")
	// ErrClosed says that the switch was closed.
	ErrClosed = errors.New("switch closed")
)

// Config is what a switch needs to know.
type Config struct {
	Network lab.Network
	Log     *slog.Logger // nil discards

	// Resolvers returns the name servers that answer for the world outside the
	// lab. Nil means those of the host's /etc/resolv.conf.
	Resolvers func() []netip.AddrPort
}

// Switch is the network of one lab. Its methods may be called by several
// goroutines at once.
type Switch struct {
	net     lab.Network
	log     *slog.Logger
	macs    [256]mac                    // by last byte of the address
	ports   [256]atomic.Pointer[Port]   // those that are present
	shared  [256]atomic.Pointer[shared] // nil but for an address of two machines
	gateway *gateway
	names   atomic.Pointer[nameTable]
	exposed atomic.Pointer[map[uint16][]string] // what guests reach of the host by ports of the gateway

	ctx    context.Context // ends with Close
	cancel context.CancelCauseFunc
	wg     sync.WaitGroup // everything that Close waits for
	mu     sync.Mutex     // orders Plug, Unplug, Promote, Forward and Close
	seats  [256]*seat     // of the machines that are present; guarded by mu

	dial dialFunc // how guests' connections leave the host
}

type mac [6]byte

type dialFunc func(ctx context.Context, network, addr string) (net.Conn, error)

// New starts a switch with nothing plugged in. Close ends it.
func New(cfg Config) (*Switch, error) {
	if !cfg.Network.Subnet.Addr().Is4() || cfg.Network.Subnet.Bits() != 24 || !cfg.Network.Subnet.Contains(cfg.Network.Gateway) {
		return nil, fmt.Errorf("making a switch for %v: not an IPv4 /24 with its gateway inside", cfg.Network.Subnet)
	}
	s := &Switch{net: cfg.Network, log: cfg.Log}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	for i := range s.macs {
		hw, err := net.ParseMAC(lab.MACOf(cfg.Network.Host(byte(i))))
		if err != nil {
			return nil, fmt.Errorf("making a switch: %w", err)
		}
		s.macs[i] = mac(hw)
	}
	s.ctx, s.cancel = context.WithCancelCause(context.Background())
	s.dial = (&net.Dialer{Timeout: dialTimeout}).DialContext
	s.names.Store(&nameTable{})
	s.exposed.Store(new(map[uint16][]string))
	resolvers := cfg.Resolvers
	if resolvers == nil {
		resolvers = new(resolvConf).servers
	}
	g, err := newGateway(s, resolvers)
	if err != nil {
		s.cancel(ErrClosed)
		return nil, fmt.Errorf("making a switch: %w", err)
	}
	s.gateway = g
	return s, nil
}

// Close unplugs every machine, ends every forward, and waits until nothing of
// the switch runs any more.
func (s *Switch) Close() {
	s.mu.Lock()
	s.cancel(ErrClosed) // ports and forwards hang on it
	s.mu.Unlock()
	s.gateway.close()
	s.wg.Wait()
}

// Plug connects the machine called name, which has the address addr, by its
// network cable: a stream of Ethernet frames, each behind its length as 4 bytes,
// big-endian. The switch owns conn from now on, also if Plug fails. A cable that
// is already plugged in at the address is replaced; a standby is not. The end of ctx
// unplugs.
func (s *Switch) Plug(ctx context.Context, name lab.Name, addr netip.Addr, conn net.Conn) (*Port, error) {
	return s.plug(ctx, name, addr, conn, func(p *Port) error {
		p.seat = &seat{last: p}
		p.seat.port.Store(p)
		s.seats[p.host] = p.seat
		if sh := s.shared[p.host].Load(); sh != nil {
			sh.setPresent(p.seat)
		}
		if old := s.ports[p.host].Swap(p); old != nil {
			old.fail(ErrReplaced)
		}
		return nil
	})
}

// plug connects a cable to where take, which is called with the switch locked, puts
// its port.
func (s *Switch) plug(ctx context.Context, name lab.Name, addr netip.Addr, conn net.Conn, take func(*Port) error) (*Port, error) {
	host, ok := s.hostOf(addr)
	if !ok {
		conn.Close()
		return nil, fmt.Errorf("plugging machine %q into the switch: %v is no machine's address in %v", name, addr, s.net.Subnet)
	}
	p := newPort(s, name, addr, host, conn)

	s.mu.Lock()
	defer s.mu.Unlock()
	err := error(ErrClosed)
	if s.ctx.Err() == nil {
		err = take(p)
	}
	if err != nil {
		p.cancel(err)
		conn.Close()
		return nil, fmt.Errorf("plugging machine %q into the switch: %w", name, err)
	}
	p.start(ctx)
	return p, nil
}

// hostOf returns the last byte of a machine's address.
func (s *Switch) hostOf(addr netip.Addr) (byte, bool) {
	if !addr.Is4() || !s.net.Subnet.Contains(addr) || addr == s.net.Gateway {
		return 0, false
	}
	host := addr.As4()[3]
	return host, host != 0 && host != 255
}

// portAt returns the port of the machine with the address, or nil.
func (s *Switch) portAt(addr netip.Addr) *Port {
	if host, ok := s.hostOf(addr); ok {
		return s.ports[host].Load()
	}
	return nil
}

// DialTCP connects to a TCP port of the machine with the address, from the
// gateway's. It returns when the guest answers or ctx ends, whatever the guest
// does. The connection ends when the machine is unplugged.
func (s *Switch) DialTCP(ctx context.Context, addr netip.Addr, port uint16) (net.Conn, error) {
	p := s.portAt(addr)
	if p == nil {
		return nil, fmt.Errorf("dialing %v: %w", netip.AddrPortFrom(addr, port), ErrUnplugged)
	}
	return s.DialPort(ctx, p, port)
}

// DialPort is DialTCP to the machine that is plugged in at p, whether it is present,
// a standby or draining.
func (s *Switch) DialPort(ctx context.Context, p *Port, port uint16) (net.Conn, error) {
	target := netip.AddrPortFrom(p.addr, port)
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(p.ctx, func() { cancel(context.Cause(p.ctx)) })()
	c, err := s.gateway.dialTCP(ctx, p, target)
	if err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return nil, fmt.Errorf("dialing %v: %w", target, err)
	}
	p.touch()
	return p.tie(c), nil
}

// fromPort forwards a frame that passed inspection. The frame is the caller's
// again afterwards.
func (s *Switch) fromPort(p *Port, frame []byte) {
	dst := mac(frame[:6])
	var packet []byte // nil if it is ARP
	if header.Ethernet(frame).Type() == header.IPv4ProtocolNumber {
		packet = frame[header.EthernetMinimumSize:]
		if sh := s.shared[p.host].Load(); sh != nil && !sh.outgoing(p.seat, packet) {
			p.refuse(refusedFlow)
			return
		}
	}
	if dst[0]&1 == 1 { // broadcast or multicast
		s.flood(p, frame)
		s.gateway.receive(p, frame)
		return
	}
	if packet != nil && !isDHCP(packet) {
		p.touch()
	}
	switch {
	case dst != s.macs[dst[5]]: // nobody's: there is no port to learn it from
	case dst == s.gateway.mac:
		s.gateway.receive(p, frame)
	case dst[5] != p.host:
		s.deliver(dst[5], packet, frame)
	}
}

// flood sends a machine's frame to every other address.
func (s *Switch) flood(from *Port, frame []byte) {
	for i := range s.ports {
		if byte(i) == from.host {
			continue
		}
		for _, p := range s.portsOf(byte(i)) {
			p.send(frame)
		}
	}
}

// dialTimeout bounds how long a guest's connection to the outside may take to
// be set up.
const dialTimeout = 15 * time.Second
