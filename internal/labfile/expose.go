// SPDX-License-Identifier: Apache-2.0

package labfile

import (
	"cmp"
	"slices"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/proxy"
)

// exposes returns the ports of the host that the machines are to reach.
func (c *converter) exposes() []lab.Exposed {
	var out []lab.Exposed
	for i := range c.doc.Expose.items {
		e := &c.doc.Expose.items[i]
		if !e.Name.set() || !e.Port.set() {
			continue // it could not be read, which has been reported
		}
		x := lab.Exposed{Name: e.Name.value, Port: uint16(e.Port.value)}
		meaning, taken := reserved(x.Name)
		_, machine := c.names[lab.Name(x.Name)]
		role := slices.ContainsFunc(c.roles, func(r *role) bool { return r.name() == x.Name })
		switch {
		case taken:
			c.add(e.Name.place, "this host cannot be called %q, which %s", x.Name, meaning)
		case machine || role:
			c.add(e.Name.place, "%q is the name of a machine; choose another for this host", x.Name)
		case lab.Numeric(x.Name):
			c.add(e.Name.place, "%q is a number, which resolvers take for an address; choose a name with a letter", x.Name)
		case x.Port == lab.DNSPort:
			c.add(e.Port.place, "port 53 is that of the lab's name server")
		case slices.Contains(out, x):
			c.add(e.place, "%s stands here twice", x)
		default:
			out = append(out, x)
		}
	}
	slices.SortFunc(out, func(a, b lab.Exposed) int { return cmp.Or(cmp.Compare(a.Name, b.Name), cmp.Compare(a.Port, b.Port)) })
	return out
}

// checkProxies returns an error, without passwords, if the guests of l cannot use the proxy
// settings of an environment.
func checkProxies(l *lab.Lab, lookup func(string) (string, bool)) error {
	s, err := proxy.FromEnv(func(name string) string { v, _ := lookup(name); return v })
	if err != nil {
		return err
	}
	p := proxy.Lab{Gateway: lab.GatewayName + "." + lab.Domain, Domain: lab.Domain, Taken: []uint16{lab.DNSPort}}
	for _, m := range l.Machines {
		p.Names = append(p.Names, string(m.Name))
		if m.Role != "" {
			p.Names = append(p.Names, m.Role)
		}
	}
	for _, e := range l.Expose {
		p.Names, p.Taken = append(p.Names, e.Name), append(p.Taken, e.Port)
	}
	return s.Check(p)
}
