// SPDX-License-Identifier: Apache-2.0

package network

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"syscall"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/icmp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
	"gvisor.dev/gvisor/pkg/waiter"
)

// mtu is that of ordinary Ethernet: machines behave as they would elsewhere.
const mtu = 1500

// The sizes of a connection's send and receive buffers in bytes: at first, and
// what the stack may let each grow to.
const (
	tcpBuffer    = 128 << 10
	maxTCPBuffer = 512 << 10
)

// nic is the gateway's one interface, the segment.
const nic tcpip.NICID = 1

// gateway is the switch's own host on the segment: a TCP/IP stack in user space
// that answers for every address outside the subnet.
type gateway struct {
	sw    *Switch
	mac   mac
	stack *stack.Stack
	link  *link
	dns   *nameServer
	dhcp  *leaseServer
}

func newGateway(s *Switch, resolvers func() []netip.AddrPort) (*gateway, error) {
	g := &gateway{sw: s, mac: s.macs[s.net.Gateway.As4()[3]], link: &link{sw: s}}
	g.stack = stack.New(stack.Options{
		NetworkProtocols:   []stack.NetworkProtocolFactory{ipv4.NewProtocol},
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol, udp.NewProtocol, icmp.NewProtocol4},
	})
	if err := g.configure(); err != nil {
		g.stack.Destroy()
		return nil, err
	}
	var err error
	if g.dns, err = newNameServer(g, resolvers); err != nil {
		g.stack.Destroy()
		return nil, err
	}
	if g.dhcp, err = newLeaseServer(g); err != nil {
		g.dns.close()
		g.stack.Destroy()
		return nil, err
	}
	return g, nil
}

// configure gives the stack its interface, its address and its outward ways.
func (g *gateway) configure() error {
	if err := g.stack.CreateNIC(nic, g.link); err != nil {
		return fmt.Errorf("creating the gateway's interface: %v", err)
	}
	if err := g.stack.AddProtocolAddress(nic, tcpip.ProtocolAddress{
		Protocol:          ipv4.ProtocolNumber,
		AddressWithPrefix: tcpAddr(g.sw.net.Gateway).WithPrefix(),
	}, stack.AddressProperties{}); err != nil {
		return fmt.Errorf("giving the gateway its address: %v", err)
	}
	subnet, err := tcpip.NewSubnet(tcpAddr(g.sw.net.Subnet.Addr()), tcpip.MaskFromBytes(net.CIDRMask(g.sw.net.Subnet.Bits(), 32)))
	if err != nil {
		return fmt.Errorf("giving the gateway its route: %w", err)
	}
	g.stack.SetRouteTable([]tcpip.Route{{Destination: subnet, NIC: nic}})
	// It answers for the addresses of the whole world.
	if err := g.stack.SetPromiscuousMode(nic, true); err != nil {
		return fmt.Errorf("opening the gateway's interface: %v", err)
	}
	if err := g.stack.SetSpoofing(nic, true); err != nil {
		return fmt.Errorf("opening the gateway's interface: %v", err)
	}
	sack := tcpip.TCPSACKEnabled(true)
	if err := g.stack.SetTransportProtocolOption(tcp.ProtocolNumber, &sack); err != nil {
		return fmt.Errorf("configuring the gateway's TCP: %v", err)
	}
	// A guest that lets its connections stall must not fill the host's memory. The
	// way to a guest is short, so that small buffers do not slow it down.
	send := tcpip.TCPSendBufferSizeRangeOption{Min: tcp.MinBufferSize, Default: tcpBuffer, Max: maxTCPBuffer}
	receive := tcpip.TCPReceiveBufferSizeRangeOption{Min: tcp.MinBufferSize, Default: tcpBuffer, Max: maxTCPBuffer}
	for _, option := range []tcpip.SettableTransportProtocolOption{&send, &receive} {
		if err := g.stack.SetTransportProtocolOption(tcp.ProtocolNumber, option); err != nil {
			return fmt.Errorf("configuring the gateway's TCP: %v", err)
		}
	}
	forwarder := tcp.NewForwarder(g.stack, 0, maxTCPFlows*256, g.forwardTCP)
	g.stack.SetTransportProtocolHandler(tcp.ProtocolNumber, forwarder.HandlePacket)
	g.stack.SetTransportProtocolHandler(udp.ProtocolNumber, udp.NewForwarder(g.stack, g.forwardUDP).HandlePacket)
	return nil
}

