// SPDX-License-Identifier: Apache-2.0

package network

import (
	"encoding/binary"
	"net/netip"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// refusal says why a frame from a guest is dropped; 0 means that it is not.
type refusal uint8

const (
	accepted refusal = iota
	refusedShort
	refusedMAC
	refusedProtocol
	refusedARP
	refusedMalformed
	refusedAddress
	refusedDHCP
	refusedFlow
)

func (r refusal) String() string {
	switch r {
	case refusedShort:
		return "frame shorter than an Ethernet header"
	case refusedMAC:
		return "sender's hardware address is not the machine's"
	case refusedProtocol:
		return "protocol is neither IPv4 nor ARP"
	case refusedARP:
		return "ARP for an address that is not the machine's"
	case refusedMalformed:
		return "malformed IPv4 packet"
	case refusedAddress:
		return "source address is not the machine's"
	case refusedDHCP:
		return "DHCP that only the gateway may send, or for another machine"
	case refusedFlow:
		return "connection of the other machine at the address"
	}
	return "accepted"
}

const (
	dhcpServerPort = 67
	dhcpClientPort = 68
)

// inspect decides whether the machine whose address ends in host may send the
// frame. What passes carries the machine's own hardware and IPv4 addresses, so
// nobody can speak for a neighbour or for the gateway. Only IPv4 and ARP pass:
// router advertisements and the like are how one guest would take over the
// traffic of others.
func (s *Switch) inspect(host byte, frame []byte) refusal {
	if len(frame) < header.EthernetMinimumSize {
		return refusedShort
	}
	if mac(frame[6:12]) != s.macs[host] {
		return refusedMAC
	}
	payload := frame[header.EthernetMinimumSize:]
	switch tcpip.NetworkProtocolNumber(binary.BigEndian.Uint16(frame[12:14])) {
	case header.ARPProtocolNumber:
		return s.inspectARP(host, payload)
	case header.IPv4ProtocolNumber:
		return s.inspectIPv4(host, payload)
	}
	return refusedProtocol
}

func (s *Switch) inspectARP(host byte, b []byte) refusal {
	arp := header.ARP(b)
	if !arp.IsValid() || mac(arp.HardwareAddressSender()) != s.macs[host] {
		return refusedARP
	}
	// A probe asks, before an address is taken, with the sender left open.
	if from := netip.AddrFrom4([4]byte(arp.ProtocolAddressSender())); from != s.net.Host(host) && !from.IsUnspecified() {
		return refusedARP
	}
	return accepted
}

func (s *Switch) inspectIPv4(host byte, b []byte) refusal {
	ip := header.IPv4(b)
	if len(b) < header.IPv4MinimumSize || !ip.IsValid(len(b)) {
		return refusedMalformed
	}
	from, to := ip.SourceAddress().As4(), ip.DestinationAddress().As4()
	own := s.net.Host(host).As4()
	if ip.TransportProtocol() == header.UDPProtocolNumber && ip.FragmentOffset() == 0 {
		udp := header.UDP(b[ip.HeaderLength():ip.TotalLength()])
		if len(udp) < header.UDPMinimumSize {
			return refusedMalformed
		}
		switch udp.DestinationPort() {
		case dhcpClientPort: // only the gateway hands out addresses
			return refusedDHCP
		case dhcpServerPort:
			if !s.ownDHCP(host, udp[header.UDPMinimumSize:]) {
				return refusedDHCP
			}
			if from == [4]byte{} && to == [4]byte{255, 255, 255, 255} && !ip.More() {
				return accepted // has no address yet
			}
		}
	}
	if from != own {
		return refusedAddress
	}
	return accepted
}

// ownDHCP reports whether a DHCP request asks for the machine's own lease.
func (s *Switch) ownDHCP(host byte, b []byte) bool {
	const chaddr = 28 // RFC 2131, figure 1
	return len(b) >= chaddr+6 && mac(b[chaddr:chaddr+6]) == s.macs[host]
}
