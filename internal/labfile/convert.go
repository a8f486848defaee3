// SPDX-License-Identifier: Apache-2.0

package labfile

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"github.com/labfile/lab/internal/lab"
)

// maxMachines is how many machines fit into a lab's address plan, a few
// addresses apart.
const maxMachines = lab.LastHost - lab.FirstHost

// converter turns a document into the lab it describes: it fills in defaults,
// expands replicas, resolves names, and notes what does not fit together.
type converter struct {
	*report
	doc   *document
	dir   string // of the host's files; empty to look at none
	boxes map[string]lab.Box
	roles []*role
	names map[lab.Name]*role // of all machines
}

// role is an entry of machines with the names of its machines.
type role struct {
	row   *row[roleEntry]
	names []lab.Name
}

func (r *role) name() string { return r.row.name }

// count returns how many machines are wanted: none is said if there is one.
func (r *role) replicated() bool { return r.row.value.Count.set() }

// convert returns the lab, which makes sense only if no problem was noted. The files of
// the host that it names are looked at, relative to dir, unless that is empty.
func convert(r *report, doc *document, dir string) *lab.Lab {
	c := &converter{report: r, doc: doc, dir: dir, names: map[lab.Name]*role{}}
	c.boxes = c.boxEntries()
	c.expand()
	needs := c.dependencies()
	c.hostPorts()
	c.addresses()
	tests := c.tests()

	l := &lab.Lab{Name: doc.Lab.value, Provider: doc.Provider.value, URI: doc.URI.value, Expires: doc.Expires.value, Expose: c.exposes(), InheritProxy: doc.Proxy.value == "inherit"}
	network := lab.NetworkAuto
	switch doc.Network.value {
	case "":
	case "switch":
		network = lab.NetworkSwitch
	default:
		network = lab.NetworkKind(doc.Network.value)
	}
	used := map[string]lab.Box{}
	for _, role := range c.roles {
		m := c.machine(role, used)
		m.DependsOn = needs[role]
		volumes := c.volumes(role)
		c.mountPoints(role)
		for _, name := range role.names {
			m := m
			m.Name = name
			m.Network = network
			m.DependsOn = slices.Clone(m.DependsOn)
			m.Ports = slices.Clone(m.Ports)
			m.Ready = slices.Clone(m.Ready)
			m.Provision = slices.Clone(m.Provision)
			m.Boot = slices.Clone(m.Boot)
			m.Mounts = slices.Clone(m.Mounts)
			m.Tests = tests[name]
			m.Volumes = nil
			for _, v := range volumes {
				m.Volumes = append(m.Volumes, c.volumeOf(role, v, name))
			}
			l.Machines = append(l.Machines, m)
		}
	}
	c.sharedVolumes(l.Machines)
	for _, b := range used {
		l.Boxes = append(l.Boxes, b)
	}
	slices.SortFunc(l.Boxes, func(a, b lab.Box) int { return cmp.Compare(a.Name, b.Name) })
	return l
}

// reserved says what the names mean that machines cannot have.
func reserved(name string) (meaning string, ok bool) {
	switch name {
	case "all":
		return "means every machine", true
	case "localhost":
		return "means the machine itself", true
	case lab.GatewayName:
		return "is the name of the lab's router", true
	}
	return "", false
}

// expand gives every machine its name.
func (c *converter) expand() {
	total := 0
	for i := range c.doc.Machines.rows {
		row := &c.doc.Machines.rows[i]
		r := &role{row: row}
		c.roles = append(c.roles, r)
		if meaning, ok := reserved(row.name); ok {
			c.add(row.key, "a machine cannot be called %q, which %s", row.name, meaning)
			continue
		}
		if !lab.ValidLabel(row.name) {
			c.add(row.key, "%q is not a name; %s", shorten(row.name), labelRule)
			continue
		}
		if lab.BakeName(lab.Name(row.name)) {
			c.add(row.key, "a machine cannot be called %q: so are the throw-away machines that images are baked in", shorten(row.name))
			continue
		}
		if total += max(1, row.value.Count.value); total > maxMachines {
			continue
		}
		r.names = []lab.Name{lab.Name(row.name)}
		if r.replicated() {
			r.names = nil
			for n := range row.value.Count.value {
				r.names = append(r.names, lab.Name(fmt.Sprintf("%s-%d", row.name, n+1)))
			}
		}
		c.claim(r)
	}
	if c.doc.Machines.set() && len(c.doc.Machines.rows) == 0 {
		c.add(c.doc.Machines.place, "a lab needs at least one machine")
	}
	if total > maxMachines {
		c.add(c.doc.Machines.place, "%d machines are too many; a lab has at most %d", total, maxMachines)
	}
}

