// SPDX-License-Identifier: Apache-2.0

package network

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/miekg/dns"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
)

// dhcp sends a request and returns the answer.
func (g *rawGuest) dhcp(ask *dhcpv4.DHCPv4) *dhcpv4.DHCPv4 {
	g.t.Helper()
	all := net.HardwareAddr{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
	g.send(udpFrame(g.mac(), all, netip.MustParseAddrPort("0.0.0.0:68"), netip.MustParseAddrPort("255.255.255.255:67"), ask.ToBytes()))
	b := g.next()
	ip := header.IPv4(b[header.EthernetMinimumSize:])
	if !ip.IsChecksumValid() {
		g.t.Error("the answer's IPv4 checksum is wrong")
	}
	reply, err := dhcpv4.FromBytes(header.UDP(ip.Payload()).Payload())
	if err != nil {
		g.t.Fatal(err)
	}
	return reply
}

func TestLeaseIsTheFixedOne(t *testing.T) {
	s := newSwitch(t, Config{})
	_, g := plugRaw(t, s, "db", 10)
	ask, err := dhcpv4.NewDiscovery(g.mac())
	if err != nil {
		t.Fatal(err)
	}
	offer := g.dhcp(ask)
	if offer.MessageType() != dhcpv4.MessageTypeOffer {
		t.Fatalf("a discover is answered with %v", offer.MessageType())
	}
	ask, err = dhcpv4.NewRequestFromOffer(offer)
	if err != nil {
		t.Fatal(err)
	}
	ack := g.dhcp(ask)
	gw := fmt.Sprint(testNet.Gateway)
	got := []string{
		ack.MessageType().String(), ack.YourIPAddr.String(), net.IP(ack.SubnetMask()).String(), fmt.Sprint(ack.Router()), fmt.Sprint(ack.DNS()),
		ack.ServerIdentifier().String(), ack.HostName(), ack.DomainName(), fmt.Sprint(ack.DomainSearch().Labels), ack.IPAddressLeaseTime(0).String(),
	}
	want := []string{
		"ACK", testNet.Host(10).String(), "255.255.255.0", "[" + gw + "]", "[" + gw + "]",
		gw, "db", "lab.internal", "[lab.internal]", "168h0m0s",
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}

	// A lease remembered from another lab is refused, so the client asks anew.
	ask.UpdateOption(dhcpv4.OptRequestedIPAddress(net.IPv4(192, 0, 2, 7)))
	if nak := g.dhcp(ask); nak.MessageType() != dhcpv4.MessageTypeNak {
		t.Errorf("a foreign lease is answered with %v", nak.MessageType())
	}
}

// Whatever address a guest says it has, the answer goes to its own.
func TestInformIsAnsweredAtTheLease(t *testing.T) {
	s := newSwitch(t, Config{})
	_, g := plugRaw(t, s, "db", 10)
	ask, err := dhcpv4.NewInform(g.mac(), net.IPv4(192, 0, 2, 7))
	if err != nil {
		t.Fatal(err)
	}
	all := net.HardwareAddr{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
	g.send(udpFrame(g.mac(), all, netip.MustParseAddrPort("0.0.0.0:68"), netip.MustParseAddrPort("255.255.255.255:67"), ask.ToBytes()))
	ip := header.IPv4(g.next()[header.EthernetMinimumSize:])
	if got, want := netAddr(ip.DestinationAddress()), testNet.Host(10); got != want {
		t.Errorf("the answer goes to %s, want %s", got, want)
	}
	reply, err := dhcpv4.FromBytes(header.UDP(ip.Payload()).Payload())
	if err != nil || reply.MessageType() != dhcpv4.MessageTypeAck || !reply.YourIPAddr.IsUnspecified() {
		t.Errorf("the answer is %v, %v", reply, err)
	}
}

// resolver starts a name server on the host's loopback that stands for those
// of the world.
func resolver(t *testing.T, h dns.HandlerFunc) func() []netip.AddrPort {
	t.Helper()
	var pc net.PacketConn
	var ln net.Listener
	for { // until a port is free for both: a connection may have the one that is picked
		var err error
		if pc, err = net.ListenPacket("udp4", "127.0.0.1:0"); err != nil {
			t.Fatal(err)
		}
		if ln, err = net.Listen("tcp4", pc.LocalAddr().String()); err == nil {
			break
		}
		pc.Close()
		if !errors.Is(err, syscall.EADDRINUSE) {
			t.Fatal(err)
		}
	}
	for _, srv := range []*dns.Server{{PacketConn: pc, Handler: h}, {Listener: ln, Handler: h}} {
		started := make(chan struct{})
		srv.NotifyStartedFunc = func() { close(started) }
		go srv.ActivateAndServe()
		<-started
		t.Cleanup(func() { srv.Shutdown() })
	}
	return func() []netip.AddrPort { return []netip.AddrPort{netip.MustParseAddrPort(pc.LocalAddr().String())} }
}

// ask asks the gateway, from within the guest.
func (g *guest) ask(t *testing.T, network, name string, qtype uint16) *dns.Msg {
	t.Helper()
	to := fullAddr(netip.AddrPortFrom(testNet.Gateway, 53))
	var conn net.Conn
	var err error
	if network == "udp" {
		conn, err = gonet.DialUDP(g.stack, nil, &to, ipv4.ProtocolNumber)
	} else {
		conn, err = g.dial(testContext(t), netip.AddrPortFrom(testNet.Gateway, 53))
	}
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(patience))
	co := &dns.Conn{Conn: conn}
	m := new(dns.Msg).SetQuestion(name, qtype)
	if network == "tcp" {
		co.Conn = struct{ net.Conn }{conn} // dns.Conn tells TCP from UDP by the method ReadFrom
	}
	if err := co.WriteMsg(m); err != nil {
		t.Fatal(err)
	}
	r, err := co.ReadMsg()
	if err != nil {
		t.Fatalf("asking for %s %s: %v", dns.TypeToString[qtype], name, err)
	}
	if r.Id != m.Id {
		t.Errorf("asking for %s: the answer's id is not the question's", name)
	}
	return r
}

// brief renders an answer as its code and its records' data.
func brief(m *dns.Msg) string {
	s := []string{dns.RcodeToString[m.Rcode]}
	for _, rr := range m.Answer {
		s = append(s, strings.TrimPrefix(rr.String(), rr.Header().String()))
	}
	return strings.Join(s, " ")
}

func TestNames(t *testing.T) {
	s := newSwitch(t, Config{Resolvers: resolver(t, func(w dns.ResponseWriter, r *dns.Msg) {
		m := new(dns.Msg).SetReply(r)
		if r.Question[0].Name == "example.org." {
			rr, _ := dns.NewRR("example.org. 60 IN TXT \"from outside\"")
			m.Answer = append(m.Answer, rr)
		} else {
			m.Rcode = dns.RcodeNameError
		}
		_ = w.WriteMsg(m)
	})})
	web1, web2 := testNet.Host(11), testNet.Host(12)
	s.SetNames(map[string][]netip.Addr{
		"db": {testNet.Host(10)}, "web-1": {web1}, "web-2": {web2}, "web": {web1, web2}, "DB-alias": {testNet.Host(10)},
	}, nil)
	g := plugGuest(t, s, "db", 10)
	reverse := func(host byte) string {
		r, err := dns.ReverseAddr(testNet.Host(host).String())
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	db := testNet.Host(10).String()
	for _, tt := range []struct {
		name  string
		qtype uint16
		want  string
	}{
		{"db.", dns.TypeA, "NOERROR " + db},
		{"db.lab.internal.", dns.TypeA, "NOERROR " + db},
		{"DB.Lab.INTERNAL.", dns.TypeA, "NOERROR " + db},
		{"db-ALIAS.", dns.TypeA, "NOERROR " + db},
		{"db.", dns.TypeAAAA, "NOERROR"},
		{"db.lab.internal.", dns.TypeAAAA, "NOERROR"},
		{"db.lab.internal.", dns.TypeMX, "NOERROR"},
		{"web.", dns.TypeA, fmt.Sprintf("NOERROR %v %v", web2, web1)},
		{"web.lab.internal.", dns.TypeA, fmt.Sprintf("NOERROR %v %v", web1, web2)},
		{"lab.internal.", dns.TypeA, "NOERROR"},
		{"nobody.", dns.TypeA, "NXDOMAIN"},
		{"nobody.lab.internal.", dns.TypeA, "NXDOMAIN"},
		{"nobody.lab.internal.", dns.TypeAAAA, "NXDOMAIN"},
		{"a.db.lab.internal.", dns.TypeA, "NXDOMAIN"},
		{reverse(10), dns.TypePTR, "NOERROR db-alias.lab.internal."},
		{reverse(11), dns.TypePTR, "NOERROR web-1.lab.internal."},
		{reverse(99), dns.TypePTR, "NXDOMAIN"},
		{"example.org.", dns.TypeTXT, `NOERROR "from outside"`},
		{"nowhere.example.org.", dns.TypeA, "NXDOMAIN"},
		{"1.2.0.192.in-addr.arpa.", dns.TypePTR, "NXDOMAIN"},
	} {
		if got := brief(g.ask(t, "udp", tt.name, tt.qtype)); got != tt.want {
			t.Errorf("%s %s: %s, want %s", tt.name, dns.TypeToString[tt.qtype], got, tt.want)
		}
	}
	if got := brief(g.ask(t, "tcp", "db.", dns.TypeA)); got != "NOERROR "+db {
		t.Errorf("over TCP: %s", got)
	}
	s.SetNames(nil, nil)
	if got := brief(g.ask(t, "udp", "db.", dns.TypeA)); got != "NXDOMAIN" {
		t.Errorf("a name that was removed: %s", got)
	}
}

// Guests that reach one another otherwise too are told how; others, and of others, as ever.
func TestDirectNames(t *testing.T) {
	s := newSwitch(t, Config{})
	at := func(last byte) netip.Addr { return netip.AddrFrom4([4]byte{10, 130, 3, last}) }
	in := func(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, 16) }
	s.SetNames(map[string][]netip.Addr{
		"db": {testNet.Host(10)}, "web-1": {testNet.Host(11)}, "web-2": {testNet.Host(12)}, "web": {testNet.Host(11), testNet.Host(12)},
		"other": {testNet.Host(13)},
	}, map[netip.Addr]netip.Prefix{
		testNet.Host(10): in(at(10)), testNet.Host(11): in(at(11)), testNet.Host(13): in(netip.MustParseAddr("10.131.3.13")),
	})
	db, web2 := plugGuest(t, s, "db", 10), plugGuest(t, s, "web-2", 12)
	reverse, err := dns.ReverseAddr(at(11).String())
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		guest *guest
		name  string
		qtype uint16
		want  string
	}{
		{db, "web-1.", dns.TypeA, "NOERROR " + at(11).String()},
		{db, "web-1.lab.internal.", dns.TypeA, "NOERROR " + at(11).String()},
		{db, "db.", dns.TypeA, "NOERROR " + at(10).String()},
		{db, "web-2.", dns.TypeA, "NOERROR " + testNet.Host(12).String()},
		{db, "web.", dns.TypeA, fmt.Sprintf("NOERROR %v %v", testNet.Host(12), at(11))},
		{db, reverse, dns.TypePTR, "NOERROR web-1.lab.internal."},
		{db, "other.", dns.TypeA, "NOERROR " + testNet.Host(13).String()}, // it is in another network
		{web2, "web-1.", dns.TypeA, "NOERROR " + testNet.Host(11).String()},
	} {
		if got := brief(tt.guest.ask(t, "udp", tt.name, tt.qtype)); got != tt.want {
			t.Errorf("%s %s: %s, want %s", tt.name, dns.TypeToString[tt.qtype], got, tt.want)
		}
	}
}

