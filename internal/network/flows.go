// SPDX-License-Identifier: Apache-2.0

package network

import (
	"container/list"
	"sync"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
)

const (
	// maxShared bounds the flows that are known of one address, for each party that
	// begins them. Whoever begins more loses its own oldest.
	maxShared = 4096

	// maxFragments bounds the fragmented packets whose owner is known, and maxAsks
	// the DHCP requests.
	maxFragments = 256
	maxAsks      = 64

	// sharedIdle is how long a UDP or ICMP flow is known without a packet, as long as
	// the gateway's own; closedIdle a TCP connection after its end, for what is sent
	// again (RFC 9293, TIME-WAIT).
	sharedIdle = udpIdle
	closedIdle = time.Minute
)

// shared says which of the two machines that share an address gets what. It exists
// only while there are two.
type shared struct {
	addr  [4]byte
	other *seat // the standby, or after the takeover the old one; guarded by Switch.mu, constant but for promote

	mu      sync.Mutex
	present *seat // nil if its machine is unplugged
	second  *seat // same as other
	taken   bool  // the takeover is over: second is the old one
	flows   map[flowKey]*flow
	parties map[party]*list.List // the entries that each is to blame for, latest used first
	frags   ring[fragKey]
	asks    ring[[4]byte] // DHCP, by transaction
}

// flowKey names a flow of the address. An ICMP echo has its identifier as ownPort.
type flowKey struct {
	proto             uint8
	peer              [4]byte
	peerPort, ownPort uint16
}

// party is who is to blame for an entry of the table: one of the two machines, or a
// neighbour that talks to them.
type party struct {
	seat *seat
	peer [4]byte // if seat is nil
}

// flow is one entry of the table.
type flow struct {
	key              flowKey
	owner            *seat
	by               party // whose bound it counts for
	inbound          bool  // a peer began it, as far as is known
	elem             *list.Element
	used             time.Time
	finOwn, finPeer  bool
	closed, answered bool // answered: the machine has said something, too
}

// fragKey names a fragmented packet.
type fragKey struct {
	proto    uint8
	src, dst [4]byte
	id       uint16
}

func newShared(addr interface{ As4() [4]byte }, present, standby *seat) *shared {
	return &shared{
		addr: addr.As4(), other: standby, present: present, second: standby,
		flows: make(map[flowKey]*flow), parties: make(map[party]*list.List),
		frags: ring[fragKey]{max: maxFragments}, asks: ring[[4]byte]{max: maxAsks},
	}
}

// promote swaps the two. It reports false if st is no standby.
func (sh *shared) promote(st *seat) bool {
	sh.mu.Lock()
	defer sh.mu.Unlock()
	if sh.taken || sh.second != st {
		return false
	}
	sh.present, sh.second, sh.taken = sh.second, sh.present, true
	sh.other = sh.second
	return true
}

// setPresent puts another machine, or none, into the place of the present one, whose
// flows end with it.
func (sh *shared) setPresent(st *seat) {
	sh.mu.Lock()
	defer sh.mu.Unlock()
	for _, f := range sh.flows {
		if f.owner == sh.present {
			sh.forget(f)
		}
	}
	sh.present = st
}

// beside returns the port of the machine that is not the present one.
func (sh *shared) beside() *Port {
	sh.mu.Lock()
	defer sh.mu.Unlock()
	return sh.second.cable()
}

func (st *seat) cable() *Port {
	if st == nil {
		return nil
	}
	return st.port.Load()
}

// unknown returns who gets a packet of a flow that is not known. What goes on without
// having begun is from before there was a table: the old one's.
func (sh *shared) unknown(pk *packet) *seat {
	if sh.taken && pk.proto == protoTCP && !pk.begins() {
		return sh.second
	}
	return sh.present
}

// incoming decides which port gets a packet to the address, nil if none.
func (sh *shared) incoming(b []byte) *Port {
	pk := parsePacket(b)
	sh.mu.Lock()
	defer sh.mu.Unlock()
	if pk.kind == kindFragment {
		if st, ok := sh.frags.get(pk.frag); ok {
			return st.cable()
		}
		return sh.present.cable()
	}
	st := sh.present
	if pk.kind == kindFlow {
		key := flowKey{proto: pk.proto, peer: pk.src, peerPort: pk.srcPort, ownPort: pk.dstPort}
		f := sh.flows[key]
		switch {
		case f != nil && pk.quoted: // an error about the flow
			st = f.owner
		case pk.quoted:
			st = sh.unknown(&pk)
		case f == nil || f.stale() || f.closed && pk.begins():
			st = sh.unknown(&pk)
			if st == nil {
				return nil
			}
			by := party{peer: pk.src}
			if [3]byte(pk.src[:3]) != [3]byte(sh.addr[:3]) {
				by = party{seat: st} // the world outside only answers
			}
			f = sh.learn(key, st, by)
			// From before: whoever called had the higher port, most likely.
			f.inbound = by.seat == nil && (pk.begins() || pk.srcPort > pk.dstPort)
			sh.follow(f, &pk, false)
		default:
			st = f.owner
			sh.follow(f, &pk, false)
		}
	}
	if pk.more {
		sh.frags.put(pk.frag, st)
	}
	return st.cable()
}