// claim notes that the names of r are taken.
func (c *converter) claim(r *role) {
	for _, name := range r.names {
		if !lab.ValidLabel(string(name)) {
			c.add(r.row.key, "the name of the replica %q is longer than 63 characters", name)
			return
		}
		if lab.Numeric(string(name)) {
			c.add(r.row.key, "a machine cannot be called %q: resolvers take that for an address; add a letter, such as node%s", name, name)
			return
		}
		if other := c.names[name]; other != nil {
			first, second := other, r
			if !second.replicated() {
				c.add(second.row.key, "the name is taken by a replica of %s (line %d)", first.name(), first.row.key.line)
			} else {
				c.add(second.row.key, "its replica %s has the name of another machine (line %d)", name, first.row.key.line)
			}
			return
		}
		c.names[name] = r
	}
}

// machine returns what the machines of a role have in common, and adds their box
// to used.
func (c *converter) machine(r *role, used map[string]lab.Box) lab.Machine {
	e := &r.row.value
	box := c.box(e.Box)
	if box.Name != "" {
		used[box.Name] = box
	}
	m := lab.Machine{
		Role: r.name(), Box: box.Name,
		CPUs:   1,
		Memory: DefaultMemory(box.From),
		Disk:   e.Disk.value, Address: e.Address.value,
		User: e.User.value, UserData: e.UserData.value,
	}
	if e.CPUs.set() {
		m.CPUs = e.CPUs.value
	}
	if e.Memory.set() {
		m.Memory = e.Memory.value
		if least := MinMemory(box.From); m.Memory < least {
			c.add(e.Memory.place, "%s is below the %s that %s needs", m.Memory, least, box.From)
		}
	}
	if n, ok := builtins()[box.From]; ok && !n.cloudInit && e.UserData.set() {
		c.add(e.UserData.place, "%s has no cloud-init, which reads user data; use builtin/debian-12 or an image that has it", box.From)
	}
	guests := map[string]bool{}
	for _, p := range e.Ports.items {
		for _, v := range p.values {
			port := guestPort(v)
			if v.HostPort == 0 && guests[port] {
				c.add(p.place, "guest port %s is forwarded already", port)
			}
			guests[port] = true
			m.Ports = append(m.Ports, v)
		}
	}
	if len(m.Ports) > maxForwards {
		c.add(e.Ports.place, "%d ports are too many; a machine has at most %d", len(m.Ports), maxForwards)
	}
	for i := range e.Ready.items {
		if check, ok := c.check(&e.Ready.items[i]); ok {
			m.Ready = append(m.Ready, check)
		}
	}
	m.Provision, m.Boot, m.Mounts = c.provision(r), c.boot(r), c.mounts(r)
	c.life(r, &m)
	return m
}

// addresses notes addresses that two machines would need.
func (c *converter) addresses() {
	taken := map[int]*role{}
	for _, r := range c.roles {
		a := r.row.value.Address
		if !a.set() {
			continue
		}
		if r.replicated() {
			c.add(a.place, "replicas cannot have one address; leave out address, or count")
		}
		if before := taken[a.value]; before != nil {
			c.add(a.place, "the address %d is that of %s (line %d)", a.value, before.name(), before.row.value.Address.line)
			continue
		}
		taken[a.value] = r
	}
}

