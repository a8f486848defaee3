// SPDX-License-Identifier: Apache-2.0

package network

import (
	"fmt"
	"net/netip"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// ipPacket returns an IPv4 packet around a transport header.
func ipPacket(proto tcpip.TransportProtocolNumber, from, to netip.Addr, id uint16, more bool, offset uint16, t []byte) []byte {
	b := make([]byte, header.IPv4MinimumSize, header.IPv4MinimumSize+len(t))
	f := header.IPv4Fields{
		TotalLength: uint16(len(b) + len(t)), ID: id, TTL: 64, Protocol: uint8(proto), FragmentOffset: offset,
		SrcAddr: tcpAddr(from), DstAddr: tcpAddr(to),
	}
	if more {
		f.Flags = header.IPv4FlagMoreFragments
	}
	header.IPv4(b).Encode(&f)
	return append(b, t...)
}

func tcpPacket(from, to netip.AddrPort, flags header.TCPFlags) []byte {
	t := make(header.TCP, header.TCPMinimumSize)
	t.Encode(&header.TCPFields{SrcPort: from.Port(), DstPort: to.Port(), DataOffset: header.TCPMinimumSize, Flags: flags})
	return ipPacket(header.TCPProtocolNumber, from.Addr(), to.Addr(), 1, false, 0, t)
}

func udpPacket(from, to netip.AddrPort) []byte { return udpFragment(from, to, 1, false) }

// udpFragment returns the first fragment of a UDP packet.
func udpFragment(from, to netip.AddrPort, id uint16, more bool) []byte {
	t := make(header.UDP, header.UDPMinimumSize+8)
	t.Encode(&header.UDPFields{SrcPort: from.Port(), DstPort: to.Port(), Length: uint16(len(t))})
	return ipPacket(header.UDPProtocolNumber, from.Addr(), to.Addr(), id, more, 0, t)
}

func icmpPacket(from, to netip.Addr, kind header.ICMPv4Type, ident uint16, quote []byte) []byte {
	t := make(header.ICMPv4, header.ICMPv4MinimumSize)
	t.SetType(kind)
	if quote == nil {
		t.SetIdent(ident)
	}
	return ipPacket(header.ICMPv4ProtocolNumber, from, to, 1, false, 0, append(t, quote...))
}

func TestFlowsHaveOwners(t *testing.T) {
	own := netip.AddrPortFrom(testNet.Host(10), 80)
	high := netip.AddrPortFrom(testNet.Host(10), 40000)
	peer := netip.AddrPortFrom(testNet.Host(11), 41000)
	other := netip.AddrPortFrom(testNet.Host(11), 42000)
	server := netip.AddrPortFrom(testNet.Host(11), 5432)
	world := netip.MustParseAddrPort("192.0.2.1:443")
	const (
		syn    = header.TCPFlagSyn
		synAck = header.TCPFlagSyn | header.TCPFlagAck
		ack    = header.TCPFlagAck
		fin    = header.TCPFlagFin | header.TCPFlagAck
		rst    = header.TCPFlagRst
	)
	in := func(b []byte, want string) func(*testing.T, *tableTest) {
		return func(t *testing.T, tt *tableTest) { t.Helper(); tt.in(t, b, want) }
	}
	out := func(who string, b []byte, leaves bool) func(*testing.T, *tableTest) {
		return func(t *testing.T, tt *tableTest) { t.Helper(); tt.out(t, who, b, leaves) }
	}
	takeover := func(t *testing.T, tt *tableTest) { tt.sh.promote(tt.new) }
	type steps []func(*testing.T, *tableTest)
	for name, tests := range map[string]steps{
		"before the takeover everything is the old one's": {
			in(tcpPacket(peer, own, syn), "old"), in(tcpPacket(peer, own, ack), "old"),
			in(udpPacket(peer, own), "old"), in(icmpPacket(peer.Addr(), own.Addr(), header.ICMPv4Echo, 7, nil), "old"),
			in(ipPacket(47, peer.Addr(), own.Addr(), 1, false, 0, []byte("gre")), "old"),
		},
		"what begins after it is the new one's": {
			takeover,
			in(tcpPacket(peer, own, syn), "new"), in(tcpPacket(peer, own, ack), "new"),
			in(udpPacket(peer, own), "new"), in(icmpPacket(peer.Addr(), own.Addr(), header.ICMPv4Echo, 7, nil), "new"),
			in(ipPacket(47, peer.Addr(), own.Addr(), 1, false, 0, []byte("gre")), "new"),
		},
		"a connection goes on where it began": {
			in(tcpPacket(peer, own, syn), "old"), out("old", tcpPacket(own, peer, synAck), true),
			takeover,
			in(tcpPacket(peer, own, ack), "old"), in(tcpPacket(other, own, syn), "new"), in(tcpPacket(other, own, ack), "new"),
		},
		"a request that is sent again keeps its owner": {
			in(tcpPacket(peer, own, syn), "old"), takeover, in(tcpPacket(peer, own, syn), "old"),
		},
		"a connection from before the table is the old one's": {
			takeover, in(tcpPacket(peer, own, ack), "old"), in(tcpPacket(peer, own, fin), "old"),
		},
		"after both ends have closed, the same ports are free": {
			in(tcpPacket(peer, own, syn), "old"), in(tcpPacket(peer, own, fin), "old"), takeover,
			in(tcpPacket(peer, own, syn), "old"), // half closed
			out("old", tcpPacket(own, peer, fin), true), in(tcpPacket(peer, own, ack), "old"),
			in(tcpPacket(peer, own, syn), "new"), in(tcpPacket(peer, own, ack), "new"),
		},
		"a reset closes": {
			in(tcpPacket(peer, own, syn), "old"), out("old", tcpPacket(own, peer, rst), true), takeover, in(tcpPacket(peer, own, syn), "new"),
		},
		"a standby's own connections": {
			out("new", tcpPacket(high, server, syn), true), in(tcpPacket(server, high, synAck), "new"), out("new", tcpPacket(high, server, ack), true),
			out("old", tcpPacket(high, server, ack), false), // not its own
			in(tcpPacket(server, high, ack), "new"),
			out("new", udpPacket(high, server), true), in(udpPacket(server, high), "new"),
			out("new", icmpPacket(own.Addr(), server.Addr(), header.ICMPv4Echo, 9, nil), true),
			in(icmpPacket(server.Addr(), own.Addr(), header.ICMPv4EchoReply, 9, nil), "new"),
			out("new", tcpPacket(high, world, syn), true), in(tcpPacket(world, high, synAck), "new"),
		},
		"a standby cannot take a connection": {
			in(tcpPacket(peer, own, ack), "old"), out("new", tcpPacket(own, peer, rst), false),
			out("new", tcpPacket(own, other, ack), true), in(tcpPacket(other, own, ack), "old"), // unknown: it claims nothing
		},
		"who asks last from one port is answered": {
			out("old", udpPacket(high, server), true), out("new", udpPacket(high, server), true), in(udpPacket(server, high), "new"),
			out("old", udpPacket(high, server), true), in(udpPacket(server, high), "old"),
		},
		"an answer does not take a flow that a peer began": {
			in(udpPacket(peer, own), "old"), out("new", udpPacket(own, peer), true), in(udpPacket(peer, own), "old"),
		},
		"fragments go where the first one went": {
			in(udpFragment(peer, own, 5, true), "old"), takeover,
			in(ipPacket(header.UDPProtocolNumber, peer.Addr(), own.Addr(), 5, false, 16, []byte("rest")), "old"),
			in(ipPacket(header.UDPProtocolNumber, peer.Addr(), own.Addr(), 6, false, 16, []byte("rest")), "new"),
			in(udpFragment(other, own, 7, true), "new"),
			in(ipPacket(header.UDPProtocolNumber, other.Addr(), own.Addr(), 7, false, 16, []byte("rest")), "new"),
		},
		"errors go to whom they concern": {
			out("new", udpPacket(high, world), true),
			in(icmpPacket(testNet.Gateway, own.Addr(), header.ICMPv4DstUnreachable, 0, udpPacket(high, world)[:28]), "new"),
			in(icmpPacket(testNet.Gateway, own.Addr(), header.ICMPv4DstUnreachable, 0, udpPacket(high, server)[:28]), "old"),
			in(icmpPacket(testNet.Gateway, own.Addr(), header.ICMPv4DstUnreachable, 0, []byte{0x4f}), "old"),
		},
		"idle datagrams are forgotten": {
			in(udpPacket(peer, own), "old"), takeover, in(udpPacket(peer, own), "old"),
			func(t *testing.T, tt *tableTest) {
				for _, f := range tt.sh.flows {
					f.used = f.used.Add(-sharedIdle - time.Second)
				}
			},
			in(udpPacket(peer, own), "new"),
		},
		"nobody is left": {
			in(tcpPacket(peer, own, syn), "old"), out("new", udpPacket(high, server), true),
			func(t *testing.T, tt *tableTest) { tt.sh.setPresent(nil) },
			in(tcpPacket(peer, own, ack), ""), in(udpPacket(peer, own), ""), in(udpPacket(server, high), "new"),
		},
	} {
		t.Run(name, func(t *testing.T) {
			tt := newTableTest()
			for _, step := range tests {
				step(t, tt)
			}
		})
	}
}

// tableTest is a table with two machines that are not there.
type tableTest struct {
	sh       *shared
	old, new *seat
}

func newTableTest() *tableTest {
	tt := &tableTest{old: new(seat), new: new(seat)}
	tt.old.port.Store(&Port{name: "old"})
	tt.new.port.Store(&Port{name: "new"})
	tt.sh = newShared(testNet.Host(10), tt.old, tt.new)
	return tt
}

func (tt *tableTest) in(t *testing.T, b []byte, want string) {
	t.Helper()
	got := ""
	if p := tt.sh.incoming(b); p != nil {
		got = string(p.name)
	}
	if got != want {
		t.Errorf("goes to %q, want %q", got, want)
	}
}

func (tt *tableTest) out(t *testing.T, who string, b []byte, leaves bool) {
	t.Helper()
	st := tt.old
	if who == "new" {
		st = tt.new
	}
	if got := tt.sh.outgoing(st, b); got != leaves {
		t.Errorf("from %s: leaves: %v, want %v", who, got, leaves)
	}
}

// Whoever floods the table loses nothing but its own.
func TestTableIsBounded(t *testing.T) {
	own := netip.AddrPortFrom(testNet.Host(10), 80)
	victim := netip.AddrPortFrom(testNet.Host(12), 41000)
	flooder := testNet.Host(11)
	tt := newTableTest()
	tt.in(t, tcpPacket(victim, own, header.TCPFlagSyn), "old")
	for i := range 3 * maxShared {
		tt.sh.incoming(tcpPacket(netip.AddrPortFrom(flooder, uint16(i)), own, header.TCPFlagSyn))
		to := netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, byte(i >> 8), byte(i)}), 443)
		tt.sh.outgoing(tt.new, tcpPacket(own, to, header.TCPFlagSyn|header.TCPFlagAck))
		tt.sh.outgoing(tt.old, tcpPacket(own, to, header.TCPFlagAck))
		tt.sh.incoming(udpFragment(netip.AddrPortFrom(flooder, 1), own, uint16(i), true))
	}
	tt.sh.promote(tt.new)
	tt.in(t, tcpPacket(victim, own, header.TCPFlagSyn), "old")
	if n := len(tt.sh.flows); n > 4*maxShared {
		t.Errorf("%d flows", n)
	}
	if n := len(tt.sh.parties); n > 4 {
		t.Errorf("%d parties", n)
	}
	if n := len(tt.sh.frags.seats); n > maxFragments {
		t.Errorf("%d fragments", n)
	}
	listed := 0
	for _, l := range tt.sh.parties {
		listed += l.Len()
	}
	if listed != len(tt.sh.flows) {
		t.Errorf("%d entries are listed, %d known", listed, len(tt.sh.flows))
	}
}