// outgoing notes a packet from one of the machines. It reports false if the packet
// belongs to a connection of the other one, and must not leave.
func (sh *shared) outgoing(st *seat, b []byte) bool {
	if xid, ok := dhcpXID(b); ok {
		sh.mu.Lock()
		sh.asks.put(xid, st)
		sh.mu.Unlock()
	}
	pk := parsePacket(b)
	if pk.kind != kindFlow || pk.quoted || pk.src != sh.addr {
		return true
	}
	sh.mu.Lock()
	defer sh.mu.Unlock()
	key := flowKey{proto: pk.proto, peer: pk.dst, peerPort: pk.dstPort, ownPort: pk.srcPort}
	f := sh.flows[key]
	switch {
	case f == nil || f.stale() || f.closed && pk.begins():
		if pk.proto == protoTCP && !pk.begins() && !sh.taken && st != sh.present {
			return true // a standby has no connections from before
		}
		f = sh.learn(key, st, party{seat: st})
		f.inbound = pk.proto == protoTCP && !pk.begins() && pk.srcPort < pk.dstPort
	case f.owner != st && pk.proto == protoTCP:
		return false
	case f.owner != st && !f.inbound: // both ask from the same port: who asked last is answered
		f = sh.learn(key, st, party{seat: st})
	}
	if f.owner == st {
		sh.follow(f, &pk, true)
	}
	return true
}

// owner returns the port that owns a flow.
func (sh *shared) owner(key flowKey) *Port {
	sh.mu.Lock()
	defer sh.mu.Unlock()
	if f := sh.flows[key]; f != nil {
		return f.owner.cable()
	}
	return sh.present.cable()
}

// asker returns the port that made a DHCP request.
func (sh *shared) asker(xid [4]byte) *Port {
	sh.mu.Lock()
	defer sh.mu.Unlock()
	st, _ := sh.asks.get(xid)
	return st.cable()
}

// claim makes a flow a machine's before its first packet. It reports false if the
// machine is no longer at the address.
func (sh *shared) claim(key flowKey, st *seat) bool {
	sh.mu.Lock()
	defer sh.mu.Unlock()
	if st != sh.present && st != sh.second {
		return false
	}
	sh.learn(key, st, party{peer: key.peer}).inbound = true
	return true
}

// connections counts the open TCP connections that others than except have to a
// machine.
func (sh *shared) connections(st *seat, except [4]byte) int {
	sh.mu.Lock()
	defer sh.mu.Unlock()
	n := 0
	for key, f := range sh.flows {
		if key.proto == protoTCP && f.owner == st && f.inbound && f.answered && !f.closed && key.peer != except {
			n++
		}
	}
	return n
}

// learn puts a flow into the table, in the place of one with the same key. Called with
// sh.mu held, as the methods below.
func (sh *shared) learn(key flowKey, owner *seat, by party) *flow {
	if old := sh.flows[key]; old != nil {
		sh.forget(old)
	}
	l := sh.parties[by]
	if l == nil {
		l = list.New()
		sh.parties[by] = l
	}
	if l.Len() >= maxShared {
		sh.forget(l.Back().Value.(*flow))
		sh.parties[by] = l // forget may have dropped it
	}
	f := &flow{key: key, owner: owner, by: by, used: time.Now()}
	f.elem = l.PushFront(f)
	sh.flows[key] = f
	return f
}

func (sh *shared) forget(f *flow) {
	delete(sh.flows, f.key)
	l := sh.parties[f.by]
	l.Remove(f.elem)
	if l.Len() == 0 {
		delete(sh.parties, f.by)
	}
}

// follow notes what a packet means for its flow.
func (sh *shared) follow(f *flow, pk *packet, own bool) {
	f.used = time.Now()
	sh.parties[f.by].MoveToFront(f.elem)
	f.answered = f.answered || own
	if pk.fin {
		f.finOwn, f.finPeer = f.finOwn || own, f.finPeer || !own
	}
	f.closed = f.closed || pk.rst || f.finOwn && f.finPeer
}

// stale reports whether a flow counts as forgotten.
func (f *flow) stale() bool {
	switch idle := time.Since(f.used); {
	case f.key.proto != protoTCP:
		return idle > sharedIdle
	default:
		return f.closed && idle > closedIdle
	}
}

// ring remembers whose the latest keys are.
type ring[K comparable] struct {
	max   int
	order []K
	next  int
	seats map[K]*seat
}

