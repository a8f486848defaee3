// SPDX-License-Identifier: Apache-2.0

package supervise

import (
	"net/netip"
	"slices"
	"strings"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/network"
	"github.com/labfile/lab/internal/proxy"
)

// maxRelays bounds the proxies that guests reach. There are more than a command has only if
// the proxies of this host change and change.
const maxRelays = 32

// expose replaces what the guests reach of this host.
func (s *supervisor) expose(ports []lab.Exposed, relays []proxy.Relay) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.exposed, s.relays = ports, relays
	s.exposeNow()
}

// relay adds proxies to what the guests reach of this host.
func (s *supervisor) relay(relays []proxy.Relay) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, r := range relays {
		s.relays = slices.DeleteFunc(s.relays, func(old proxy.Relay) bool { return old.Port == r.Port })
		s.relays = append(s.relays, r)
	}
	s.relays = slices.Clone(s.relays[max(0, len(s.relays)-maxRelays):])
	s.exposeNow()
}

// exposeNow tells the switch what the guests reach of this host. Called with s.mu held.
func (s *supervisor) exposeNow() {
	if s.sw == nil {
		return
	}
	open := make(map[uint16][]string)
	for _, r := range s.relays {
		open[r.Port] = r.To
	}
	for _, e := range s.exposed { // what the Labfile says comes first
		open[e.Port] = network.Loopback(e.Port)
	}
	s.sw.Expose(open)
	s.sw.SetNames(s.names(), s.direct())
}

// namesOfHost are the names that lead to the gateway, and by it to this host. Called with
// s.mu held.
func (s *supervisor) namesOfHost() map[string][]netip.Addr {
	gateway := []netip.Addr{lab.NetworkOf(s.cfg.ID).Gateway}
	names := map[string][]netip.Addr{lab.GatewayName: gateway}
	for _, r := range s.relays {
		names[strings.TrimSuffix(r.Name, "."+lab.Domain)] = gateway
	}
	for _, e := range s.exposed {
		names[e.Name] = gateway
	}
	return names
}
