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

// Networks returns providers.ErrNoNetworks for a session's daemon, and for one that refuses,
// such as one without libvirt's network driver.
func (p *Provider) Networks(ctx context.Context) error {
	if err := p.mayNetwork(); err != nil {
		return err
	}
	return p.noNetworks(p.link.do(ctx, func(l *golibvirt.Libvirt) error {
		_, _, err := l.ConnectListAllNetworks(0, 0)
		return err
	}))
}

// mayNetwork returns an error for a session's daemon: only root can make bridges. It asks
// nobody.
func (p *Provider) mayNetwork() error {
	if p.bad != nil {
		return p.bad
	}
	if p.addr.session {
		return fmt.Errorf("%w: the libvirt of a session, %s, makes no networks; a system's does, such as qemu:///system", providers.ErrNoNetworks, p.cfg.URI)
	}
	return nil
}

// noNetworks is what the daemon's answer to a look at its networks means. What it refuses
// lacks the driver, or that one's own daemon, or is not for this user.
func (p *Provider) noNetworks(err error) error {
	if _, said := code(err); said {
		return fmt.Errorf("%w: the libvirt of %s makes no networks: %w", providers.ErrNoNetworks, p.cfg.URI, err)
	}
	return err
}

// networkKinds are those that the daemon makes networks for.
var networkKinds = []lab.NetworkKind{lab.NetworkNAT, lab.NetworkIsolated}

// Network makes the network unless it is there, and starts it.
func (p *Provider) Network(ctx context.Context, id lab.ID, kind lab.NetworkKind) (lab.Network, error) {
	found, err := p.network(ctx, id, kind)
	if err != nil {
		return lab.Network{}, fmt.Errorf("making the network of lab %s: %w", id, err)
	}
	return found.subnet, nil
}

func (p *Provider) network(ctx context.Context, id lab.ID, kind lab.NetworkKind) (foundNetwork, error) {
	if err := p.mayNetwork(); err != nil {
		return foundNetwork{}, err
	}
	p.networking.Lock() // machines start at once
	defer p.networking.Unlock()
	if err := p.remember(); err != nil {
		return foundNetwork{}, fmt.Errorf("remembering where networks are: %w", err)
	}
	found, err := p.findNetwork(ctx, id, kind)
	if isNotFound(err) {
		return p.makeNetwork(ctx, id, kind)
	}
	if err != nil {
		return found, p.noNetworks(err)
	}
	if !found.persistent { // somebody undefined it
		if err := p.link.do(ctx, func(l *golibvirt.Libvirt) error { _, err := l.NetworkDefineXML(found.text); return err }); err != nil {
			return found, err
		}
	}
	err = p.startNetwork(ctx, found.it)
	if !isSubnetTaken(err) {
		return found, err
	}
	if in, e := p.inhabited(ctx, id, kind); in || e != nil {
		return found, errors.Join(fmt.Errorf("%w (since the network %s was active last; destroy the lab to have it another subnet)", err, found.it.Name), e)
	}
	if err := p.removeNetwork(ctx, found.it); err != nil {
		return found, err
	}
	return p.makeNetwork(ctx, id, kind)
}

// makeNetwork makes a network in the first subnet that no other network of the daemon's has,
// active or not. What else the host has a route to of just that size is found out by starting.
func (p *Provider) makeNetwork(ctx context.Context, id lab.ID, kind lab.NetworkKind) (none foundNetwork, err error) {
	taken, err := p.subnets(ctx)
	if err != nil {
		return none, err
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
			return none, e
		}
		it, e := answer(ctx, p.link, func(l *golibvirt.Libvirt) (golibvirt.Network, error) { return l.NetworkDefineXML(text) })
		if c, ok := code(e); ok && (c == golibvirt.ErrOperationFailed || c == golibvirt.ErrNetworkExist) {
			e = fmt.Errorf("%w (a network of that name that this lab did not make is left alone; rename it, or the lab)", e)
		}
		if e != nil {
			return none, e
		}
		if err = p.startNetwork(ctx, it); err == nil {
			return foundNetwork{it: it, text: text, persistent: true}.read()
		}
		// The daemon may be starting it yet.
		cleanup, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupTime)
		e = p.removeNetwork(cleanup, it)
		cancel()
		if e != nil {
			return none, errors.Join(err, e)
		}
		if !isSubnetTaken(err) {
			return none, err
		}
	}
	if tries == 0 {
		err = fmt.Errorf("%w: other networks there have all of the %d subnets of 10.128.0.0/9 that a lab's can have", providers.ErrIncapable, lab.DirectNetworks)
	}
	return none, err
}

// maxTries is how many subnets are tried.
const maxTries = 16

