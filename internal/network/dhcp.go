// SPDX-License-Identifier: Apache-2.0

package network

import (
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/rfc1035label"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"

	"github.com/labfile/lab/internal/lab"
)

// leaseTime is long, because leases never change and a supervisor may be away
// for a while.
const leaseTime = 7 * 24 * time.Hour

// leaseServer hands out the addresses. Every lease of the subnet is known from
// the hardware address alone, so there is nothing to remember.
type leaseServer struct {
	sw   *Switch
	conn *gonet.UDPConn
	done chan struct{}
}

func newLeaseServer(g *gateway) (*leaseServer, error) {
	wq := newQueue()
	ep, err := g.stack.NewEndpoint(udp.ProtocolNumber, ipv4.ProtocolNumber, wq)
	if err != nil {
		return nil, fmt.Errorf("starting the DHCP server: %v", err)
	}
	ep.SocketOptions().SetBroadcast(true)
	if err := ep.Bind(tcpip.FullAddress{NIC: nic, Port: dhcpServerPort}); err != nil {
		ep.Close()
		return nil, fmt.Errorf("starting the DHCP server: %v", err)
	}
	l := &leaseServer{sw: g.sw, conn: gonet.NewUDPConn(wq, ep), done: make(chan struct{})}
	go l.serve()
	return l, nil
}

func (l *leaseServer) close() {
	_ = l.conn.SetDeadline(past)
	<-l.done
	_ = l.conn.Close()
}

func (l *leaseServer) serve() {
	defer close(l.done)
	buf := make([]byte, mtu)
	for {
		n, _, err := l.conn.ReadFrom(buf)
		if err != nil {
			return
		}
		ask, err := dhcpv4.FromBytes(buf[:n])
		if err != nil {
			continue // a guest's nonsense
		}
		reply, err := l.answer(ask)
		if err != nil {
			l.sw.log.Debug("answering a DHCP request", "err", err)
		}
		if reply == nil {
			continue
		}
		to := net.UDPAddr{IP: net.IPv4bcast, Port: dhcpClientPort}
		if !ask.ClientIPAddr.IsUnspecified() && reply.MessageType() == dhcpv4.MessageTypeAck {
			// It has an address and asks for more time, or for the rest. Which one
			// it has is not the guest's to say; and the answer to the latter names
			// none (RFC 2131, section 4.3.5).
			if addr, ok := l.leaseOf(ask.ClientHWAddr); ok {
				to.IP = addr.AsSlice()
			}
		}
		_, _ = l.conn.WriteTo(reply.ToBytes(), &to)
	}
}

// answer returns the reply to a request, or nil if there is none.
func (l *leaseServer) answer(ask *dhcpv4.DHCPv4) (*dhcpv4.DHCPv4, error) {
	addr, ok := l.leaseOf(ask.ClientHWAddr)
	if !ok || ask.OpCode != dhcpv4.OpcodeBootRequest {
		return nil, nil
	}
	kind := dhcpv4.MessageTypeAck
	switch ask.MessageType() {
	case dhcpv4.MessageTypeDiscover:
		kind = dhcpv4.MessageTypeOffer
	case dhcpv4.MessageTypeRequest:
		wanted := ask.RequestedIPAddress()
		if wanted == nil || wanted.IsUnspecified() {
			wanted = ask.ClientIPAddr
		}
		if !wanted.Equal(addr.AsSlice()) {
			kind = dhcpv4.MessageTypeNak // a lease remembered from elsewhere
		}
	case dhcpv4.MessageTypeInform:
	default:
		return nil, nil
	}
	mods := []dhcpv4.Modifier{
		dhcpv4.WithMessageType(kind),
		dhcpv4.WithServerIP(l.sw.net.Gateway.AsSlice()),
		dhcpv4.WithOption(dhcpv4.OptServerIdentifier(l.sw.net.Gateway.AsSlice())),
	}
	if kind != dhcpv4.MessageTypeNak {
		mods = append(mods,
			dhcpv4.WithNetmask(net.CIDRMask(l.sw.net.Subnet.Bits(), 32)),
			dhcpv4.WithRouter(l.sw.net.Gateway.AsSlice()),
			dhcpv4.WithDNS(l.sw.net.Gateway.AsSlice()),
			dhcpv4.WithOption(dhcpv4.OptDomainName(lab.Domain)),
			dhcpv4.WithOption(dhcpv4.OptDomainSearch(&rfc1035label.Labels{Labels: []string{lab.Domain}})),
		)
		if p := l.sw.portAt(addr); p != nil {
			mods = append(mods, dhcpv4.WithOption(dhcpv4.OptHostName(string(p.name))))
		}
		if ask.MessageType() != dhcpv4.MessageTypeInform { // RFC 2131, section 4.3.5
			mods = append(mods, dhcpv4.WithYourIP(addr.AsSlice()), dhcpv4.WithLeaseTime(uint32(leaseTime/time.Second)))
		}
	}
	return dhcpv4.NewReplyFromRequest(ask, mods...)
}

// leaseOf returns the address that belongs to a hardware address.
func (l *leaseServer) leaseOf(hw net.HardwareAddr) (netip.Addr, bool) {
	if len(hw) != 6 || mac(hw) != l.sw.macs[hw[5]] {
		return netip.Addr{}, false
	}
	addr := l.sw.net.Host(hw[5])
	_, ok := l.sw.hostOf(addr)
	return addr, ok
}