func TestNoResolverIsAFailureAtOnce(t *testing.T) {
	s := newSwitch(t, Config{})
	g := plugGuest(t, s, "db", 10)
	if got := brief(g.ask(t, "udp", "example.org.", dns.TypeA)); got != "SERVFAIL" {
		t.Errorf("without a resolver: %s, want SERVFAIL", got)
	}
}

func TestLongAnswersGoOverTCP(t *testing.T) {
	s := newSwitch(t, Config{Resolvers: resolver(t, func(w dns.ResponseWriter, r *dns.Msg) {
		m := new(dns.Msg).SetReply(r)
		for i := range 100 {
			rr, _ := dns.NewRR(fmt.Sprintf("example.org. 60 IN A 192.0.2.%d", i))
			m.Answer = append(m.Answer, rr)
		}
		if _, udp := w.RemoteAddr().(*net.UDPAddr); udp {
			m.Truncate(dns.MinMsgSize)
		}
		_ = w.WriteMsg(m)
	})})
	g := plugGuest(t, s, "db", 10)
	if m := g.ask(t, "udp", "example.org.", dns.TypeA); !m.Truncated || len(m.Answer) == 100 {
		t.Errorf("over UDP: %d records, truncated %v", len(m.Answer), m.Truncated)
	}
	if m := g.ask(t, "tcp", "example.org.", dns.TypeA); m.Truncated || len(m.Answer) != 100 {
		t.Errorf("over TCP: %d records, truncated %v", len(m.Answer), m.Truncated)
	}
}

