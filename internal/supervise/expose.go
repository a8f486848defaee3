// SPDX-License-Identifier: Apache-2.0

package supervise

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/labfile/lab/internal/dirs"
	"github.com/labfile/lab/internal/fsutil"
	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/network"
	"github.com/labfile/lab/internal/proxy"
)

// maxRelays bounds the relays that guests were told of. There are more than a command has
// only if the proxies of this host change and change.
const maxRelays = 32

// expose replaces the ports of this host's loopback that the guests reach.
func (s *supervisor) expose(ports []lab.Exposed) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.exposed = ports
	s.exposeNow()
}

// replaceRelays replaces the relays that the guests were told of.
func (s *supervisor) replaceRelays(relays []proxy.Relay) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.setRelays(relays)
}

// addRelays adds to the relays that the guests were told of. A port that led to another
// proxy leads to this one.
func (s *supervisor) addRelays(relays []proxy.Relay) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := slices.Clone(s.relays)
	for _, r := range relays {
		all = slices.DeleteFunc(all, func(old proxy.Relay) bool { return old.Port == r.Port })
		all = append(all, r)
	}
	return s.setRelays(all[max(0, len(all)-maxRelays):])
}

// setRelays puts relays in the place of those that there were, and keeps them for the next
// supervisor. Called with s.mu held.
func (s *supervisor) setRelays(relays []proxy.Relay) error {
	s.relays = slices.Clone(relays)
	s.exposeNow()
	return writeRelays(s.cfg.Dirs, s.cfg.ID, s.relays)
}

// exposeNow tells the switch what the guests reach of this host. Called with s.mu held.
func (s *supervisor) exposeNow() {
	if s.sw == nil {
		return
	}
	s.sw.Expose(s.openPorts())
	s.sw.SetNames(s.names(), s.direct())
}

// openPorts are the gateway's ports that lead to this host, and where to. Called with s.mu
// held.
func (s *supervisor) openPorts() map[uint16][]string {
	open := make(map[uint16][]string)
	for _, r := range s.relays {
		open[r.Port] = r.To
	}
	for _, e := range s.exposed { // what the Labfile says comes first
		open[e.Port] = network.Loopback(e.Port)
	}
	return open
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

// relaysPath is where a supervisor keeps relays for the next one.
func relaysPath(d dirs.Dirs, id lab.ID) string {
	return filepath.Join(d.RunLab(id), "relays.json")
}

// Relays returns the relays that the guests of a lab were told of, whether or not its
// supervisor runs: those that Client.AddRelays and Client.ReplaceRelays left.
func Relays(d dirs.Dirs, id lab.ID) ([]proxy.Relay, error) {
	b, err := os.ReadFile(relaysPath(d, id))
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	var relays []proxy.Relay
	if err == nil {
		err = json.Unmarshal(b, &relays)
	}
	if err != nil {
		return nil, fmt.Errorf("reading the relays of %s: %w", id, err)
	}
	return relays, nil
}

// writeRelays writes what Relays reads. There is no file if there are no relays.
func writeRelays(d dirs.Dirs, id lab.ID, relays []proxy.Relay) error {
	path := relaysPath(d, id)
	var err error
	if len(relays) == 0 {
		if err = os.Remove(path); errors.Is(err, os.ErrNotExist) {
			return nil
		}
	} else {
		var b []byte
		if b, err = json.Marshal(relays); err == nil {
			err = fsutil.WriteFile(path, append(b, '\n'), 0o600)
		}
	}
	if err != nil {
		return fmt.Errorf("keeping the relays for the next supervisor: %w", err)
	}
	return nil
}
