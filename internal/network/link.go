// SPDX-License-Identifier: Apache-2.0

package network

import (
	"bytes"
	"net/netip"
	"sync/atomic"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/waiter"
)

// link is the gateway's end of the segment. It needs no ARP: an address
// decides its hardware address, so a guest cannot claim another's.
type link struct {
	sw         *Switch
	dispatcher atomic.Pointer[stack.NetworkDispatcher]
}

var _ stack.LinkEndpoint = (*link)(nil)

// deliver hands an IPv4 packet to the stack. The packet is copied.
func (l *link) deliver(packet []byte) {
	d := l.dispatcher.Load()
	if d == nil {
		return
	}
	pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(packet)})
	(*d).DeliverNetworkPacket(header.IPv4ProtocolNumber, pkt)
	pkt.DecRef()
}

// WritePackets queues the stack's packets at the ports they are for. It never
// blocks.
func (l *link) WritePackets(pkts stack.PacketBufferList) (int, tcpip.Error) {
	var eth [header.EthernetMinimumSize]byte
	for _, pkt := range pkts.AsSlice() {
		to := header.IPv4(pkt.NetworkHeader().Slice()).DestinationAddress()
		parts := append(make([][]byte, 0, 8), eth[:])
		parts = append(parts, pkt.AsSlices()...)
		if to == header.IPv4Broadcast {
			l.sw.gateway.ethernet(eth[:], mac{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, header.IPv4ProtocolNumber)
			l.sw.floodDHCP(bytes.Join(parts[1:], nil), parts...)
		} else if host, ok := l.sw.hostOf(netAddr(to)); ok {
			l.sw.gateway.ethernet(eth[:], l.sw.macs[host], header.IPv4ProtocolNumber)
			if l.sw.shared[host].Load() != nil {
				l.sw.deliver(host, bytes.Join(parts[1:], nil), parts...)
			} else if p := l.sw.ports[host].Load(); p != nil {
				if to := header.UDP(pkt.TransportHeader().Slice()); pkt.TransportProtocolNumber != header.UDPProtocolNumber ||
					len(to) < header.UDPMinimumSize || to.SourcePort() != dhcpServerPort {
					p.touch()
				}
				p.send(parts...)
			}
		}
	}
	return pkts.Len(), nil
}

// Attach and the methods below are the rest of stack.LinkEndpoint.
func (l *link) Attach(d stack.NetworkDispatcher) {
	if d == nil {
		l.dispatcher.Store(nil)
		return
	}
	l.dispatcher.Store(&d)
}

func (l *link) IsAttached() bool { return l.dispatcher.Load() != nil }

func (l *link) MTU() uint32 { return mtu }

func (l *link) SetMTU(uint32) {}

func (l *link) MaxHeaderLength() uint16 { return 0 }

func (l *link) LinkAddress() tcpip.LinkAddress {
	m := l.sw.macs[l.sw.net.Gateway.As4()[3]]
	return tcpip.LinkAddress(m[:])
}

func (l *link) SetLinkAddress(tcpip.LinkAddress) {}

// Capabilities spares the stack the checksums of what comes in: it came through
// the host's memory, not over a wire.
func (l *link) Capabilities() stack.LinkEndpointCapabilities {
	return stack.CapabilityRXChecksumOffload
}

func (l *link) ARPHardwareType() header.ARPHardwareType { return header.ARPHardwareNone }

func (l *link) AddHeader(*stack.PacketBuffer) {}

func (l *link) ParseHeader(*stack.PacketBuffer) bool { return true }

func (l *link) Wait() {}

func (l *link) Close() {}

func (l *link) SetOnCloseAction(func()) {}

func newQueue() *waiter.Queue { return new(waiter.Queue) }

func tcpAddr(a netip.Addr) tcpip.Address { return tcpip.AddrFrom4(a.As4()) }

func netAddr(a tcpip.Address) netip.Addr { return netip.AddrFrom4(a.As4()) }

func fullAddr(a netip.AddrPort) tcpip.FullAddress {
	return tcpip.FullAddress{NIC: nic, Addr: tcpAddr(a.Addr()), Port: a.Port()}
}