// outsideDial sends every connection to the outside to one place of the host,
// and tells which address it was meant for.
func outsideDial(s *Switch, to string) <-chan string {
	meant := make(chan string, 100)
	s.dial = func(ctx context.Context, network, addr string) (net.Conn, error) {
		meant <- network + " " + addr
		return new(net.Dialer).DialContext(ctx, network, to)
	}
	return meant
}

// Only ports that are exposed lead to the host's loopback, and only while they are.
func TestExpose(t *testing.T) {
	s := newSwitch(t, Config{})
	g := plugGuest(t, s, "db", 10)
	serve := func(network, at string) (port uint16) {
		ln, err := net.Listen(network, at)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { ln.Close() })
		go func() {
			for {
				c, err := ln.Accept()
				if err != nil {
					return
				}
				_, _ = io.WriteString(c, network)
				c.Close()
			}
		}()
		return netip.MustParseAddrPort(ln.Addr().String()).Port()
	}
	open, six, closed := serve("tcp4", "127.0.0.1:0"), serve("tcp6", "[::1]:0"), serve("tcp4", "127.0.0.1:0")
	answer := func(port uint16) string {
		t.Helper()
		c, err := g.dial(testContext(t), netip.AddrPortFrom(s.net.Gateway, port))
		if err != nil {
			return "refused"
		}
		defer c.Close()
		b, err := io.ReadAll(c)
		if err != nil {
			t.Error(err)
		}
		return string(b)
	}
	want := func(when string, port uint16, want string) {
		t.Helper()
		if got := answer(port); got != want {
			t.Errorf("%s: %s, want %s", when, got, want)
		}
	}
	want("nothing is exposed", open, "refused")
	ports := map[uint16][]string{open: Loopback(open), six: Loopback(six), 4: {fmt.Sprintf("localhost:%d", open)}, 5: {"127.0.0.1:1", fmt.Sprintf("127.0.0.1:%d", closed)}}
	s.Expose(ports)
	ports[open] = Loopback(closed) // the switch has its own copy
	want("an exposed port", open, "tcp4")
	want("a name that the host looks up", 4, "tcp4")
	want("the second of two", 5, "tcp4")
	want("a server of IPv6 alone", six, "tcp6")
	want("another port of the host", closed, "refused")
	s.SetNames(map[string][]netip.Addr{"proxy.corp": {s.net.Gateway}}, nil)
	if got := brief(g.ask(t, "udp", "proxy.corp.", dns.TypeA)); got != "NOERROR "+s.net.Gateway.String() {
		t.Errorf("a name from outside: %s", got)
	}
	if _, err := g.dial(testContext(t), netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), open)); err == nil {
		t.Error("the host's own loopback is reached by its address")
	}
	s.Expose(nil)
	want("not exposed any more", open, "refused")
}

