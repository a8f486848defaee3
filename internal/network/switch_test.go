// SPDX-License-Identifier: Apache-2.0

package network

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"

	"github.com/labfile/lab/internal/lab"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m)
}

// listenEcho makes the guest answer on a TCP port with what it is sent, once it
// was sent everything.
func (g *guest) listenEcho(t testing.TB, port uint16) {
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
				b, err := io.ReadAll(c)
				if err == nil {
					_, _ = c.Write(b)
				}
			}()
		}
	}()
	t.Cleanup(func() { ln.Shutdown(); <-done; ln.Close() })
}

func (g *guest) dial(ctx context.Context, to netip.AddrPort) (net.Conn, error) {
	c, err := gonet.DialContextTCP(ctx, g.stack, fullAddr(to), ipv4.ProtocolNumber)
	if err != nil {
		return nil, err
	}
	return c, nil
}

// echo sends a message, half-closes, and wants the message back.
func echo(t testing.TB, c net.Conn, message []byte) {
	t.Helper()
	_ = c.SetDeadline(time.Now().Add(patience))
	go func() {
		_, _ = c.Write(message)
		_ = closeWrite(c)
	}()
	got, err := io.ReadAll(c)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, message) {
		t.Fatalf("got %d bytes back, want the %d that were sent", len(got), len(message))
	}
}

func TestGuestsTalkToEachOther(t *testing.T) {
	s := newSwitch(t, Config{})
	db := plugGuest(t, s, "db", 10)
	web := plugGuest(t, s, "web", 11)
	db.listenEcho(t, 5432)
	c, err := web.dial(testContext(t), netip.AddrPortFrom(db.addr, 5432))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	echo(t, c, bytes.Repeat([]byte("0123456789abcdef"), 1<<16))
	if n := db.port.Counters(); n.Refused != 0 || n.FramesIn == 0 || n.FramesOut == 0 {
		t.Errorf("counters of db: %+v", n)
	}
}

func TestHostDialsGuest(t *testing.T) {
	s := newSwitch(t, Config{})
	db := plugGuest(t, s, "db", 10)
	db.listenEcho(t, 5432)
	c, err := s.DialTCP(testContext(t), db.addr, 5432)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	echo(t, c, bytes.Repeat([]byte("0123456789abcdef"), 1<<16))

	_, err = s.DialTCP(testContext(t), db.addr, 5433)
	if !errors.Is(err, syscall.ECONNREFUSED) || err.Error() != fmt.Sprintf("dialing %v:5433: connection refused", db.addr) {
		t.Errorf("dialing a closed port: %v", err)
	}
}

func TestDialEndsWithItsContext(t *testing.T) {
	s := newSwitch(t, Config{})
	plugRaw(t, s, "mute", 10) // takes frames, says nothing
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	if _, err := s.DialTCP(ctx, testNet.Host(10), 22); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("dialing a mute guest: %v, want deadline exceeded", err)
	}
	_, err := s.DialTCP(testContext(t), testNet.Host(11), 22)
	if !errors.Is(err, ErrUnplugged) || err.Error() != fmt.Sprintf("dialing %v:22: not plugged into the switch", testNet.Host(11)) {
		t.Errorf("dialing nobody: %v", err)
	}
}

func TestUnplugEndsConnections(t *testing.T) {
	s := newSwitch(t, Config{})
	db := plugGuest(t, s, "db", 10)
	db.listenEcho(t, 5432)
	c, err := s.DialTCP(testContext(t), db.addr, 5432)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	dialed := make(chan error, 1)
	p, _ := plugRaw(t, s, "mute", 11)
	go func() {
		_, err := s.DialTCP(testContext(t), p.Addr(), 22)
		dialed <- err
	}()
	db.port.Unplug()
	p.Unplug()
	if n, err := c.Read(make([]byte, 1)); err == nil {
		t.Errorf("read %d bytes from an unplugged guest", n)
	}
	if err := <-dialed; !errors.Is(err, ErrUnplugged) {
		t.Errorf("dial of an unplugged guest ended with %v", err)
	}
	if !errors.Is(db.port.Err(), ErrUnplugged) {
		t.Errorf("port ended with %v", db.port.Err())
	}
}