func (r *ring[K]) get(k K) (*seat, bool) {
	st, ok := r.seats[k]
	return st, ok
}

func (r *ring[K]) put(k K, st *seat) {
	if r.seats == nil {
		r.seats = make(map[K]*seat, r.max)
	}
	if _, known := r.seats[k]; !known {
		if len(r.order) < r.max {
			r.order = append(r.order, k)
		} else {
			delete(r.seats, r.order[r.next])
			r.order[r.next] = k
			r.next = (r.next + 1) % r.max
		}
	}
	r.seats[k] = st
}

// packet is what the table wants to know of an IPv4 packet.
type packet struct {
	kind             packetKind
	proto            uint8
	src, dst         [4]byte
	srcPort, dstPort uint16
	frag             fragKey
	more             bool // the first of several fragments
	quoted           bool // an ICMP error: src, dst and ports are those of the flow's packets to the address

	syn, fin, rst bool
}

// begins reports whether the packet begins a connection, or may.
func (pk *packet) begins() bool { return pk.proto != protoTCP || pk.syn }

type packetKind uint8

const (
	kindOther    packetKind = iota // belongs to no flow
	kindFlow                       // belongs to one
	kindFragment                   // a later fragment: it does not say
)

const (
	protoICMP = uint8(header.ICMPv4ProtocolNumber)
	protoTCP  = uint8(header.TCPProtocolNumber)
	protoUDP  = uint8(header.UDPProtocolNumber)
)

// parsePacket reads an IPv4 packet whose IP header was found valid.
func parsePacket(b []byte) packet {
	ip := header.IPv4(b)
	pk := packet{proto: ip.Protocol(), src: ip.SourceAddress().As4(), dst: ip.DestinationAddress().As4()}
	pk.frag = fragKey{proto: pk.proto, src: pk.src, dst: pk.dst, id: ip.ID()}
	if ip.FragmentOffset() != 0 {
		pk.kind = kindFragment
		return pk
	}
	pk.more = ip.More()
	pk.transport(b[ip.HeaderLength():min(len(b), int(ip.TotalLength()))])
	return pk
}

// transport reads the header behind IP's.
func (pk *packet) transport(t []byte) {
	switch tcpip.TransportProtocolNumber(pk.proto) {
	case header.TCPProtocolNumber:
		if len(t) < header.TCPMinimumSize {
			return
		}
		tcp := header.TCP(t)
		flags := tcp.Flags()
		pk.srcPort, pk.dstPort = tcp.SourcePort(), tcp.DestinationPort()
		pk.syn = flags&(header.TCPFlagSyn|header.TCPFlagAck) == header.TCPFlagSyn
		pk.fin, pk.rst = flags.Contains(header.TCPFlagFin), flags.Contains(header.TCPFlagRst)
	case header.UDPProtocolNumber:
		if len(t) < header.UDPMinimumSize {
			return
		}
		pk.srcPort, pk.dstPort = header.UDP(t).SourcePort(), header.UDP(t).DestinationPort()
	case header.ICMPv4ProtocolNumber:
		if len(t) < header.ICMPv4MinimumSize {
			return
		}
		icmp := header.ICMPv4(t)
		switch icmp.Type() {
		case header.ICMPv4Echo: // the asking side's number, on whichever side
			pk.srcPort, pk.dstPort = icmp.Ident(), icmp.Ident()
		case header.ICMPv4EchoReply:
			pk.srcPort, pk.dstPort = icmp.Ident(), icmp.Ident()
		case header.ICMPv4DstUnreachable, header.ICMPv4TimeExceeded, header.ICMPv4ParamProblem:
			pk.quote(t[header.ICMPv4MinimumSize:])
			return
		default:
			return
		}
	default:
		return
	}
	pk.kind = kindFlow
}

// quote reads the packet that an ICMP error is about. It went the other way.
func (pk *packet) quote(b []byte) {
	ip := header.IPv4(b)
	if len(b) < header.IPv4MinimumSize || int(ip.HeaderLength()) < header.IPv4MinimumSize ||
		len(b) < int(ip.HeaderLength())+8 || ip.FragmentOffset() != 0 {
		return
	}
	t := b[ip.HeaderLength():]
	inner := packet{proto: ip.Protocol()}
	switch inner.proto {
	case protoTCP, protoUDP: // the ports come first in both
		inner.srcPort, inner.dstPort = header.UDP(t).SourcePort(), header.UDP(t).DestinationPort()
	case protoICMP:
		inner.srcPort, inner.dstPort = header.ICMPv4(t).Ident(), header.ICMPv4(t).Ident()
	default:
		return
	}
	pk.kind, pk.quoted, pk.proto = kindFlow, true, inner.proto
	pk.src, pk.dst = ip.DestinationAddress().As4(), ip.SourceAddress().As4()
	pk.srcPort, pk.dstPort = inner.dstPort, inner.srcPort
}