func TestGuestReachesTheOutside(t *testing.T) {
	s := newSwitch(t, Config{})
	g := plugGuest(t, s, "db", 10)
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	go func() {
		if c, err := ln.Accept(); err == nil {
			defer c.Close()
			b, _ := io.ReadAll(c)
			_, _ = c.Write(b)
		}
	}()
	meant := outsideDial(s, ln.Addr().String())
	c, err := g.dial(testContext(t), netip.MustParseAddrPort("192.0.2.7:443"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	echo(t, c, make([]byte, 1<<20))
	if got := <-meant; got != "tcp4 192.0.2.7:443" {
		t.Errorf("the host dialed %s", got)
	}

	pc, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer pc.Close()
	meant = outsideDial(s, pc.LocalAddr().String())
	to := fullAddr(netip.MustParseAddrPort("192.0.2.7:123"))
	u, err := gonet.DialUDP(g.stack, nil, &to, ipv4.ProtocolNumber)
	if err != nil {
		t.Fatal(err)
	}
	defer u.Close()
	go func() {
		b := make([]byte, 100)
		if n, from, err := pc.ReadFrom(b); err == nil {
			_, _ = pc.WriteTo(b[:n], from)
		}
	}()
	if _, err := u.Write([]byte("what time is it")); err != nil {
		t.Fatal(err)
	}
	_ = u.SetDeadline(time.Now().Add(patience))
	b := make([]byte, 100)
	n, err := u.Read(b)
	if err != nil || string(b[:n]) != "what time is it" {
		t.Errorf("over UDP: %q, %v", b[:n], err)
	}
	if got := <-meant; got != "udp4 192.0.2.7:123" {
		t.Errorf("the host dialed %s", got)
	}
}

// Nothing but the outside can be dialed through the host. The host's services
// are never asked, whichever way a guest names them.
func TestHostIsOutOfReach(t *testing.T) {
	s := newSwitch(t, Config{})
	g := plugGuest(t, s, "db", 10)
	meant := outsideDial(s, "127.0.0.1:1")
	for _, to := range []netip.Addr{
		testNet.Gateway, testNet.Host(99), testNet.Host(255), testNet.Host(0),
		netip.MustParseAddr("169.254.169.254"), netip.MustParseAddr("224.0.0.251"),
		netip.MustParseAddr("240.0.0.1"), netip.MustParseAddr("255.255.255.255"),
		netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("127.0.0.53"), netip.MustParseAddr("0.0.0.0"),
	} {
		for _, port := range []uint16{80, 22} {
			// The guest's own stack would refuse some of these: the frames are
			// made by hand and sent to the gateway.
			s.fromPort(g.port, udpFrame(macOf(10), macOf(1), netip.AddrPortFrom(g.addr, 1000), netip.AddrPortFrom(to, port), []byte("x")))
			s.fromPort(g.port, synFrame(g.addr, netip.AddrPortFrom(to, port)))
		}
		if err := s.mayLeave(to); err == nil {
			t.Errorf("%v may leave", to)
		}
	}
	for _, to := range []netip.Addr{testNet.Gateway, netip.MustParseAddr("169.254.169.254")} {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		_, err := g.dial(ctx, netip.AddrPortFrom(to, 80))
		cancel()
		if err == nil || !strings.Contains(err.Error(), "connection was refused") {
			t.Errorf("dialing %v from the guest: %v, want a refusal", to, err)
		}
	}
	select {
	case a := <-meant:
		t.Errorf("the host dialed %s for a guest", a)
	default:
	}
	if err := s.mayLeave(netip.MustParseAddr("192.0.2.1")); err != nil {
		t.Errorf("the outside is closed: %v", err)
	}
	for addr, want := range map[string]string{
		"127.0.0.1":       "127.0.0.1 is in 127.0.0.0/8",
		"::1":             "::1 is not an IPv4 address",
		"169.254.169.254": "169.254.169.254 is in 169.254.0.0/16",
	} {
		if err := s.mayLeave(netip.MustParseAddr(addr)); err == nil || err.Error() != want {
			t.Errorf("%s: %v, want %s", addr, err, want)
		}
	}
	if !onLoopback(netip.MustParseAddr("127.0.0.1")) {
		t.Error("127.0.0.1 is not known as an address of the loopback interface")
	}
}

// synFrame returns a TCP connection request to the gateway.
func synFrame(from netip.Addr, to netip.AddrPort) []byte {
	b := udpFrame(macOf(10), macOf(1), netip.AddrPortFrom(from, 1000), to, make([]byte, header.TCPMinimumSize-header.UDPMinimumSize))
	ip := header.IPv4(b[header.EthernetMinimumSize:])
	b[header.EthernetMinimumSize+9] = uint8(header.TCPProtocolNumber)
	ip.SetChecksum(0)
	ip.SetChecksum(^ip.CalculateChecksum())
	header.TCP(ip.Payload()).Encode(&header.TCPFields{
		SrcPort: 1000, DstPort: to.Port(), DataOffset: header.TCPMinimumSize, Flags: header.TCPFlagSyn, WindowSize: 1000,
	})
	return b
}

func TestPingToTheOutsideIsRefusedOpenly(t *testing.T) {
	s := newSwitch(t, Config{})
	_, g := plugRaw(t, s, "db", 10)
	ping := func(to netip.Addr) []byte {
		b := udpFrame(g.mac(), macOf(1), netip.AddrPortFrom(testNet.Host(10), 0), netip.AddrPortFrom(to, 0), []byte("abcd"))
		b[header.EthernetMinimumSize+9] = uint8(header.ICMPv4ProtocolNumber)
		ip := header.IPv4(b[header.EthernetMinimumSize:])
		ip.SetChecksum(0)
		ip.SetChecksum(^ip.CalculateChecksum())
		echo := header.ICMPv4(ip.Payload())
		clear(echo[:8])
		echo.SetType(header.ICMPv4Echo)
		echo.SetIdent(7)
		echo.SetChecksum(header.ICMPv4Checksum(echo, 0))
		g.send(b)
		return b[header.EthernetMinimumSize:]
	}
	ask := ping(netip.MustParseAddr("192.0.2.1"))
	ip := header.IPv4(g.next()[header.EthernetMinimumSize:])
	no := header.ICMPv4(ip.Payload())
	if no.Type() != header.ICMPv4DstUnreachable || no.Code() != header.ICMPv4AdminProhibited || header.ICMPv4Checksum(no, 0) != no.Checksum() || !ip.IsChecksumValid() {
		t.Errorf("ping to the outside: type %d code %d", no.Type(), no.Code())
	}
	if d := cmp.Diff(ask[:28], []byte(no[8:])); d != "" {
		t.Errorf("the refusal quotes something else: %s", d)
	}
	ping(testNet.Gateway)
	yes := header.ICMPv4(header.IPv4(g.next()[header.EthernetMinimumSize:]).Payload())
	if yes.Type() != header.ICMPv4EchoReply || yes.Ident() != 7 {
		t.Errorf("ping to the gateway: type %d", yes.Type())
	}
}

func TestForward(t *testing.T) {
	s := newSwitch(t, Config{})
	g := plugGuest(t, s, "web", 10)
	g.listenEcho(t, 80)
	f, err := s.Forward(0, g.addr, 80)
	if err != nil {
		t.Fatal(err)
	}
	at := fmt.Sprintf("127.0.0.1:%d", f.HostPort())
	for range 3 { // the guest answers only once the client has half-closed
		c, err := net.Dial("tcp4", at)
		if err != nil {
			t.Fatal(err)
		}
		echo(t, c, make([]byte, 1<<20))
		c.Close()
	}

	_, err = s.Forward(f.HostPort(), g.addr, 81)
	var pe *PortError
	if !errors.As(err, &pe) || pe.Port != f.HostPort() || !errors.Is(err, syscall.EADDRINUSE) ||
		err.Error() != fmt.Sprintf("port %d of 127.0.0.1 is taken by another program", f.HostPort()) {
		t.Errorf("a port that is taken: %v", err)
	}

	open, err := net.Dial("tcp4", at)
	if err != nil {
		t.Fatal(err)
	}
	defer open.Close()
	if _, err := open.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	f.Stop()
	f.Stop()
	if _, err := io.ReadAll(open); err != nil && !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("a connection through a stopped forward: %v", err)
	}
	if _, err := net.Dial("tcp4", at); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("dialing a stopped forward: %v", err)
	}
}