func TestNewerCableReplacesTheOlder(t *testing.T) {
	s := newSwitch(t, Config{})
	old, _ := plugRaw(t, s, "db", 10)
	db := plugGuest(t, s, "db", 10)
	<-old.Done()
	if !errors.Is(old.Err(), ErrReplaced) {
		t.Errorf("older cable ended with %v, want ErrReplaced", old.Err())
	}
	db.listenEcho(t, 80)
	c, err := s.DialTCP(testContext(t), db.addr, 80)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	echo(t, c, []byte("still there"))
}

// A stopped guest reads nothing. Far more than every buffer on the way is sent
// to it; without the queue this test does not end.
func TestStoppedGuestStallsNobody(t *testing.T) {
	s := newSwitch(t, Config{})
	stopped, _ := plugRaw(t, s, "stopped", 10)
	db := plugGuest(t, s, "db", 11)
	web := plugGuest(t, s, "web", 12)
	db.listenEcho(t, 5432)

	_, noisy := plugRaw(t, s, "noisy", 13)
	_ = noisy.conn.SetWriteDeadline(time.Now().Add(patience))
	for range 2000 {
		noisy.send(ipFrame(noisy.host, stopped.addr, macOf(10), make([]byte, 1400)))
	}
	for range 20000 { // broadcasts go to everybody
		noisy.send(arpFrame(noisy.host, noisy.mac(), testNet.Host(13), testNet.Host(99)))
	}
	c, err := web.dial(testContext(t), netip.AddrPortFrom(db.addr, 5432))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	echo(t, c, make([]byte, 1<<18))
	h, err := s.DialTCP(testContext(t), db.addr, 5432)
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	echo(t, h, make([]byte, 1<<18))
	if stopped.Counters().Dropped == 0 {
		t.Error("nothing was dropped: the guest was not stopped")
	}
}

func TestImpossibleLengthDropsTheCable(t *testing.T) {
	s := newSwitch(t, Config{})
	p, g := plugRaw(t, s, "db", 10)
	if _, err := g.conn.Write([]byte{0xff, 0xff, 0xff, 0xff, 1, 2, 3}); err != nil {
		t.Fatal(err)
	}
	<-p.Done()
	var fe *FrameError
	if !errors.As(p.Err(), &fe) || fe.Error() != `machine "db" announced a frame of 4294967295 bytes, more than the 69632 that are possible` {
		t.Errorf("port ended with %v", p.Err())
	}
}

func TestCableThatEnds(t *testing.T) {
	s := newSwitch(t, Config{})
	p, g := plugRaw(t, s, "db", 10)
	g.conn.Close()
	<-p.Done()
	if !errors.Is(p.Err(), io.EOF) {
		t.Errorf("a closed cable ended with %v, want EOF", p.Err())
	}
	p, g = plugRaw(t, s, "db", 10)
	_, _ = g.conn.Write([]byte{0, 0, 1, 0, 1, 2, 3})
	g.conn.Close()
	<-p.Done()
	if !errors.Is(p.Err(), io.ErrUnexpectedEOF) {
		t.Errorf("a broken cable ended with %v, want unexpected EOF", p.Err())
	}
	ctx, cancel := context.WithCancel(context.Background())
	a, b := cable(t)
	p, err := s.Plug(ctx, "db", testNet.Host(10), a)
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	<-p.Done()
	if _, err := b.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("cable of an ended context: %v, want EOF", err)
	}
}

// Whatever a guest sends, the switch goes on and the cable stays in.
func TestGarbageIsHarmless(t *testing.T) {
	s := newSwitch(t, Config{})
	db := plugGuest(t, s, "db", 10)
	db.listenEcho(t, 5432)
	p, g := plugRaw(t, s, "evil", 11)
	go func() { _, _ = io.Copy(io.Discard, g.r) }()
	rnd := rand.New(rand.NewPCG(1, 2))
	for n := range header.EthernetMinimumSize {
		g.send(make([]byte, n))
	}
	for i := range 20000 {
		b := make([]byte, rnd.IntN(200))
		for j := range b {
			b[j] = byte(rnd.Uint32())
		}
		switch dst := macOf(byte(rnd.IntN(12))); i % 4 {
		case 0: // pure noise
		case 1: // noise as IPv4, from the right address
			b = ipFrame(g.host, netip.AddrFrom4([4]byte{byte(rnd.Uint32()), 1, 2, 3}), dst, b)
			b[14+9] = byte(rnd.IntN(20)) // protocol
		case 2: // a noisy IPv4 header
			b = append(append(append(dst[:6:6], g.mac()...), 8, 0, 0x45, 0, 0, byte(len(b))), b...)
		case 3: // noise as ARP
			b = append(append(append(dst[:6:6], g.mac()...), 8, 6, 0, 1, 8, 0, 6, 4), b...)
		}
		g.send(b)
	}
	g.send(make([]byte, maxFrame))
	c, err := s.DialTCP(testContext(t), db.addr, 5432)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	echo(t, c, []byte("still there"))
	if p.Err() != nil {
		t.Errorf("the cable was dropped: %v", p.Err())
	}
}