func TestConnectionsAreCounted(t *testing.T) {
	own := netip.AddrPortFrom(testNet.Host(10), 80)
	tt := newTableTest()
	want := func(n int) {
		t.Helper()
		if got := tt.sh.connections(tt.old, testNet.Gateway.As4()); got != n {
			t.Errorf("%d connections, want %d", got, n)
		}
	}
	peers := make([]netip.AddrPort, 3)
	for i := range peers {
		peers[i] = netip.AddrPortFrom(testNet.Host(byte(11+i)), 41000)
		tt.in(t, tcpPacket(peers[i], own, header.TCPFlagSyn), "old")
	}
	want(0) // not answered
	for _, p := range peers {
		tt.out(t, "old", tcpPacket(own, p, header.TCPFlagSyn|header.TCPFlagAck), true)
	}
	want(3)
	// Its own are not to it, and the gateway's are counted elsewhere.
	tt.out(t, "old", tcpPacket(netip.AddrPortFrom(own.Addr(), 40000), netip.AddrPortFrom(testNet.Host(11), 5432), header.TCPFlagSyn), true)
	tt.in(t, tcpPacket(netip.AddrPortFrom(testNet.Gateway, 41000), own, header.TCPFlagSyn), "old")
	tt.out(t, "old", tcpPacket(own, netip.AddrPortFrom(testNet.Gateway, 41000), header.TCPFlagAck), true)
	want(3)
	tt.in(t, tcpPacket(peers[0], own, header.TCPFlagRst), "old")
	want(2)
	tt.in(t, tcpPacket(peers[1], own, header.TCPFlagFin|header.TCPFlagAck), "old")
	want(2)
	tt.out(t, "old", tcpPacket(own, peers[1], header.TCPFlagFin|header.TCPFlagAck), true)
	want(1)
}