// A client must not take a guest that is not there for one that says nothing.
func TestForwardToNobodyIsAReset(t *testing.T) {
	s := newSwitch(t, Config{})
	f, err := s.Forward(0, testNet.Host(10), 80)
	if err != nil {
		t.Fatal(err)
	}
	c, err := net.Dial("tcp4", fmt.Sprintf("127.0.0.1:%d", f.HostPort()))
	if err == nil { // the reset may come as early as that
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(patience))
		_, err = c.Read(make([]byte, 1))
	}
	if !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("got %v, want a reset", err)
	}
}

func TestPortErrorSaysWhatToDo(t *testing.T) {
	for _, tt := range []struct {
		err        PortError
		text, hint string
	}{
		{PortError{Port: 80, Err: syscall.EACCES}, "port 80 of 127.0.0.1 is reserved for root", "choose a host port from 1024 up, or 0 to have one picked"},
		{PortError{Port: 53, UDP: true, Err: syscall.EADDRINUSE}, "UDP port 53 of 127.0.0.1 is taken by another program", "`ss -lunp sport = :53` shows which program listens there; or choose another host port, or 0 to have one picked"},
		{PortError{Port: 8080, Err: syscall.EADDRINUSE}, "port 8080 of 127.0.0.1 is taken by another program", "`ss -ltnp sport = :8080` shows which program listens there; or choose another host port, or 0 to have one picked"},
	} {
		if tt.err.Error() != tt.text || tt.err.Hint() != tt.hint {
			t.Errorf("got %q, %q", tt.err.Error(), tt.err.Hint())
		}
	}
}

