// SPDX-License-Identifier: Apache-2.0

package libvirt

import (
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	golibvirt "github.com/digitalocean/go-libvirt"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/providers"
	"github.com/labfile/lab/providers/local"
)

var (
	_ providers.Networker = (*Provider)(nil)
	_ providers.Networker = (*Remote)(nil)
)

// networkOf is a lab's network of a kind, in one of the subnets that it may have.
func (p *Provider) networkOf(id lab.ID, kind lab.NetworkKind, attempt int) Network {
	return Network{
		Name: fmt.Sprintf("lab-%s-%s", id, kind), UUID: uuidOf(p.client + p.cfg.Dirs.Lab(id) + "#" + string(kind)),
		Kind: kind, Subnet: lab.DirectNetworkOf(id, kind, attempt),
	}
}

// Networks returns providers.ErrNoNetworks for a session's daemon, since only root can make
// bridges, and for one without libvirt's network driver.
func (p *Provider) Networks(ctx context.Context) error {
	if p.bad != nil {
		return p.bad
	}
	if p.addr.session {
		return fmt.Errorf("%w: the libvirt of a session, %s, makes no networks; a system's does, such as qemu:///system", providers.ErrNoNetworks, p.cfg.URI)
	}
	err := p.link.do(ctx, func(l *golibvirt.Libvirt) error {
		_, _, err := l.ConnectListAllNetworks(0, 0)
		return err
	})
	if c, ok := code(err); ok && c == golibvirt.ErrNoSupport {
		return fmt.Errorf("%w: the libvirt of %s makes no networks: %w", providers.ErrNoNetworks, p.cfg.URI, err)
	}
	return err
}

// Network makes the network unless it is there, and starts it.
func (p *Provider) Network(ctx context.Context, id lab.ID, kind lab.NetworkKind) (lab.Network, error) {
	n, _, err := p.network(ctx, id, kind)
	if err != nil {
		return n, fmt.Errorf("making the network of lab %s: %w", id, err)
	}
	return n, nil
}

func (p *Provider) network(ctx context.Context, id lab.ID, kind lab.NetworkKind) (n lab.Network, it golibvirt.Network, err error) {
	if err := p.Networks(ctx); err != nil {
		return n, it, err
	}
	p.networking.Lock() // machines start at once
	defer p.networking.Unlock()
	found, err := p.findNetwork(ctx, id, kind)
	if isNotFound(err) {
		return p.makeNetwork(ctx, id, kind)
	}
	if err != nil {
		return n, it, err
	}
	err = p.startNetwork(ctx, found.it)
	switch {
	case !isSubnetTaken(err):
		return found.subnet, found.it, err
	case found.leases:
		return n, it, fmt.Errorf("%w (since the network %s was active last; destroy the lab to have it another subnet)", err, found.it.Name)
	}
	if err := p.undefineNetwork(ctx, found.it); err != nil { // nobody was ever in it
		return n, it, err
	}
	return p.makeNetwork(ctx, id, kind)
}

// makeNetwork makes a network in the first subnet that no other network of the daemon's has,
// active or not. What else the host has a route to of just that size is found out by starting.
func (p *Provider) makeNetwork(ctx context.Context, id lab.ID, kind lab.NetworkKind) (none lab.Network, it golibvirt.Network, err error) {
	taken, err := p.subnets(ctx)
	if err != nil {
		return none, it, err
	}
	tries := 0
	for attempt := 0; attempt < lab.DirectNetworks && tries < maxTries; attempt++ {
		n := p.networkOf(id, kind, attempt)
		if slices.ContainsFunc(taken, n.Subnet.Subnet.Overlaps) {
			continue
		}
		tries++
		text, e := n.XML()
		if e != nil {
			return none, it, e
		}
		it, err = answer(ctx, p.link, func(l *golibvirt.Libvirt) (golibvirt.Network, error) { return l.NetworkDefineXML(text) })
		if c, ok := code(err); ok && (c == golibvirt.ErrOperationFailed || c == golibvirt.ErrNetworkExist) {
			err = fmt.Errorf("%w (a network of that name that this lab did not make is left alone; rename it, or the lab)", err)
		}
		if err != nil {
			return none, it, err
		}
		if err = p.startNetwork(ctx, it); err == nil {
			return n.Subnet, it, nil
		}
		if e := p.undefineNetwork(ctx, it); e != nil {
			return none, it, errors.Join(err, e)
		}
		if !isSubnetTaken(err) {
			return none, it, err
		}
	}
	if tries == 0 {
		err = fmt.Errorf("%w: other networks there have all of the %d subnets of 10.128.0.0/9 that a lab's can have", providers.ErrIncapable, lab.DirectNetworks)
	}
	return none, it, err
}

// maxTries is how many subnets are tried.
const maxTries = 16

// undefineNetwork takes back a network that was defined, whatever became of ctx.
func (p *Provider) undefineNetwork(ctx context.Context, it golibvirt.Network) error {
	cleanup, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupTime)
	defer cancel()
	err := p.link.do(cleanup, func(l *golibvirt.Libvirt) error { return l.NetworkUndefine(it) })
	if isNotFound(err) {
		return nil
	}
	return err
}