func (g *gateway) close() {
	g.dns.close()
	g.dhcp.close()
	g.stack.Destroy()
}

// receive takes an inspected frame that was sent to the gateway or to a group.
func (g *gateway) receive(from *Port, frame []byte) {
	payload := frame[header.EthernetMinimumSize:]
	if header.Ethernet(frame).Type() == header.ARPProtocolNumber {
		g.answerARP(from, payload)
		return
	}
	ip := header.IPv4(payload)
	if frame[0]&1 == 1 {
		// Of all that is said to everybody only DHCP concerns the gateway. A later
		// fragment has no UDP header, and nothing that inspect has looked at.
		if ip.TransportProtocol() != header.UDPProtocolNumber || ip.DestinationAddress() != header.IPv4Broadcast ||
			ip.FragmentOffset() != 0 || header.UDP(payload[ip.HeaderLength():]).DestinationPort() != dhcpServerPort {
			return
		}
	}
	if ip.TransportProtocol() == header.ICMPv4ProtocolNumber && ip.DestinationAddress() != tcpAddr(g.sw.net.Gateway) {
		g.refusePing(from, payload)
		return
	}
	g.link.deliver(payload[:ip.TotalLength()])
}

// answerARP tells who has the gateway's address. Machines answer for themselves.
func (g *gateway) answerARP(to *Port, b []byte) {
	ask := header.ARP(b)
	if ask.Op() != header.ARPRequest || netip.AddrFrom4([4]byte(ask.ProtocolAddressTarget())) != g.sw.net.Gateway {
		return
	}
	dst := g.sw.macs[to.host]
	reply := make([]byte, header.EthernetMinimumSize+header.ARPSize)
	g.ethernet(reply, dst, header.ARPProtocolNumber)
	arp := header.ARP(reply[header.EthernetMinimumSize:])
	arp.SetIPv4OverEthernet()
	arp.SetOp(header.ARPReply)
	copy(arp.HardwareAddressSender(), g.mac[:])
	copy(arp.ProtocolAddressSender(), ask.ProtocolAddressTarget())
	copy(arp.HardwareAddressTarget(), dst[:])
	copy(arp.ProtocolAddressTarget(), ask.ProtocolAddressSender())
	to.send(reply)
}

// refusePing answers a ping to the outside with "administratively prohibited":
// it cannot be passed on without privileges, and the stack, which answers for
// every address, would otherwise claim that everything is alive.
func (g *gateway) refusePing(to *Port, packet []byte) {
	ping := header.IPv4(packet)
	if t := header.ICMPv4(ping.Payload()); len(t) < header.ICMPv4MinimumSize || t.Type() != header.ICMPv4Echo || ping.FragmentOffset() != 0 {
		return
	}
	quote := packet[:min(int(ping.TotalLength()), int(ping.HeaderLength())+8)] // RFC 792
	size := header.IPv4MinimumSize + header.ICMPv4MinimumSize + len(quote)
	reply := make([]byte, header.EthernetMinimumSize+size)
	g.ethernet(reply, g.sw.macs[to.host], header.IPv4ProtocolNumber)
	ip := header.IPv4(reply[header.EthernetMinimumSize:])
	ip.Encode(&header.IPv4Fields{
		TotalLength: uint16(size),
		TTL:         64,
		Protocol:    uint8(header.ICMPv4ProtocolNumber),
		SrcAddr:     tcpAddr(g.sw.net.Gateway),
		DstAddr:     ping.SourceAddress(),
	})
	ip.SetChecksum(^ip.CalculateChecksum())
	icmp := header.ICMPv4(ip[header.IPv4MinimumSize:])
	icmp.SetType(header.ICMPv4DstUnreachable)
	icmp.SetCode(header.ICMPv4AdminProhibited)
	copy(icmp[header.ICMPv4MinimumSize:], quote)
	icmp.SetChecksum(header.ICMPv4Checksum(icmp, 0))
	to.send(reply)
}

