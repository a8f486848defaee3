// SPDX-License-Identifier: Apache-2.0

package network

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
)

// listenNamed makes the guest say who it is to whoever connects, before every line that
// it sends back.
func (g *guest) listenNamed(t testing.TB, port uint16, name string) {
	t.Helper()
	ln, err := gonet.ListenTCP(g.stack, fullAddr(netip.AddrPortFrom(g.addr, port)), ipv4.ProtocolNumber)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				for r := bufio.NewReader(c); ; {
					line, err := r.ReadString('\n')
					if err != nil {
						return
					}
					_, _ = io.WriteString(c, name+" "+line)
				}
			}()
		}
	}()
	t.Cleanup(func() { ln.Shutdown(); <-done; ln.Close() })
}

// hello asks who is at the other end of a connection.
func hello(t testing.TB, c net.Conn) string {
	t.Helper()
	_ = c.SetDeadline(time.Now().Add(patience))
	if _, err := io.WriteString(c, "hello\n"); err != nil {
		t.Fatal(err)
	}
	var answer []byte
	for b := make([]byte, 1); !bytes.HasSuffix(answer, []byte("\n")); answer = append(answer, b...) {
		if _, err := io.ReadFull(c, b); err != nil {
			t.Fatalf("after %q: %v", answer, err)
		}
	}
	return string(bytes.TrimSuffix(answer, []byte(" hello\n")))
}

func must(t testing.TB, c net.Conn, err error) net.Conn {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func TestHandover(t *testing.T) {
	s := newSwitch(t, Config{})
	ctx := testContext(t)
	at := netip.AddrPortFrom(testNet.Host(10), 7)
	peer := plugGuest(t, s, "peer", 11)
	peer.listenNamed(t, 7, "peer")
	old := plugGuest(t, s, "web", 10)
	old.listenNamed(t, 7, "old")
	check := func(who string, conns ...net.Conn) {
		t.Helper()
		for i, c := range conns {
			if got := hello(t, c); got != who {
				t.Errorf("connection %d is with %q, want %q", i, got, who)
			}
		}
	}
	dial := func(from string) net.Conn {
		t.Helper()
		var c net.Conn
		var err error
		if from == "peer" {
			c, err = peer.dial(ctx, at)
		} else {
			c, err = s.DialTCP(ctx, at.Addr(), at.Port())
		}
		return must(t, c, err)
	}
	silent := []net.Conn{dial("peer"), dial("host")} // from before there is a standby
	check("old", silent...)

	standby := plugGuestBy(t, s.PlugStandby, "web", 10)
	standby.listenNamed(t, 7, "new")
	before := []net.Conn{dial("peer"), dial("host")}
	check("old", before...)
	c, err := s.DialPort(ctx, standby.port, 7)
	early := must(t, c, err)
	check("new", early)
	c, err = standby.dial(ctx, netip.AddrPortFrom(peer.addr, 7))
	own := must(t, c, err)
	check("peer", own)
	c, err = old.dial(ctx, netip.AddrPortFrom(peer.addr, 7))
	oldOwn := must(t, c, err)
	check("peer", oldOwn)
	if old.port.Connections() != 1 { // the silent one is not known
		t.Errorf("%d connections of peers with the old one, want 1", old.port.Connections())
	}

	if err := old.port.Promote(); err != nil {
		t.Errorf("promoting what is present: %v", err)
	}
	if err := standby.port.Promote(); err != nil {
		t.Fatal(err)
	}
	after := []net.Conn{dial("peer"), dial("host")}
	check("new", append(after, early)...)
	check("old", append(silent, before...)...)
	check("peer", own, oldOwn)
	if n := old.port.Connections(); n != 2 {
		t.Errorf("%d connections of peers with the old one, want 2", n)
	}
	c, err = s.DialPort(ctx, old.port, 7)
	check("old", must(t, c, err))
	if err := old.port.Promote(); !errors.Is(err, ErrNotStandby) {
		t.Errorf("promoting the old one: %v", err)
	}
	a, b := cable(t)
	if _, err := s.PlugStandby(ctx, "web", at.Addr(), a); !errors.Is(err, ErrShared) {
		t.Errorf("a third machine at the address: %v", err)
	}
	if _, err := b.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("the cable that was refused is not closed: %v", err)
	}

	old.port.Unplug()
	check("new", append(after, early)...)
	check("peer", own)
	check("new", dial("peer"), dial("host"))
	for _, c := range []net.Conn{silent[1], before[1]} { // the host's end with the port
		if n, err := c.Read(make([]byte, 1)); err == nil {
			t.Errorf("read %d bytes from an unplugged machine", n)
		}
	}
	if s.shared[10].Load() != nil {
		t.Error("there is a table for one machine")
	}
	if n := standby.port.Counters(); n.Refused != 0 {
		t.Errorf("counters of the new one: %+v", n)
	}
}

