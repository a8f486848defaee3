// SPDX-License-Identifier: Apache-2.0

package libvirt

import (
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"net/netip"
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

// Network is everything that shapes a network of a lab's on the daemon's host
// (https://libvirt.org/formatnetwork.html).
type Network struct {
	Name   string
	UUID   golibvirt.UUID
	Kind   lab.NetworkKind
	Subnet lab.Network
}

// networkOf is a lab's network of a kind, in one of the subnets that it may have.
func (p *Provider) networkOf(id lab.ID, kind lab.NetworkKind, attempt int) Network {
	return Network{
		Name: fmt.Sprintf("lab-%s-%s", id, kind), UUID: uuidOf(p.client + p.cfg.Dirs.Lab(id) + "#" + string(kind)),
		Kind: kind, Subnet: lab.DirectNetworkOf(id, kind, attempt),
	}
}

// XML renders the network. It looks at nothing but n. Network interfaces have names of at
// most 15 bytes.
func (n Network) XML() (string, error) {
	doc := networkXML{
		Name: n.Name, UUID: formatUUID(n.UUID), Bridge: bridge{fmt.Sprintf("lab%x", n.UUID[:4]), "off", 0},
		IP: networkIP{Address: n.Subnet.Gateway.String(), Prefix: n.Subnet.Subnet.Bits()},
	}
	if n.Kind == lab.NetworkNAT {
		doc.Forward = &forward{string(n.Kind)}
	}
	return encode(doc)
}

type networkXML struct {
	XMLName xml.Name  `xml:"network"`
	Name    string    `xml:"name"`
	UUID    string    `xml:"uuid"`
	Forward *forward  `xml:"forward"`
	Bridge  bridge    `xml:"bridge"`
	IP      networkIP `xml:"ip"`
}

type forward struct {
	Mode string `xml:"mode,attr"`
}

type bridge struct {
	Name  string `xml:"name,attr"`
	STP   string `xml:"stp,attr"`
	Delay int    `xml:"delay,attr"`
}

type networkIP struct {
	Address string   `xml:"address,attr"`
	Prefix  int      `xml:"prefix,attr"`
	DHCP    struct{} `xml:"dhcp"` // nothing but what is leased to machines
}

// leaseXML is a machine's entry in a network. Either of the two follows from the other, so
// that to remove it removes whatever another one would meet.
type leaseXML struct {
	XMLName xml.Name `xml:"host"`
	MAC     string   `xml:"mac,attr"`
	IP      string   `xml:"ip,attr"`
}

// Networks returns an error for a session's daemon: only root can make bridges.
func (p *Provider) Networks() error {
	if p.bad != nil {
		return p.bad
	}
	if p.addr.session {
		return fmt.Errorf("%w: the libvirt of a session, %s, makes no networks; a system's does, such as qemu:///system", providers.ErrIncapable, p.cfg.URI)
	}
	return nil
}

// Network makes the network unless it is there, and starts it.
func (p *Provider) Network(ctx context.Context, id lab.ID, kind lab.NetworkKind) (lab.Network, error) {
	n, _, err := p.network(ctx, id, kind)
	if err != nil {
		return n, fmt.Errorf("making the network of lab %s: %w", id, err)
	}
	return n, nil
}

func (p *Provider) network(ctx context.Context, id lab.ID, kind lab.NetworkKind) (lab.Network, golibvirt.Network, error) {
	if err := p.Networks(); err != nil {
		return lab.Network{}, golibvirt.Network{}, err
	}
	p.networking.Lock() // machines start at once
	defer p.networking.Unlock()
	it, subnet, err := p.findNetwork(ctx, id, kind)
	if err == nil {
		return subnet, it, p.startNetwork(ctx, it)
	}
	if !isNotFound(err) {
		return lab.Network{}, golibvirt.Network{}, err
	}
	// Whether a subnet is free on that host is only found out by starting.
	for attempt := range maxAttempts {
		n := p.networkOf(id, kind, attempt)
		text, e := n.XML()
		if e != nil {
			return lab.Network{}, golibvirt.Network{}, e
		}
		it, err = answer(ctx, p.link, func(l *golibvirt.Libvirt) (golibvirt.Network, error) { return l.NetworkDefineXML(text) })
		if c, ok := code(err); ok && (c == golibvirt.ErrOperationFailed || c == golibvirt.ErrNetworkExist) {
			err = fmt.Errorf("%w (a network of that name that this lab did not make is left alone; rename it, or the lab)", err)
		}
		if err != nil {
			break
		}
		if err = p.startNetwork(ctx, it); err == nil {
			return n.Subnet, it, nil
		}
		cleanup, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupTime)
		e = p.link.do(cleanup, func(l *golibvirt.Libvirt) error { return l.NetworkUndefine(it) })
		cancel()
		if e != nil && !isNotFound(e) {
			return lab.Network{}, golibvirt.Network{}, errors.Join(err, e)
		}
		if !isSubnetTaken(err) {
			break
		}
	}
	return lab.Network{}, golibvirt.Network{}, err
}