// subnets are those of all networks of the daemon's.
func (p *Provider) subnets(ctx context.Context) ([]netip.Prefix, error) {
	documents, err := answer(ctx, p.link, func(l *golibvirt.Libvirt) ([]string, error) {
		all, _, err := l.ConnectListAllNetworks(1, 0)
		if err != nil {
			return nil, err
		}
		var texts []string
		for _, it := range all {
			text, err := l.NetworkGetXMLDesc(it, 0)
			if isNotFound(err) {
				continue // gone
			}
			if err != nil {
				return nil, err
			}
			texts = append(texts, text)
		}
		return texts, nil
	})
	if err != nil {
		return nil, err
	}
	var all []netip.Prefix
	for _, text := range documents {
		var doc networkXML
		if err := xml.Unmarshal([]byte(text), &doc); err != nil {
			return nil, fmt.Errorf("reading the document of a network: %w", err)
		}
		for _, ip := range doc.IP {
			if _, subnet, ok := ip.subnet(); ok {
				all = append(all, subnet)
			}
		}
	}
	return all, nil
}

// foundNetwork is a network of a lab's.
type foundNetwork struct {
	it     golibvirt.Network
	subnet lab.Network
	leases bool // machines have addresses in it
}

// findNetwork looks for a lab's network, by its UUID: a name is anybody's.
func (p *Provider) findNetwork(ctx context.Context, id lab.ID, kind lab.NetworkKind) (foundNetwork, error) {
	type found struct {
		it       golibvirt.Network
		document string
	}
	is, err := answer(ctx, p.link, func(l *golibvirt.Libvirt) (f found, err error) {
		if f.it, err = l.NetworkLookupByUUID(p.networkOf(id, kind, 0).UUID); err == nil {
			f.document, err = l.NetworkGetXMLDesc(f.it, 0)
		}
		return f, err
	})
	if err != nil {
		return foundNetwork{}, err
	}
	var doc networkXML
	if err := xml.Unmarshal([]byte(is.document), &doc); err != nil {
		return foundNetwork{}, fmt.Errorf("reading the document of the network %s: %w", is.it.Name, err)
	}
	for _, ip := range doc.IP {
		if gateway, subnet, ok := ip.subnet(); ok {
			return foundNetwork{is.it, lab.Network{Subnet: subnet, Gateway: gateway}, ip.DHCP != nil && len(ip.DHCP.Hosts) > 0}, nil
		}
	}
	return foundNetwork{}, fmt.Errorf("the network %s has no IPv4 address any more, which lab gave it", is.it.Name)
}

// startNetwork starts a network unless it is active.
func (p *Provider) startNetwork(ctx context.Context, it golibvirt.Network) error {
	active, err := answer(ctx, p.link, func(l *golibvirt.Libvirt) (int32, error) { return l.NetworkIsActive(it) })
	if err != nil || active == 1 {
		return err
	}
	err = p.link.do(ctx, func(l *golibvirt.Libvirt) error { return l.NetworkCreate(it) })
	if isInvalid(err) { // another machine was faster
		return nil
	}
	return err
}

// isSubnetTaken reports whether libvirt says that the host has another use for a network's
// addresses (networkCheckRouteCollision).
func isSubnetTaken(err error) bool {
	c, ok := code(err)
	return ok && c == golibvirt.ErrInternalError && strings.Contains(err.Error(), "already in use by interface")
}

// RemoveNetworks ends and removes the networks. A daemon of a session has none.
func (p *Provider) RemoveNetworks(ctx context.Context, id lab.ID) error {
	if p.bad != nil || p.addr.session {
		return nil
	}
	for _, kind := range []lab.NetworkKind{lab.NetworkNAT, lab.NetworkIsolated} {
		it, err := answer(ctx, p.link, func(l *golibvirt.Libvirt) (golibvirt.Network, error) {
			return l.NetworkLookupByUUID(p.networkOf(id, kind, 0).UUID)
		})
		if _, said := code(err); said {
			// There is none, or the daemon cannot have any.
			p.log.Debug("looking for a lab's network", "kind", string(kind), "error", err)
			continue
		}
		if err != nil {
			return fmt.Errorf("looking for the network of lab %s: %w", id, err)
		}
		for _, remove := range []func(*golibvirt.Libvirt, golibvirt.Network) error{(*golibvirt.Libvirt).NetworkDestroy, (*golibvirt.Libvirt).NetworkUndefine} {
			err := p.link.do(ctx, func(l *golibvirt.Libvirt) error { return remove(l, it) })
			if err != nil && !isNotFound(err) && !isInvalid(err) {
				return fmt.Errorf("removing the network %s: %w", it.Name, err)
			}
		}
	}
	return nil
}

// Networked looks at this daemon, unless it is off, and at those of other hosts.
func (p *Provider) Networked(ctx context.Context) ([]providers.Networked, error) {
	found, err := p.networked(ctx)
	if err != nil {
		p.log.Debug("looking for networks", "uri", p.cfg.URI, "error", err)
	}
	err = p.eachRemote(func(r *Remote) error {
		if r.URI() == p.cfg.URI {
			return nil
		}
		there, err := r.p.networked(ctx)
		found = append(found, there...)
		if err != nil {
			return fmt.Errorf("looking for networks at %s: %w", r.URI(), err)
		}
		return nil
	})
	return found, err
}

