// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"net/netip"
	"testing"
)

// TestDirectNetworks are apart from one another, and from every lab's switch.
func TestDirectNetworks(t *testing.T) {
	seen := map[netip.Prefix]bool{}
	for attempt := range DirectNetworks {
		n := DirectNetworkOf("shop-1f3a9c2b", NetworkNAT, attempt)
		if seen[n.Subnet] || n.Subnet.Bits() != 16 || !netip.MustParsePrefix("10.128.0.0/9").Contains(n.Gateway) || !n.Subnet.Contains(n.Gateway) {
			t.Fatalf("%v, seen %v", n, seen[n.Subnet])
		}
		seen[n.Subnet] = true
	}
	if DirectNetworkOf("a", NetworkNAT, 0) == DirectNetworkOf("a", NetworkIsolated, 0) {
		t.Error("two kinds begin with the same subnet")
	}
	n := DirectNetworkOf("shop-1f3a9c2b", NetworkNAT, 0)
	addrs, machines := map[netip.Addr]bool{n.Gateway: true}, NetworkOf("shop-1f3a9c2b")
	for host := byte(FirstHost); host <= 254; host++ {
		for slot := 1; slot <= DirectSlots; slot++ {
			a := n.Direct(machines.Host(host), slot)
			if addrs[a] || !n.Subnet.Contains(a) || DirectSlot(a) != slot {
				t.Fatalf("host %d, slot %d: %s in slot %d, seen %v", host, slot, a, DirectSlot(a), addrs[a])
			}
			addrs[a] = true
			if MACOf(a) == MACOf(machines.Host(host)) {
				t.Fatalf("%s has the hardware address of %s", a, machines.Host(host))
			}
		}
	}
}