// maxAttempts is how many subnets are tried.
const maxAttempts = 16

// findNetwork looks for a lab's network, by its UUID: a name is anybody's.
func (p *Provider) findNetwork(ctx context.Context, id lab.ID, kind lab.NetworkKind) (golibvirt.Network, lab.Network, error) {
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
		return is.it, lab.Network{}, err
	}
	var doc networkXML
	if err := xml.Unmarshal([]byte(is.document), &doc); err != nil {
		return is.it, lab.Network{}, fmt.Errorf("reading the document of the network %s: %w", is.it.Name, err)
	}
	gateway, err := netip.ParseAddr(doc.IP.Address)
	if err != nil || !gateway.Is4() || doc.IP.Prefix < 1 || doc.IP.Prefix > 30 {
		return is.it, lab.Network{}, fmt.Errorf("the network %s has the address %q/%d, which lab did not give it", is.it.Name, doc.IP.Address, doc.IP.Prefix)
	}
	return is.it, lab.Network{Subnet: netip.PrefixFrom(gateway, doc.IP.Prefix).Masked(), Gateway: gateway}, nil
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
	if p.Networks() != nil {
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
	if err := p.updateNetwork(ctx, it, golibvirt.NetworkUpdateCommandDelete, def); err != nil && !isInvalid(err) { // there is none, as it should be
		return err
	}
	return p.updateNetwork(ctx, it, golibvirt.NetworkUpdateCommandAddLast, def)
}

// leave gives up the lease of a machine.
func (p *Provider) leave(ctx context.Context, def local.Definition) error {
	if def.Network == lab.NetworkSwitch {
		return nil
	}
	it, _, err := p.findNetwork(ctx, def.Lab, def.Network)
	if err == nil {
		err = p.updateNetwork(ctx, it, golibvirt.NetworkUpdateCommandDelete, def)
	}
	if err != nil && !isNotFound(err) && !isInvalid(err) {
		return fmt.Errorf("giving up the address %s: %w", def.Direct, err)
	}
	return nil
}

func (p *Provider) updateNetwork(ctx context.Context, it golibvirt.Network, command golibvirt.NetworkUpdateCommand, def local.Definition) error {
	text, err := encode(leaseXML{MAC: lab.MACOf(def.Direct), IP: def.Direct.String()})
	if err != nil {
		return err
	}
	return p.link.do(ctx, func(l *golibvirt.Libvirt) error {
		active, err := l.NetworkIsActive(it)
		if err != nil {
			return err
		}
		affects := golibvirt.NetworkUpdateAffectConfig
		if active == 1 {
			affects |= golibvirt.NetworkUpdateAffectLive
		}
		return l.NetworkUpdate(it, uint32(command), uint32(golibvirt.NetworkSectionIPDhcpHost), -1, text, affects)
	})
}

// Networks does as the Provider's.
func (r *Remote) Networks() error { return r.p.Networks() }

// Network does as the Provider's.
func (r *Remote) Network(ctx context.Context, id lab.ID, kind lab.NetworkKind) (lab.Network, error) {
	return r.p.Network(ctx, id, kind)
}

// RemoveNetworks does as the Provider's.
func (r *Remote) RemoveNetworks(ctx context.Context, id lab.ID) error {
	return r.p.RemoveNetworks(ctx, id)
}