// ethernet writes the header of a frame from the gateway.
func (g *gateway) ethernet(b []byte, dst mac, protocol tcpip.NetworkProtocolNumber) {
	header.Ethernet(b).Encode(&header.EthernetFields{
		SrcAddr: tcpip.LinkAddress(g.mac[:]),
		DstAddr: tcpip.LinkAddress(dst[:]),
		Type:    protocol,
	})
}

// dialTCP connects to a machine. The stack's own dial gives up on a silent guest
// only after minutes, so ctx decides. A guest that refuses is ECONNREFUSED, as on
// any network. Where two machines share the address, the connection is made p's before
// its first segment leaves.
func (g *gateway) dialTCP(ctx context.Context, p *Port, to netip.AddrPort) (net.Conn, error) {
	wq := newQueue()
	ep, terr := g.stack.NewEndpoint(tcp.ProtocolNumber, ipv4.ProtocolNumber, wq)
	if terr != nil {
		return nil, errors.New(terr.String())
	}
	started, notify := waiter.NewChannelEntry(waiter.WritableEvents)
	wq.EventRegister(&started)
	defer wq.EventUnregister(&started)
	if err := g.claim(ep, protoTCP, p, to); err != nil {
		ep.Close()
		return nil, err
	}
	terr = ep.Connect(fullAddr(to))
	if _, ok := terr.(*tcpip.ErrConnectStarted); ok {
		select {
		case <-ctx.Done():
			ep.Close()
			return nil, ctx.Err()
		case <-notify:
		}
		terr = ep.LastError()
	}
	if terr == nil {
		return gonet.NewTCPConn(wq, ep), nil
	}
	ep.Close()
	if _, ok := terr.(*tcpip.ErrConnectionRefused); ok {
		return nil, syscall.ECONNREFUSED
	}
	return nil, errors.New(terr.String())
}

// claim makes the connection, or flow, that an endpoint is about to make the port's.
func (g *gateway) claim(ep tcpip.Endpoint, proto uint8, p *Port, to netip.AddrPort) error {
	sh := g.sw.shared[p.host].Load()
	if sh == nil {
		if now := g.sw.ports[p.host].Load(); now != p {
			return ErrReplaced
		}
		return nil
	}
	if err := ep.Bind(tcpip.FullAddress{NIC: nic, Addr: tcpAddr(g.sw.net.Gateway)}); err != nil {
		return errors.New(err.String())
	}
	from, err := ep.GetLocalAddress()
	if err != nil {
		return errors.New(err.String())
	}
	key := flowKey{proto: proto, peer: g.sw.net.Gateway.As4(), peerPort: from.Port, ownPort: to.Port()}
	if !sh.claim(key, p.seat) {
		return ErrReplaced
	}
	return nil
}

// forwardTCP carries one connection of a guest to the outside. The stack calls
// it in a goroutine of its own, for every connection request to an address
// that is not the gateway's.
func (g *gateway) forwardTCP(r *tcp.ForwarderRequest) {
	id := r.ID()
	to := netip.AddrPortFrom(netAddr(id.LocalAddress), id.LocalPort)
	p := g.sw.ownerOf(protoTCP, netip.AddrPortFrom(netAddr(id.RemoteAddress), id.RemotePort), to)
	hosts, err := g.sw.leave(to)
	if p == nil || err != nil || !p.tcpFlows.take() {
		r.Complete(true)
		return
	}
	defer p.tcpFlows.give()
	outside, err := g.dialFirst(p.ctx, hosts)
	if err != nil {
		r.Complete(true)
		return
	}
	guest, err := g.accept(r)
	if err != nil {
		outside.Close()
		return
	}
	defer context.AfterFunc(p.ctx, func() { _ = outside.SetDeadline(past) })()
	Pipe(p.tie(guest), outside)
}

