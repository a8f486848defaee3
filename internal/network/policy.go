// SPDX-License-Identifier: Apache-2.0

package network

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
)

// neverOutside are the destinations that a guest does not reach through the
// host, whatever listens there.
var neverOutside = []netip.Prefix{
	netip.MustParsePrefix("0.0.0.0/8"),      // Linux takes 0.0.0.0 for its own loopback
	netip.MustParsePrefix("127.0.0.0/8"),    // the host's loopback
	netip.MustParsePrefix("169.254.0.0/16"), // a cloud host's metadata service and its credentials
	netip.MustParsePrefix("224.0.0.0/4"),    // multicast on the host's network
	netip.MustParsePrefix("240.0.0.0/4"),    // reserved; 255.255.255.255 is the host's broadcast
}

// mayLeave says whether a guest's traffic to the address may be dialed from the
// host; the error is the reason. Everything that leaves for the outside passes
// here and nowhere else, but for ports that are exposed: see leave.
func (s *Switch) mayLeave(to netip.Addr) error {
	if !to.Is4() {
		return fmt.Errorf("%v is not an IPv4 address", to)
	}
	for _, p := range neverOutside {
		if p.Contains(to) {
			return fmt.Errorf("%v is in %v", to, p)
		}
	}
	// The lab's own subnet may exist outside too, as somebody else's.
	if s.net.Subnet.Contains(to) {
		return fmt.Errorf("%v is in the lab's own %v", to, s.net.Subnet)
	}
	if onLoopback(to) {
		return fmt.Errorf("%v is on the host's loopback interface", to)
	}
	return nil
}

// Expose lets guests reach what the host reaches, by TCP ports of the gateway, in the place
// of those that were exposed before. Each port leads to the first of its HOST:PORT that
// answers; the host's own resolver knows what a name means.
func (s *Switch) Expose(ports map[uint16][]string) {
	own := make(map[uint16][]string, len(ports))
	for port, to := range ports {
		own[port] = slices.Clone(to)
	}
	s.exposed.Store(&own)
}

// Loopback returns where Expose finds a port of the host's loopback.
func Loopback(port uint16) []string {
	return []string{
		netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), port).String(),
		netip.AddrPortFrom(netip.IPv6Loopback(), port).String(), // some servers listen there alone
	}
}

// leave returns where the host is to dial a guest's connection to the address, in the order
// in which it is tried: the address itself or, for an exposed port of the gateway, what
// that leads to.
func (s *Switch) leave(to netip.AddrPort) ([]string, error) {
	if to.Addr() == s.net.Gateway {
		if hosts := (*s.exposed.Load())[to.Port()]; len(hosts) > 0 {
			return hosts, nil
		}
	}
	return []string{to.String()}, s.mayLeave(to.Addr())
}

// onLoopback reports whether the address was given to a loopback interface of
// this host: 127.0.0.0/8 is not the only thing found there. An address that
// cannot be looked up counts as one.
func onLoopback(a netip.Addr) bool {
	ifs, err := net.Interfaces()
	if err != nil {
		return true
	}
	for _, i := range ifs {
		if i.Flags&net.FlagLoopback == 0 {
			continue
		}
		addrs, err := i.Addrs()
		if err != nil {
			return true
		}
		for _, addr := range addrs {
			n, ok := addr.(*net.IPNet)
			if ok && n.IP.Equal(a.AsSlice()) {
				return true
			}
		}
	}
	return false
}