// removeNetwork ends a network and removes it. One that an interrupted call is starting
// yet may be active again between the two, and is there still.
func (p *Provider) removeNetwork(ctx context.Context, it golibvirt.Network) error {
	there := func(l *golibvirt.Libvirt, it golibvirt.Network) error {
		_, err := l.NetworkLookupByUUID(it.UUID)
		return err
	}
	for {
		for _, step := range []func(*golibvirt.Libvirt, golibvirt.Network) error{(*golibvirt.Libvirt).NetworkDestroy, (*golibvirt.Libvirt).NetworkUndefine, there} {
			err := p.link.do(ctx, func(l *golibvirt.Libvirt) error { return step(l, it) })
			if isNotFound(err) {
				return nil
			}
			if err != nil && !isInvalid(err) {
				return fmt.Errorf("removing the network %s: %w", it.Name, err)
			}
		}
	}
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
	it         golibvirt.Network
	text       string     // its document, as it is now
	doc        networkXML // the same
	subnet     lab.Network
	persistent bool // it outlives its end
}

// findNetwork looks for a lab's network, by its UUID: a name is anybody's.
func (p *Provider) findNetwork(ctx context.Context, id lab.ID, kind lab.NetworkKind) (foundNetwork, error) {
	found, err := answer(ctx, p.link, func(l *golibvirt.Libvirt) (f foundNetwork, err error) {
		if f.it, err = l.NetworkLookupByUUID(p.networkOf(id, kind, 0).UUID); err != nil {
			return f, err
		}
		if f.text, err = l.NetworkGetXMLDesc(f.it, 0); err != nil {
			return f, err
		}
		persistent, err := l.NetworkIsPersistent(f.it)
		f.persistent = persistent == 1
		return f, err
	})
	if err != nil {
		return found, err
	}
	return found.read()
}

// read reads the document.
func (found foundNetwork) read() (foundNetwork, error) {
	if err := xml.Unmarshal([]byte(found.text), &found.doc); err != nil {
		return found, fmt.Errorf("reading the document of the network %s: %w", found.it.Name, err)
	}
	for _, ip := range found.doc.IP {
		if gateway, subnet, ok := ip.subnet(); ok {
			found.subnet = lab.Network{Subnet: subnet, Gateway: gateway}
			return found, nil
		}
	}
	return found, fmt.Errorf("the network %s has no IPv4 address any more, which lab gave it", found.it.Name)
}

// inhabited reports whether a generation has an address in the network.
func (p *Provider) inhabited(ctx context.Context, id lab.ID, kind lab.NetworkKind) (bool, error) {
	all, err := p.domains(ctx, id, true)
	if err != nil {
		return false, err
	}
	for _, d := range all {
		if def, err := d.definition(); err != nil || def.Network == kind {
			return true, nil //nolint:nilerr // whoever cannot be asked may have one
		}
	}
	return false, nil
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
	for _, kind := range networkKinds {
		it, err := answer(ctx, p.link, func(l *golibvirt.Libvirt) (golibvirt.Network, error) {
			return l.NetworkLookupByUUID(p.networkOf(id, kind, 0).UUID)
		})
		if c, _ := code(err); isNotFound(err) || c == golibvirt.ErrNoSupport {
			continue // there is none, or the daemon cannot have any
		}
		if err != nil {
			return fmt.Errorf("looking for the network of lab %s: %w", id, err)
		}
		if err := p.removeNetwork(ctx, it); err != nil {
			return err
		}
	}
	return nil
}

// Networked looks at this daemon, unless it is off, and at those that are remembered.
func (p *Provider) Networked(ctx context.Context) ([]providers.Networked, error) {
	found, err := p.networked(ctx)
	if err != nil {
		p.log.Debug("looking for networks", "uri", p.cfg.URI, "error", err)
	}
	err = p.eachRemembered(func(d *Provider, r *Remote) error {
		if d.cfg.URI == p.cfg.URI {
			return nil
		}
		there, err := d.networked(ctx)
		found = append(found, there...)
		switch {
		case err != nil:
			return fmt.Errorf("looking for networks at %s: %w (remove %s if it is gone for good)", d.cfg.URI, err, d.remembered())
		case r == nil && len(there) == 0: // it has no images either
			return d.forget()
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
		for _, kind := range networkKinds {
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

// join sees to it that the network of a machine is there, and that the machine's address in
// it is leased to the machine: at once, or when the network is started next, since machines
// that talk to one another come before DHCP, which no machine of lab's waits for. The lease
// stays when the machine goes: the next one with that address has the same.
func (p *Provider) join(ctx context.Context, def local.Definition) error {
	if def.Network == lab.NetworkSwitch {
		return nil
	}
	found, err := p.network(ctx, def.Lab, def.Network)
	if err != nil {
		return err
	}
	if !found.subnet.Subnet.Contains(def.Direct) {
		return fmt.Errorf("the network %s has the subnet %s now, which does not have the machine's address %s: replace the machine", found.it.Name, found.subnet.Subnet, def.Direct)
	}
	if found.doc.leases(def.Direct) {
		return nil
	}
	text, err := encode(leaseOf(def.Direct))
	if err != nil {
		return err
	}
	err = p.link.do(ctx, func(l *golibvirt.Libvirt) error {
		return l.NetworkUpdate(found.it, uint32(golibvirt.NetworkUpdateCommandAddLast), uint32(golibvirt.NetworkSectionIPDhcpHost), -1, text, golibvirt.NetworkUpdateAffectConfig)
	})
	if isInvalid(err) { // it is leased already: what lab leases there is right
		return nil
	}
	return err
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