func FuzzTable(f *testing.F) {
	own, peer := netip.AddrPortFrom(testNet.Host(10), 80), netip.AddrPortFrom(testNet.Host(11), 41000)
	for _, b := range [][]byte{
		tcpPacket(peer, own, header.TCPFlagSyn), udpFragment(peer, own, 5, true),
		icmpPacket(testNet.Gateway, own.Addr(), header.ICMPv4DstUnreachable, 0, udpPacket(own, peer)[:28]),
		udpPacket(netip.MustParseAddrPort("0.0.0.0:68"), netip.MustParseAddrPort("255.255.255.255:67")),
	} {
		f.Add(b, uint8(0))
	}
	f.Fuzz(func(t *testing.T, b []byte, n uint8) {
		if ip := header.IPv4(b); len(b) < header.IPv4MinimumSize || !ip.IsValid(len(b)) {
			return // inspect refuses it
		}
		tt := newTableTest()
		if n&1 == 1 {
			tt.sh.promote(tt.new)
		}
		for _, st := range []*seat{tt.old, tt.new} {
			tt.sh.incoming(b)
			tt.sh.outgoing(st, b)
		}
		if tt.sh.incoming(b) == nil {
			t.Error("goes to nobody: " + fmt.Sprint(b))
		}
	})
}