func TestStandbyIsGivenUp(t *testing.T) {
	s := newSwitch(t, Config{})
	ctx := testContext(t)
	old := plugGuest(t, s, "web", 10)
	old.listenNamed(t, 7, "old")
	standby := plugGuestBy(t, s.PlugStandby, "web", 10)
	c, err := s.DialTCP(ctx, old.addr, 7)
	must(t, c, err)
	standby.port.Unplug()
	if got := hello(t, c); got != "old" {
		t.Errorf("talks to %q", got)
	}
	if err := standby.port.Promote(); !errors.Is(err, ErrNotStandby) {
		t.Errorf("promoting what is unplugged: %v", err)
	}
	a, _ := cable(t)
	if _, err := standby.port.Replug(ctx, a); !errors.Is(err, ErrUnplugged) {
		t.Errorf("replugging what is unplugged: %v", err)
	}
	// There is room for another, also when the present one is gone.
	next := plugGuestBy(t, s.PlugStandby, "web", 10)
	next.listenNamed(t, 7, "next")
	old.port.Unplug()
	if _, err := s.DialTCP(ctx, old.addr, 7); !errors.Is(err, ErrUnplugged) {
		t.Errorf("a standby answers at the address: %v", err)
	}
	if err := next.port.Promote(); err != nil {
		t.Fatal(err)
	}
	c, err = s.DialTCP(ctx, old.addr, 7)
	if got := hello(t, must(t, c, err)); got != "next" {
		t.Errorf("talks to %q", got)
	}
}

// A cable that breaks and is plugged in again changes nothing of who is who.
func TestReplugKeepsTheSeat(t *testing.T) {
	s := newSwitch(t, Config{})
	ctx := testContext(t)
	_, peer := plugRaw(t, s, "peer", 11)
	own, from := netip.AddrPortFrom(testNet.Host(10), 80), netip.AddrPortFrom(testNet.Host(11), 41000)
	oldPort, oldGuest := plugRaw(t, s, "web", 10)
	plug := func(p func(context.Context, net.Conn) (*Port, error)) (*Port, *rawGuest) {
		t.Helper()
		a, b := cable(t)
		port, err := p(ctx, a)
		if err != nil {
			t.Fatal(err)
		}
		return port, &rawGuest{t: t, conn: b, r: bufio.NewReader(b), host: 10}
	}
	newPort, newGuest := plug(func(ctx context.Context, c net.Conn) (*Port, error) {
		return s.PlugStandby(ctx, "web", own.Addr(), c)
	})
	send := func(g *rawGuest, to byte, packet []byte) {
		g.send(append(append(append(append([]byte{}, macOf(to)...), macOf(g.host)...), 8, 0), packet...))
	}
	isNext := func(g *rawGuest, packet []byte) {
		t.Helper()
		if got := g.next()[header.EthernetMinimumSize:]; !bytes.Equal(got, packet) {
			t.Fatalf("got % x, want % x", got, packet)
		}
	}
	send(peer, 10, tcpPacket(from, own, header.TCPFlagSyn))
	isNext(oldGuest, tcpPacket(from, own, header.TCPFlagSyn))
	for _, promoted := range []bool{false, true} {
		if promoted {
			if err := newPort.Promote(); err != nil {
				t.Fatal(err)
			}
		}
		oldGuest.conn.Close()
		newGuest.conn.Close()
		<-oldPort.Done()
		<-newPort.Done()
		newPort, newGuest = plug(newPort.Replug)
		oldPort, oldGuest = plug(oldPort.Replug)
		ask := udpPacket(netip.AddrPortFrom(own.Addr(), 40000), netip.AddrPortFrom(from.Addr(), 53))
		send(newGuest, 11, ask)
		isNext(peer, ask)
		answer := udpPacket(netip.AddrPortFrom(from.Addr(), 53), netip.AddrPortFrom(own.Addr(), 40000))
		send(peer, 10, answer)
		isNext(newGuest, answer)
		send(peer, 10, tcpPacket(from, own, header.TCPFlagAck))
		isNext(oldGuest, tcpPacket(from, own, header.TCPFlagAck))
		first := udpPacket(netip.AddrPortFrom(from.Addr(), 1), own)
		if promoted {
			first = udpPacket(netip.AddrPortFrom(from.Addr(), 2), own)
		}
		send(peer, 10, first)
		if promoted {
			isNext(newGuest, first)
		} else {
			isNext(oldGuest, first)
		}
	}
}