// maxForwards bounds how many ports of a machine are forwarded: each takes a file
// descriptor of the supervisor, which has 1024 on many hosts.
const maxForwards = 200

// guestPort names the guest's port of a forward.
func guestPort(f lab.Forward) string {
	if f.UDP {
		return fmt.Sprintf("%d/udp", f.GuestPort)
	}
	return fmt.Sprint(f.GuestPort)
}

// hostPorts notes host ports that two machines would need.
func (c *converter) hostPorts() {
	type owner struct {
		role string
		line int
	}
	type hostPort struct {
		port uint16
		udp  bool
	}
	taken := map[hostPort]owner{}
	for _, r := range c.roles {
		for _, p := range r.row.value.Ports.items {
			for _, v := range p.values {
				port := hostPort{v.HostPort, v.UDP}
				if v.HostPort == 0 {
					continue
				}
				if before, ok := taken[port]; ok {
					c.add(p.place, "host port %d is forwarded to %s already (line %d); write %q for a free one", v.HostPort, before.role, before.line, "0:"+guestPort(v))
					break
				}
				taken[port] = owner{r.name(), p.line}
				if len(r.names) > 1 {
					c.add(p.place, "all %d replicas would need host port %d; write %q, so that each gets a free one", len(r.names), v.HostPort, "0:"+guestPort(v))
					break
				}
			}
		}
	}
}

// dependencies resolves depends_on to machines, by role.
func (c *converter) dependencies() map[*role][]lab.Name {
	byName := map[string]*role{}
	for _, r := range c.roles {
		byName[r.name()] = r
	}
	resolved := map[*role][]lab.Name{}
	edges := map[*role][]edge{}
	for _, r := range c.roles {
		said := map[string]bool{}
		known := map[lab.Name]bool{}
		for _, dep := range r.row.value.DependsOn.items {
			if !dep.set() {
				continue
			}
			if said[dep.value] {
				c.add(dep.place, "%q stands here twice", shorten(dep.value))
				continue
			}
			said[dep.value] = true
			names, target := []lab.Name{lab.Name(dep.value)}, c.names[lab.Name(dep.value)]
			if whole := byName[dep.value]; whole != nil {
				names, target = whole.names, whole
			}
			switch {
			case target == nil:
				c.unknownMachine(dep)
				continue
			case target == r:
				c.add(dep.place, "%s depends on itself", r.name())
				continue
			}
			edges[r] = append(edges[r], edge{target, dep.place})
			for _, n := range names {
				if !known[n] {
					known[n] = true
					resolved[r] = append(resolved[r], n)
				}
			}
		}
	}
	c.cycles(edges)
	return resolved
}

func (c *converter) unknownMachine(dep text) {
	if c.full() {
		c.more++
		return
	}
	var known []string
	for _, r := range c.roles {
		known = append(known, r.name())
		if r.replicated() {
			for _, n := range r.names {
				known = append(known, string(n))
			}
		}
	}
	c.add(dep.place, "there is no machine %q%s", shorten(dep.value), didYouMean(dep.value, known, ""))
}

// edge is a dependency on a role, and where it is written.
type edge struct {
	to *role
	at place
}

// cycles notes every cycle that a walk along the dependencies runs into, in
// full, where it closes.
func (c *converter) cycles(edges map[*role][]edge) {
	const (
		underway = 1
		done     = 2
	)
	state := map[*role]int{}
	var path []*role
	var walk func(r *role)
	walk = func(r *role) {
		state[r] = underway
		path = append(path, r)
		for _, e := range edges[r] {
			switch state[e.to] {
			case 0:
				walk(e.to)
			case underway:
				names := []string{}
				for _, p := range path[slices.Index(path, e.to):] {
					names = append(names, p.name())
				}
				c.add(e.at, "dependency cycle: %s", strings.Join(append(names, e.to.name()), " -> "))
			}
		}
		path = path[:len(path)-1]
		state[r] = done
	}
	for _, r := range c.roles {
		if state[r] == 0 {
			walk(r)
		}
	}
}