// A fragment other than the first carries no header of its transport, and may
// carry nothing at all.
func TestEmptyFragmentsAreHarmless(t *testing.T) {
	s := newSwitch(t, Config{})
	db := plugGuest(t, s, "db", 10)
	db.listenEcho(t, 5432)
	p, g := plugRaw(t, s, "evil", 11)
	go func() { _, _ = io.Copy(io.Discard, g.r) }()
	everybody := netip.MustParseAddr("255.255.255.255")
	for _, dst := range []net.HardwareAddr{{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, macOf(1), macOf(10)} {
		for _, protocol := range []uint8{1, 2, 6, 17} {
			for _, to := range []netip.Addr{everybody, testNet.Gateway, testNet.Host(10), netip.MustParseAddr("192.0.2.1")} {
				for _, offset := range []uint16{0, 8} {
					for n := range 9 {
						b := append(append(append([]byte{}, dst...), g.mac()...), 8, 0)
						ip := make(header.IPv4, header.IPv4MinimumSize)
						ip.Encode(&header.IPv4Fields{
							TotalLength: uint16(len(ip) + n), TTL: 64, Protocol: protocol, FragmentOffset: offset,
							SrcAddr: tcpAddr(testNet.Host(11)), DstAddr: tcpAddr(to),
						})
						ip.SetChecksum(^ip.CalculateChecksum())
						g.send(append(append(b, ip...), make([]byte, n)...))
					}
				}
			}
		}
	}
	c, err := s.DialTCP(testContext(t), db.addr, 5432)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	echo(t, c, []byte("still there"))
	if p.Err() != nil {
		t.Errorf("the cable was dropped: %v", p.Err())
	}
}

func TestPlugRefusesForeignAddresses(t *testing.T) {
	s := newSwitch(t, Config{})
	for _, addr := range []netip.Addr{testNet.Gateway, testNet.Host(0), testNet.Host(255), netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("::1")} {
		a, b := cable(t)
		_, err := s.Plug(context.Background(), "db", addr, a)
		if want := fmt.Sprintf(`plugging machine "db" into the switch: %v is no machine's address in %v`, addr, testNet.Subnet); err == nil || err.Error() != want {
			t.Errorf("got %v, want %s", err, want)
		}
		if _, err := b.Read(make([]byte, 1)); err != io.EOF {
			t.Errorf("the refused cable was left open: %v", err)
		}
	}
	s.Close()
	a, _ := cable(t)
	if _, err := s.Plug(context.Background(), "db", testNet.Host(10), a); !errors.Is(err, ErrClosed) {
		t.Errorf("plugging into a closed switch: %v", err)
	}
	if _, err := New(Config{Network: lab.Network{Subnet: netip.MustParsePrefix("10.0.0.0/16")}}); err == nil ||
		err.Error() != "making a switch for 10.0.0.0/16: not an IPv4 /24 with its gateway inside" {
		t.Errorf("a switch for a /16: %v", err)
	}
}

// ipFrame returns a UDP packet from the machine's own address in a frame.
func ipFrame(host byte, to netip.Addr, dst net.HardwareAddr, payload []byte) []byte {
	return udpFrame(macOf(host), dst, netip.AddrPortFrom(testNet.Host(host), 1000), netip.AddrPortFrom(to, 2000), payload)
}

func udpFrame(src, dst net.HardwareAddr, from, to netip.AddrPort, payload []byte) []byte {
	b := append(append(append([]byte{}, dst...), src...), 8, 0)
	ip := make(header.IPv4, header.IPv4MinimumSize)
	ip.Encode(&header.IPv4Fields{
		TotalLength: uint16(header.IPv4MinimumSize + header.UDPMinimumSize + len(payload)),
		TTL:         64, Protocol: uint8(header.UDPProtocolNumber),
		SrcAddr: tcpAddr(from.Addr()), DstAddr: tcpAddr(to.Addr()),
	})
	ip.SetChecksum(^ip.CalculateChecksum())
	u := make(header.UDP, header.UDPMinimumSize)
	u.Encode(&header.UDPFields{SrcPort: from.Port(), DstPort: to.Port(), Length: uint16(len(u) + len(payload))})
	return append(append(append(b, ip...), u...), payload...)
}

// arpFrame returns a broadcast ARP request.
func arpFrame(host byte, sender net.HardwareAddr, senderIP, target netip.Addr) []byte {
	b := append(append(bytes.Repeat([]byte{0xff}, 6), macOf(host)...), 8, 6, 0, 1, 8, 0, 6, 4, 0, 1)
	b = append(append(b, sender...), senderIP.AsSlice()...)
	return append(append(b, make([]byte, 6)...), target.AsSlice()...)
}

func TestInspect(t *testing.T) {
	s := newSwitch(t, Config{})
	own, neighbour := testNet.Host(10), testNet.Host(11)
	outside := netip.MustParseAddr("192.0.2.1")
	broadcast := netip.MustParseAddr("255.255.255.255")
	none := netip.IPv4Unspecified()
	m, gw, all := macOf(10), macOf(1), net.HardwareAddr(bytes.Repeat([]byte{0xff}, 6))
	at := netip.AddrPortFrom
	dhcp := func(chaddr net.HardwareAddr) []byte { return append(make([]byte, 28), chaddr...) }
	fragment := func(b []byte, bits uint16) []byte { binary.BigEndian.PutUint16(b[14+6:], bits); return b }
	tests := []struct {
		name  string
		frame []byte
		want  refusal
	}{
		{"ordinary", udpFrame(m, gw, at(own, 1), at(outside, 2), nil), accepted},
		{"to a neighbour", udpFrame(m, macOf(11), at(own, 1), at(neighbour, 2), nil), accepted},
		{"to a multicast group", udpFrame(m, net.HardwareAddr{1, 0, 0x5e, 0, 0, 0xfb}, at(own, 5353), at(netip.MustParseAddr("224.0.0.251"), 5353), nil), accepted},
		{"padded", append(udpFrame(m, gw, at(own, 1), at(outside, 2), nil), 0, 0, 0, 0), accepted},
		{"empty", nil, refusedShort},
		{"13 bytes", make([]byte, 13), refusedShort},
		{"neighbour's hardware address", udpFrame(macOf(11), gw, at(own, 1), at(outside, 2), nil), refusedMAC},
		{"gateway's hardware address", udpFrame(gw, m, at(own, 1), at(outside, 2), nil), refusedMAC},
		{"neighbour's address", udpFrame(m, gw, at(neighbour, 1), at(outside, 2), nil), refusedAddress},
		{"gateway's address", udpFrame(m, macOf(11), at(testNet.Gateway, 53), at(neighbour, 2), nil), refusedAddress},
		{"foreign address", udpFrame(m, gw, at(outside, 1), at(outside, 2), nil), refusedAddress},
		{"no address", udpFrame(m, gw, at(none, 1), at(outside, 2), nil), refusedAddress},
		{"DHCP discover", udpFrame(m, all, at(none, 68), at(broadcast, 67), dhcp(m)), accepted},
		{"DHCP renewal", udpFrame(m, gw, at(own, 68), at(testNet.Gateway, 67), dhcp(m)), accepted},
		{"DHCP for a neighbour", udpFrame(m, all, at(none, 68), at(broadcast, 67), dhcp(macOf(11))), refusedDHCP},
		{"DHCP cut short", udpFrame(m, all, at(none, 68), at(broadcast, 67), make([]byte, 20)), refusedDHCP},
		{"DHCP, fragmented", fragment(udpFrame(m, all, at(none, 68), at(broadcast, 67), dhcp(m)), 0x2000), refusedAddress},
		{"DHCP server", udpFrame(m, macOf(11), at(own, 67), at(neighbour, 68), nil), refusedDHCP},
		{"later fragment from nobody", fragment(udpFrame(m, all, at(none, 68), at(broadcast, 67), dhcp(m)), 8), refusedAddress},
		{"IPv6", append(append(append([]byte{}, gw...), m...), 0x86, 0xdd, 0x60), refusedProtocol},
		{"VLAN", append(append(append([]byte{}, gw...), m...), 0x81, 0x00, 0, 1, 8, 0), refusedProtocol},
		{"IPv4 without a header", append(append(append([]byte{}, gw...), m...), 8, 0, 0x45), refusedMalformed},
		{"IPv4 longer than its frame", udpFrame(m, gw, at(own, 1), at(outside, 2), make([]byte, 9))[:14+20+8], refusedMalformed},
		{"ARP request", arpFrame(10, m, own, testNet.Gateway), accepted},
		{"ARP probe", arpFrame(10, m, none, own), accepted},
		{"ARP for a neighbour's address", arpFrame(10, m, neighbour, own), refusedARP},
		{"ARP for the gateway's address", arpFrame(10, m, testNet.Gateway, own), refusedARP},
		{"ARP with another's hardware address", arpFrame(10, macOf(11), own, own), refusedARP},
		{"ARP cut short", arpFrame(10, m, own, own)[:30], refusedARP},
	}
	for _, tt := range tests {
		if got := s.inspect(10, tt.frame); got != tt.want {
			t.Errorf("%s: %v, want %v", tt.name, got, tt.want)
		}
	}
}

func FuzzInspect(f *testing.F) {
	f.Add(arpFrame(10, macOf(10), testNet.Host(10), testNet.Gateway))
	f.Add(ipFrame(10, testNet.Gateway, macOf(1), []byte("x")))
	s, err := New(Config{Network: testNet, Resolvers: func() []netip.AddrPort { return nil }})
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(s.Close)
	p := newPort(s, "db", testNet.Host(10), 10, nil)
	f.Fuzz(func(t *testing.T, frame []byte) {
		if s.inspect(10, frame) == accepted {
			s.fromPort(p, frame)
		}
	})
}

func TestGatewayAnswersARP(t *testing.T) {
	s := newSwitch(t, Config{})
	_, g := plugRaw(t, s, "db", 10)
	g.send(arpFrame(10, g.mac(), testNet.Host(10), testNet.Host(99))) // nobody's: no answer
	g.send(arpFrame(10, g.mac(), testNet.Host(10), testNet.Gateway))
	want := append(append(append([]byte{}, g.mac()...), macOf(1)...), 8, 6, 0, 1, 8, 0, 6, 4, 0, 2)
	want = append(append(want, macOf(1)...), testNet.Gateway.AsSlice()...)
	want = append(append(want, g.mac()...), testNet.Host(10).AsSlice()...)
	if got := g.next(); !bytes.Equal(got, want) {
		t.Errorf("got  %x\nwant %x", got, want)
	}
}

// A machine is asked by a question of the network, which its kernel answers and which is
// no use of it.
func TestAsk(t *testing.T) {
	s := newSwitch(t, Config{})
	p, g := plugRaw(t, s, "db", 10)
	ctx, cancel := context.WithCancel(testContext(t))
	answered := make(chan error, 1)
	go func() { answered <- p.Ask(ctx) }()
	want := append(append(append([]byte{}, g.mac()...), macOf(1)...), 8, 6, 0, 1, 8, 0, 6, 4, 0, 1)
	want = append(append(want, macOf(1)...), testNet.Gateway.AsSlice()...)
	want = append(append(want, 0, 0, 0, 0, 0, 0), testNet.Host(10).AsSlice()...)
	if got := g.next(); !bytes.Equal(got, want) {
		t.Errorf("got  %x\nwant %x", got, want)
	}
	answer := arpFrame(10, macOf(1), testNet.Host(10), testNet.Gateway)
	g.send(answer)
	if err := <-answered; err != nil {
		t.Error(err)
	}
	if at := p.LastActive(); !at.IsZero() {
		t.Errorf("the answer counts as a use, at %v", at)
	}
	go func() { answered <- p.Ask(ctx) }()
	g.next()
	cancel()
	if err := <-answered; !errors.Is(err, context.Canceled) {
		t.Errorf("a machine that does not answer: %v", err)
	}
	go func() { answered <- p.Ask(testContext(t)) }()
	g.next()
	p.Unplug()
	if err := <-answered; !errors.Is(err, ErrUnplugged) {
		t.Errorf("a machine that is unplugged: %v", err)
	}
}

func TestCloseTwice(t *testing.T) {
	s := newSwitch(t, Config{})
	p, _ := plugRaw(t, s, "db", 10)
	s.Close()
	s.Close()
	if !errors.Is(p.Err(), ErrClosed) {
		t.Errorf("port of a closed switch ended with %v", p.Err())
	}
	if _, err := s.Forward(0, testNet.Host(10), 22); !errors.Is(err, ErrClosed) {
		t.Errorf("forward of a closed switch: %v", err)
	}
}