func TestLeaseGoesToWhoAsked(t *testing.T) {
	s := newSwitch(t, Config{})
	_, old := plugRaw(t, s, "web", 10)
	a, b := cable(t)
	if _, err := s.PlugStandby(context.Background(), "web", testNet.Host(10), a); err != nil {
		t.Fatal(err)
	}
	standby := &rawGuest{t: t, conn: b, r: bufio.NewReader(b), host: 10}
	for range 3 {
		for _, g := range []*rawGuest{standby, old} {
			ask, err := dhcpv4.NewDiscovery(g.mac())
			if err != nil {
				t.Fatal(err)
			}
			// Were the other's answer here too, it would come first.
			if offer := g.dhcp(ask); offer.TransactionID != ask.TransactionID || offer.YourIPAddr.String() != testNet.Host(10).String() {
				t.Errorf("offer %v to %v", offer, ask)
			}
		}
	}
}

// Neither of the two hears the other: it would be itself to it.
func TestBroadcastsReachBothButNotEachOther(t *testing.T) {
	s := newSwitch(t, Config{})
	_, old := plugRaw(t, s, "web", 10)
	_, peer := plugRaw(t, s, "peer", 11)
	a, b := cable(t)
	if _, err := s.PlugStandby(context.Background(), "web", testNet.Host(10), a); err != nil {
		t.Fatal(err)
	}
	standby := &rawGuest{t: t, conn: b, r: bufio.NewReader(b), host: 10}
	who := func(host, target byte) []byte {
		return arpFrame(host, macOf(host), testNet.Host(host), testNet.Host(target))
	}
	standby.send(who(10, 10))
	peer.next() // so it has arrived
	old.send(who(10, 12))
	peer.next()
	peer.send(who(11, 10))
	for _, g := range []*rawGuest{old, standby} {
		if got := g.next(); !bytes.Equal(got, who(11, 10)) {
			t.Errorf("got % x", got)
		}
	}
	answer := append(append([]byte{}, macOf(10)...), who(11, 10)[6:]...)
	peer.send(answer)
	for _, g := range []*rawGuest{old, standby} {
		if got := g.next(); !bytes.Equal(got, answer) {
			t.Errorf("got % x", got)
		}
	}
}

func TestLastActive(t *testing.T) {
	s := newSwitch(t, Config{})
	_, peer := plugRaw(t, s, "peer", 11)
	p, g := plugRaw(t, s, "web", 10)
	ask, err := dhcpv4.NewDiscovery(g.mac())
	if err != nil {
		t.Fatal(err)
	}
	g.dhcp(ask)
	g.send(arpFrame(10, macOf(10), testNet.Host(10), testNet.Host(11)))
	peer.next()
	peer.next()
	g.send(arpFrame(10, macOf(10), testNet.Host(10), testNet.Gateway))
	g.next()
	if at := p.LastActive(); !at.IsZero() {
		t.Errorf("a machine that only found its address was active at %v", at)
	}
	peer.send(ipFrame(11, testNet.Host(10), macOf(10), []byte("hello")))
	g.next()
	in := p.LastActive()
	if since := time.Since(in); since < 0 || since > patience {
		t.Errorf("it was sent a packet; active %v ago", since)
	}
	g.send(ipFrame(10, testNet.Host(11), macOf(11), []byte("hello")))
	for { // behind what was broadcast
		if b := peer.next(); b[0]&1 == 0 {
			break
		}
	}
	if !p.LastActive().After(in) {
		t.Error("it sent a packet, and was not active since")
	}
}
