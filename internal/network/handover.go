// SPDX-License-Identifier: Apache-2.0

package network

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync/atomic"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/labfile/lab/internal/lab"
)

// Sentinel errors of a handover. Callers branch with errors.Is.
var (
	// ErrShared says that two machines have the address already.
	ErrShared = errors.New("two machines share the address already")
	// ErrNotStandby says that a port cannot take over: it is not a standby.
	ErrNotStandby = errors.New("not a standby")
)

// seat is a machine's place at its address. It outlives a cable that breaks and is
// plugged in again, and so does what the seat owns.
type seat struct {
	port atomic.Pointer[Port] // nil while the cable is out
	last *Port                // the newest cable; guarded by Switch.mu
	gone bool                 // it was given up; guarded by Switch.mu
}

// PlugStandby connects a second machine at an address, with the same hardware
// address, which does not get what is sent to the address until it is promoted: it
// gets the answers to what it began itself, and what DialPort sends it. ErrShared if
// there are two machines already. Otherwise it is as Plug.
func (s *Switch) PlugStandby(ctx context.Context, name lab.Name, addr netip.Addr, conn net.Conn) (*Port, error) {
	return s.plug(ctx, name, addr, conn, func(p *Port) error {
		if s.shared[p.host].Load() != nil {
			return ErrShared
		}
		p.seat = &seat{last: p}
		p.seat.port.Store(p)
		s.shared[p.host].Store(newShared(p.addr, s.seats[p.host], p.seat))
		return nil
	})
}

// Replug connects the machine's cable again after it broke. The machine stays what it
// is at its address (present, standby or draining) and keeps its flows.
// ErrUnplugged if it was unplugged, ErrReplaced if another machine took its place.
func (p *Port) Replug(ctx context.Context, conn net.Conn) (*Port, error) {
	s := p.sw
	return s.plug(ctx, p.name, p.addr, conn, func(next *Port) error {
		sh := s.shared[p.host].Load()
		switch {
		case p.seat.gone:
			return ErrUnplugged
		case s.seats[p.host] == p.seat:
			s.ports[p.host].Store(next)
		case sh == nil || sh.other != p.seat:
			return ErrReplaced
		}
		next.seat = p.seat
		p.seat.last = next
		if old := p.seat.port.Swap(next); old != nil {
			old.fail(ErrReplaced)
		}
		return nil
	})
}

// Promote makes a standby the machine that is present at its address, in one step.
// The one that was present is draining from then on: it keeps the connections that it
// has, until it is unplugged. Promoting what is present does nothing; anything else
// is ErrNotStandby.
func (p *Port) Promote() error {
	s := p.sw
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.seats[p.host] == p.seat {
		return nil
	}
	sh := s.shared[p.host].Load()
	if sh == nil || !sh.promote(p.seat) {
		return fmt.Errorf("promoting machine %q: %w", p.name, ErrNotStandby)
	}
	if s.seats[p.host] == nil { // nobody is left to drain
		s.shared[p.host].Store(nil)
	}
	s.seats[p.host] = p.seat
	s.ports[p.host].Store(p.seat.port.Load())
	return nil
}

// vacate gives up the machine's seat.
func (p *Port) vacate() {
	s := p.sw
	s.mu.Lock()
	defer s.mu.Unlock()
	if p.seat.last != p {
		return
	}
	p.seat.gone = true
	sh := s.shared[p.host].Load()
	switch {
	case s.seats[p.host] == p.seat:
		s.seats[p.host] = nil
		s.ports[p.host].Store(nil)
		if sh != nil {
			sh.setPresent(nil)
		}
	case sh != nil && sh.other == p.seat:
		s.shared[p.host].Store(nil)
	}
}

// Connections counts the TCP connections that other machines of the lab have to this
// one. They are known only while two machines share the address, and one that was
// silent since then is not. What the gateway has is not among them: its callers know.
func (p *Port) Connections() int {
	if sh := p.sw.shared[p.host].Load(); sh != nil {
		return sh.connections(p.seat, p.sw.net.Gateway.As4())
	}
	return 0
}

// LastActive is when the machine last sent or got a packet that was meant for one
// receiver, DHCP aside. Zero if it never did.
func (p *Port) LastActive() time.Time {
	if t := p.active.Load(); t != 0 {
		return time.Unix(0, t)
	}
	return time.Time{}
}

// touch remembers a packet for LastActive.
func (p *Port) touch() { p.active.Store(time.Now().UnixNano()) }

// deliver queues an inspected frame to one address, or an ARP answer, at the port
// that it is for.
func (s *Switch) deliver(host byte, packet []byte, parts ...[]byte) {
	p := s.ports[host].Load()
	if sh := s.shared[host].Load(); sh != nil {
		if packet == nil { // ARP: both have asked, or are asked
			for _, p := range s.portsOf(host) {
				p.send(parts...)
			}
			return
		}
		p = sh.incoming(packet)
	}
	if p == nil {
		return
	}
	if packet != nil && !isDHCP(packet) {
		p.touch()
	}
	p.send(parts...)
}

// portsOf returns the ports at an address: none, one or two.
func (s *Switch) portsOf(host byte) []*Port {
	var ps []*Port
	if p := s.ports[host].Load(); p != nil {
		ps = append(ps, p)
	}
	if sh := s.shared[host].Load(); sh != nil {
		if p := sh.beside(); p != nil {
			ps = append(ps, p)
		}
	}
	return ps
}

// floodDHCP sends the DHCP server's answer to every machine, but where two share an
// address only to the one that asked.
func (s *Switch) floodDHCP(packet []byte, parts ...[]byte) {
	xid, _ := dhcpXID(packet)
	for i := range s.ports {
		if sh := s.shared[i].Load(); sh != nil {
			if p := sh.asker(xid); p != nil {
				p.send(parts...)
				continue
			}
		}
		for _, p := range s.portsOf(byte(i)) {
			p.send(parts...)
		}
	}
}

// ownerOf returns the port of the machine that has a flow with the gateway's stack.
func (s *Switch) ownerOf(proto uint8, machine, peer netip.AddrPort) *Port {
	host, ok := s.hostOf(machine.Addr())
	if !ok {
		return nil
	}
	sh := s.shared[host].Load()
	if sh == nil {
		return s.ports[host].Load()
	}
	return sh.owner(flowKey{proto: proto, peer: peer.Addr().As4(), peerPort: peer.Port(), ownPort: machine.Port()})
}

// isDHCP reports whether an IPv4 packet is to or from a DHCP server.
func isDHCP(packet []byte) bool {
	ip := header.IPv4(packet)
	if ip.TransportProtocol() != header.UDPProtocolNumber || ip.FragmentOffset() != 0 {
		return false
	}
	udp := header.UDP(packet[ip.HeaderLength():])
	return len(udp) >= header.UDPMinimumSize && (udp.SourcePort() == dhcpServerPort || udp.DestinationPort() == dhcpServerPort)
}

// dhcpXID returns the number that a DHCP request and its answers have in common
// (RFC 2131, figure 1).
func dhcpXID(packet []byte) (xid [4]byte, ok bool) {
	const at = header.UDPMinimumSize + 4
	if !isDHCP(packet) {
		return xid, false
	}
	udp := packet[header.IPv4(packet).HeaderLength():]
	if len(udp) < at+4 {
		return xid, false
	}
	return [4]byte(udp[at : at+4]), true
}