func (p *Provider) networked(ctx context.Context) ([]providers.Networked, error) {
	if p.bad != nil || p.addr.session {
		return nil, nil
	}
	all, err := answer(ctx, p.link, func(l *golibvirt.Libvirt) ([]golibvirt.Network, error) {
		all, _, err := l.ConnectListAllNetworks(1, 0)
		return all, err
	})
	if err != nil {
		return nil, err
	}
	var found []providers.Networked
	for _, it := range all {
		for _, kind := range []lab.NetworkKind{lab.NetworkNAT, lab.NetworkIsolated} {
			id, ok := strings.CutSuffix(it.Name, "-"+string(kind))
			name := lab.ID(strings.TrimPrefix(id, "lab-"))
			// A name is anybody's.
			if at := (providers.Networked{Lab: name, URI: p.cfg.URI}); ok && lab.ValidLabel(string(name)) && it.UUID == p.networkOf(name, kind, 0).UUID && !slices.Contains(found, at) {
				found = append(found, at)
			}
		}
	}
	return found, nil
}

// join sees to it that the network of a machine is there, and leases the machine its
// address in that.
func (p *Provider) join(ctx context.Context, def local.Definition) error {
	if def.Network == lab.NetworkSwitch {
		return nil
	}
	n, it, err := p.network(ctx, def.Lab, def.Network)
	if err != nil {
		return err
	}
	if !n.Subnet.Contains(def.Direct) {
		return fmt.Errorf("the network %s has the subnet %s now, which does not have the machine's address %s: replace the machine", it.Name, n.Subnet, def.Direct)
	}
	if err := p.dropLease(ctx, it, def); err != nil {
		return err
	}
	affects := golibvirt.NetworkUpdateAffectConfig | golibvirt.NetworkUpdateAffectLive // it is active
	return p.updateNetwork(ctx, it, golibvirt.NetworkUpdateCommandAddLast, affects, def)
}

// leave gives up the lease of a machine, unless another generation of it has the same. One
// that stays is in nobody's way: whoever is given that address next drops it, and it goes
// with the network.
func (p *Provider) leave(ctx context.Context, def local.Definition) {
	if def.Network == lab.NetworkSwitch || p.shares(ctx, def) {
		return
	}
	found, err := p.findNetwork(ctx, def.Lab, def.Network)
	if err == nil {
		err = p.dropLease(ctx, found.it, def)
	}
	if err != nil && !isNotFound(err) {
		p.log.Debug("giving up an address", "machine", def.Generation().String(), "error", err)
	}
}

// shares reports whether another generation has the same address.
func (p *Provider) shares(ctx context.Context, def local.Definition) bool {
	all, err := p.domains(ctx, def.Lab, true)
	if err != nil {
		p.log.Debug("looking for who has an address", "machine", def.Generation().String(), "error", err)
		return true
	}
	for g, d := range all {
		if other, err := d.definition(); g != def.Generation() && err == nil && other.Network == def.Network && other.Direct == def.Direct {
			return true
		}
	}
	return false
}

// dropLease removes a machine's lease from the network as it is and as it will be, which may
// differ. It may be in neither.
func (p *Provider) dropLease(ctx context.Context, it golibvirt.Network, def local.Definition) error {
	for _, affects := range []golibvirt.NetworkUpdateFlags{golibvirt.NetworkUpdateAffectLive, golibvirt.NetworkUpdateAffectConfig} {
		if err := p.updateNetwork(ctx, it, golibvirt.NetworkUpdateCommandDelete, affects, def); err != nil && !isInvalid(err) {
			return err
		}
	}
	return nil
}

func (p *Provider) updateNetwork(
	ctx context.Context, it golibvirt.Network, command golibvirt.NetworkUpdateCommand, affects golibvirt.NetworkUpdateFlags, def local.Definition,
) error {
	text, err := encode(leaseXML{MAC: lab.MACOf(def.Direct), IP: def.Direct.String()})
	if err != nil {
		return err
	}
	return p.link.do(ctx, func(l *golibvirt.Libvirt) error {
		return l.NetworkUpdate(it, uint32(command), uint32(golibvirt.NetworkSectionIPDhcpHost), -1, text, affects)
	})
}

// Networks does as the Provider's.
func (r *Remote) Networks(ctx context.Context) error { return r.p.Networks(ctx) }

// Network does as the Provider's.
func (r *Remote) Network(ctx context.Context, id lab.ID, kind lab.NetworkKind) (lab.Network, error) {
	return r.p.Network(ctx, id, kind)
}

// Networked does as the Provider's.
func (r *Remote) Networked(ctx context.Context) ([]providers.Networked, error) {
	return r.p.Networked(ctx)
}

// RemoveNetworks does as the Provider's.
func (r *Remote) RemoveNetworks(ctx context.Context, id lab.ID) error {
	return r.p.RemoveNetworks(ctx, id)
}