func TestFlowsAreBounded(t *testing.T) {
	l := flowLimit{max: 2}
	got := []bool{l.take(), l.take(), l.take()}
	if d := cmp.Diff([]bool{true, true, false}, got); d != "" {
		t.Errorf("a limit of two does not let exactly two in: %s", d)
	}
	l.give()
	if !l.take() {
		t.Error("what was given back cannot be taken")
	}
}

// callers is a listener whose connections come from where they say.
type callers chan net.Conn

func (l callers) Accept() (net.Conn, error) {
	c, ok := <-l
	if !ok {
		return nil, net.ErrClosed
	}
	return c, nil
}
func (l callers) Close() error   { return nil }
func (l callers) Addr() net.Addr { return nil }

type caller struct {
	net.Conn
	from netip.Addr
}

func (c caller) RemoteAddr() net.Addr {
	return net.TCPAddrFromAddrPort(netip.AddrPortFrom(c.from, 40000))
}

func TestConnectionsToTheNameServerAreBounded(t *testing.T) {
	s := newSwitch(t, Config{})
	in := make(callers, 8)
	call := func(host byte) net.Conn {
		far, near := net.Pipe()
		t.Cleanup(func() { far.Close() })
		in <- caller{near, testNet.Host(host)}
		return far
	}
	l := newGuestListener(s, in, 2)
	var open []net.Conn
	accept := func() {
		t.Helper()
		c, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		open = append(open, c)
	}
	call(10)
	call(10)
	extra := call(10)
	call(11) // another guest's share is its own
	accept()
	accept()
	accept()
	if got := addrOf(open[2].RemoteAddr()); got != testNet.Host(11) {
		t.Errorf("the third connection is of %s", got)
	}
	if _, err := extra.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("one too many: %v, want it closed", err)
	}
	open[0].Close()
	open[0].Close() // is given back once
	call(10)
	accept()
	extra = call(10)
	close(in)
	if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Accept: %v", err)
	}
	if _, err := extra.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("one too many again: %v, want it closed", err)
	}
}
