// SPDX-License-Identifier: Apache-2.0

package libvirt

import (
	"encoding/xml"
	"fmt"
	"net"
	"net/netip"
	"slices"

	golibvirt "github.com/digitalocean/go-libvirt"

	"github.com/labfile/lab/internal/lab"
)

// Network is everything that shapes a network of a lab's on the daemon's host
// (https://libvirt.org/formatnetwork.html).
type Network struct {
	Name   string
	UUID   golibvirt.UUID
	Kind   lab.NetworkKind
	Subnet lab.Network
}

// XML renders the network. It looks at nothing but n. Network interfaces have names of at
// most 15 bytes. It has the leases of the first machines, of two generations each: to add one
// to an active network, libvirt takes the network's firewall rules away for a moment, during
// which the host may refuse connections between machines.
func (n Network) XML() (string, error) {
	dhcp := &dhcpXML{}
	for host := lab.FirstHost; host < lab.FirstHost+leasedMachines; host++ {
		for slot := 1; slot <= leasedSlots; slot++ {
			dhcp.Hosts = append(dhcp.Hosts, leaseOf(n.Subnet.Direct(n.Subnet.Host(byte(host)), slot)))
		}
	}
	doc := networkXML{
		Name: n.Name, UUID: formatUUID(n.UUID), Bridge: bridge{fmt.Sprintf("lab%x", n.UUID[:4]), "off", 0},
		DNS: dnsXML{"no"}, IP: []networkIP{{Address: n.Subnet.Gateway.String(), Prefix: n.Subnet.Subnet.Bits(), DHCP: dhcp}},
	}
	if n.Kind == lab.NetworkNAT {
		doc.Forward = &forward{string(n.Kind)}
	}
	return encode(doc)
}

// How many machines have leases when a network is made, and how many each.
const (
	leasedMachines = 32
	leasedSlots    = 2
)

type networkXML struct {
	XMLName xml.Name    `xml:"network"`
	Name    string      `xml:"name"`
	UUID    string      `xml:"uuid"`
	Forward *forward    `xml:"forward"`
	Bridge  bridge      `xml:"bridge"`
	DNS     dnsXML      `xml:"dns"` // the lab's switch knows the names
	IP      []networkIP `xml:"ip"`
}

type forward struct {
	Mode string `xml:"mode,attr"`
}

type bridge struct {
	Name  string `xml:"name,attr"`
	STP   string `xml:"stp,attr"`
	Delay int    `xml:"delay,attr"`
}

type dnsXML struct {
	Enable string `xml:"enable,attr"`
}

type networkIP struct {
	Address string   `xml:"address,attr"`
	Prefix  int      `xml:"prefix,attr"`
	Netmask string   `xml:"netmask,attr,omitempty"` // others' networks may have this instead
	DHCP    *dhcpXML `xml:"dhcp"`
}

// dhcpXML leases nothing but what machines are given.
type dhcpXML struct {
	Hosts []leaseXML `xml:"host"`
}

// subnet is what the element is about; ok is false if that is no IPv4.
func (i networkIP) subnet() (gateway netip.Addr, subnet netip.Prefix, ok bool) {
	gateway, err := netip.ParseAddr(i.Address)
	if err != nil || !gateway.Is4() {
		return gateway, subnet, false
	}
	bits := i.Prefix
	if mask, err := netip.ParseAddr(i.Netmask); err == nil && mask.Is4() {
		bits, _ = net.IPMask(mask.AsSlice()).Size()
	}
	subnet, err = gateway.Prefix(bits)
	return gateway, subnet, err == nil && bits > 0
}

// leaseXML says which hardware address an address in a network is for. Either follows from
// the other, so that one that is there is right whoever uses it.
type leaseXML struct {
	XMLName xml.Name `xml:"host"`
	MAC     string   `xml:"mac,attr"`
	IP      string   `xml:"ip,attr"`
}

func leaseOf(address netip.Addr) leaseXML {
	return leaseXML{MAC: lab.MACOf(address), IP: address.String()}
}

// leases reports whether the network has one for the address.
func (n networkXML) leases(address netip.Addr) bool {
	return slices.ContainsFunc(n.IP, func(i networkIP) bool {
		return i.DHCP != nil && slices.ContainsFunc(i.DHCP.Hosts, func(l leaseXML) bool { return l.IP == address.String() })
	})
}