// dialFirst connects to the first HOST:PORT that answers.
func (g *gateway) dialFirst(ctx context.Context, hosts []string) (conn net.Conn, err error) {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	for _, to := range hosts {
		family := "tcp" // of a name, whatever it has
		if addr, err := netip.ParseAddrPort(to); err == nil && addr.Addr().Is4() {
			family = "tcp4"
		} else if err == nil {
			family = "tcp6"
		}
		if conn, err = g.sw.dial(ctx, family, to); err == nil {
			break
		}
	}
	return conn, err
}

// accept finishes the handshake with the guest.
func (g *gateway) accept(r *tcp.ForwarderRequest) (net.Conn, error) {
	wq := newQueue()
	ep, err := r.CreateEndpoint(wq)
	r.Complete(err != nil)
	if err != nil {
		return nil, errors.New(err.String())
	}
	// A guest that vanished must not hold a connection of the host for ever.
	ep.SocketOptions().SetKeepAlive(true)
	return gonet.NewTCPConn(wq, ep), nil
}

// forwardUDP carries one flow of a guest to the outside, until it was idle for
// a while. The stack calls it with the flow's first packet and waits for it.
func (g *gateway) forwardUDP(r *udp.ForwarderRequest) {
	id := r.ID()
	to := netip.AddrPortFrom(netAddr(id.LocalAddress), id.LocalPort)
	p := g.sw.ownerOf(protoUDP, netip.AddrPortFrom(netAddr(id.RemoteAddress), id.RemotePort), to)
	if p == nil || g.sw.mayLeave(to.Addr()) != nil || !p.udpFlows.take() {
		return
	}
	wq := newQueue()
	ep, terr := r.CreateEndpoint(wq)
	if terr != nil {
		p.udpFlows.give()
		return
	}
	guest := gonet.NewUDPConn(wq, ep)
	g.sw.wg.Go(func() {
		defer p.udpFlows.give()
		outside, err := g.sw.dial(p.ctx, "udp4", to.String()) // sends nothing, so it does not block
		if err != nil {
			guest.Close()
			return
		}
		idle := udpIdle
		if to.Port() == 53 {
			idle = dnsIdle
		}
		relay(p.ctx, guest, outside, idle)
	})
}

// UDP has no end, so a flow ends when nothing went through it for a while. A
// resolver uses a new flow for every question.
const (
	udpIdle = 90 * time.Second
	dnsIdle = 10 * time.Second
)

// relay passes packets both ways until neither way had one for the idle time.
func relay(ctx context.Context, a, b net.Conn, idle time.Duration) {
	timer := time.NewTimer(idle)
	defer timer.Stop()
	alive := make(chan struct{}, 1)
	ended := make(chan struct{}, 2)
	pump := func(dst, src net.Conn) {
		defer func() { ended <- struct{}{} }()
		buf := make([]byte, 1<<16)
		for {
			n, err := src.Read(buf)
			if err != nil {
				return
			}
			select {
			case alive <- struct{}{}:
			default:
			}
			_, _ = dst.Write(buf[:n]) // a packet that cannot be sent is lost
		}
	}
	go pump(a, b)
	go pump(b, a)
	left := 2
wait:
	for {
		select {
		case <-alive:
			timer.Reset(idle)
		case <-timer.C:
			break wait
		case <-ctx.Done():
			break wait
		case <-ended:
			left--
			break wait
		}
	}
	for _, c := range []net.Conn{a, b} {
		_ = c.SetDeadline(past)
		_ = c.Close()
	}
	for ; left > 0; left-- {
		<-ended
	}
}
