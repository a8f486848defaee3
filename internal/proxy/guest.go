// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// Lab is what has to be known of a lab to have its guests use a proxy of this host.
type Lab struct {
	Gateway  string         // name of the lab's gateway, fully qualified
	Domain   string         // of the lab's names
	Names    []string       // that guests look up in the lab, besides the gateway's
	Networks []netip.Prefix // that guests reach without a proxy
	Taken    []uint16       // ports of the gateway that lead elsewhere
}

// Relay is a TCP port of the lab's gateway that leads to a proxy which this host reaches.
type Relay struct {
	Name string   `json:"name"` // by which guests know the gateway there
	Port uint16   `json:"port"`
	To   []string `json:"to"` // HOST:PORT, tried in this order; this host looks HOST up
}

// Guest is what a guest gets. Env may hold passwords.
type Guest struct {
	Env    []string // NAME=VALUE, sorted
	Relays []Relay  // that must be there for Env to mean something
}

// Guest returns what the guests of a lab get of the settings; of none, nothing. Errors:
// those of Check.
//
// A proxy is reached through a port of the lab's gateway, by its own number if that is
// free: so it does not matter that it listens on this host's loopback, that only this host
// knows its name, or how a guest reaches the world outside. A proxy to which one speaks TLS
// keeps its name, which its certificate must have, and its port; the name leads to the
// gateway, so that guests reach no other port of that host by it. By an address other than
// of the loopback, such a proxy is left as it is.
func (s Settings) Guest(l Lab) (Guest, error) {
	if s.Empty() {
		return Guest{}, nil
	}
	named, err := s.named(l)
	if err != nil {
		return Guest{}, err
	}
	g := Guest{Relays: named}
	used := map[uint16]bool{}
	for _, p := range l.Taken {
		used[p] = true
	}
	for _, r := range named {
		used[r.Port] = true
	}
	for _, srv := range s.servers {
		url := srv.url(srv.login, srv.host, srv.port)
		if !srv.keepsName() {
			to := srv.dials()
			i := slices.IndexFunc(g.Relays, func(r Relay) bool { return slices.Equal(r.To, to) && r.Name == l.Gateway })
			if i < 0 {
				i = len(g.Relays)
				g.Relays = append(g.Relays, Relay{Name: l.Gateway, Port: free(srv.port, used), To: to})
				used[g.Relays[i].Port] = true
			}
			url = srv.url(srv.login, l.Gateway, g.Relays[i].Port)
		}
		g.Env = append(g.Env, both(srv.variable, url)...)
	}
	g.Env = append(g.Env, both(noProxy, s.direct(l))...)
	slices.Sort(g.Env)
	return g, nil
}

// Check returns an *EnvError if guests of a lab cannot use a proxy of the settings: it has
// to keep its name and port, and the lab has one of them. Of l it needs Gateway, Domain,
// Names and Taken.
func (s Settings) Check(l Lab) error {
	_, err := s.named(l)
	return err
}

// named are the relays to proxies that keep their name and port.
func (s Settings) named(l Lab) ([]Relay, error) {
	var relays []Relay
	for _, srv := range s.servers {
		if !srv.keepsName() || srv.byAddress() {
			continue
		}
		r := Relay{Name: srv.host, Port: srv.port, To: srv.dials()}
		same := func(o Relay) bool { return o.Name == r.Name && o.Port == r.Port }
		problem := ""
		switch short := strings.TrimSuffix(srv.host, "."+l.Domain); {
		case slices.ContainsFunc(relays, same):
			continue
		case short+"."+l.Domain == l.Gateway || slices.Contains(l.Names, short):
			problem = fmt.Sprintf("has the proxy https://%s, whose name is one of the lab; write the proxy's name with its domain, or rename what the lab calls %s", srv.host, short)
		case slices.Contains(l.Taken, r.Port):
			problem = fmt.Sprintf("has the proxy https://%s:%d, which keeps its port, but that port of the lab's gateway is its name server's or one of expose; expose another port", srv.host, r.Port)
		case slices.ContainsFunc(relays, func(o Relay) bool { return o.Port == r.Port }):
			problem = fmt.Sprintf("has the proxy https://%s:%d, which keeps its port, but another proxy with https:// has that port; use one of them", srv.host, r.Port)
		}
		if problem != "" {
			return nil, &EnvError{Variable: srv.found, Problem: problem}
		}
		relays = append(relays, r)
	}
	return relays, nil
}

// byAddress reports whether the proxy has an address in place of a name.
func (s server) byAddress() bool {
	_, err := netip.ParseAddr(s.host)
	return err == nil
}

// keepsName reports whether the proxy must be spoken to under its own name.
func (s server) keepsName() bool { return s.scheme == "https" && !s.loopback() }

// both are the two forms of a variable.
func both(name, value string) []string {
	return []string{name + "=" + value, strings.ToUpper(name) + "=" + value}
}

// free returns a port that nothing uses: the one wanted, or the next one above.
func free(want uint16, used map[uint16]bool) uint16 {
	for used[want] {
		if want++; want == 0 {
			want = 1024
		}
	}
	return want
}

// direct is what must not go through a proxy: what the host says, and what is the guest's
// own or the lab's.
func (s Settings) direct(l Lab) string {
	if slices.Contains(s.bypass, "*") {
		return "*" // curl knows it only alone
	}
	list := slices.Clone(s.bypass)
	list = append(list, "localhost", "127.0.0.0/8", "127.0.0.1", "::1", "."+l.Domain)
	short, _, _ := strings.Cut(l.Gateway, ".")
	list = append(list, l.Gateway, short)
	names := slices.Clone(l.Names)
	slices.Sort(names)
	list = append(list, names...)
	for _, n := range l.Networks {
		list = append(list, n.Masked().String())
	}
	var out []string
	for _, e := range list {
		if !slices.Contains(out, e) {
			out = append(out, e)
		}
	}
	return strings.Join(out, ",")
}

// Variables are the names of all variables that a guest may get, sorted.
func Variables() []string {
	var all []string
	for _, name := range append(slices.Clone(servers), noProxy) {
		all = append(all, name, strings.ToUpper(name))
	}
	slices.Sort(all)
	return all
}
