// SPDX-License-Identifier: Apache-2.0

//go:build linux

package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/labfile/lab/internal/guest/agentapi"
)

// nicTime bounds the wait for the network card, whose driver may be loaded later
// than the agent starts.
const nicTime = 30 * time.Second

// SetNetwork gives the interfaces with the identity's hardware addresses their addresses,
// and no other IPv4 address, and makes a gateway the default route: that of the second
// interface if it has one.
func (Kernel) SetNetwork(id agentapi.Identity) error {
	if lo, err := netlink.LinkByName("lo"); err == nil {
		if err := netlink.LinkSetUp(lo); err != nil {
			return fmt.Errorf("bringing up lo: %w", err)
		}
	}
	if id.MAC == "" {
		return nil
	}
	link, err := setAddress(id.MAC, id.Address)
	if err != nil {
		return err
	}
	gateway := id.Gateway
	if d := id.Direct; d != nil {
		second, err := setAddress(d.MAC, d.Address)
		if err != nil {
			return err
		}
		if d.Gateway.IsValid() {
			link, gateway = second, d.Gateway
		}
	}
	if !gateway.IsValid() {
		return nil
	}
	route := &netlink.Route{LinkIndex: link.Attrs().Index, Dst: &net.IPNet{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)}, Gw: gateway.AsSlice()}
	if err := netlink.RouteReplace(route); err != nil {
		return fmt.Errorf("routing through %s: %w", gateway, err)
	}
	return nil
}

// setAddress gives the interface with the hardware address mac an address, and no other of
// IPv4.
func setAddress(mac string, address netip.Prefix) (netlink.Link, error) {
	link, err := awaitLink(mac)
	if err != nil {
		return nil, err
	}
	name := link.Attrs().Name
	want := &netlink.Addr{IPNet: &net.IPNet{
		IP:   address.Addr().AsSlice(),
		Mask: net.CIDRMask(address.Bits(), 32),
	}}
	if err := netlink.LinkSetUp(link); err != nil {
		return nil, fmt.Errorf("bringing up %s: %w", name, err)
	}
	if err := netlink.AddrReplace(link, want); err != nil {
		return nil, fmt.Errorf("giving %s the address %s: %w", name, address, err)
	}
	have, err := netlink.AddrList(link, netlink.FAMILY_V4)
	if err != nil {
		return nil, fmt.Errorf("listing the addresses of %s: %w", name, err)
	}
	for _, a := range have {
		if a.IPNet.String() == want.IPNet.String() {
			continue
		}
		if err := netlink.AddrDel(link, &a); err != nil {
			return nil, fmt.Errorf("removing the address %s of %s: %w", a.IPNet, name, err)
		}
	}
	return link, nil
}

// awaitLink returns the interface with the hardware address mac.
func awaitLink(mac string) (netlink.Link, error) {
	ctx, cancel := context.WithTimeoutCause(context.Background(), nicTime, errors.New("it did not appear"))
	defer cancel()
	wait := newBackoff()
	for {
		links, err := netlink.LinkList()
		if err != nil {
			return nil, fmt.Errorf("listing network interfaces: %w", err)
		}
		for _, l := range links {
			if l.Type() == "device" && l.Attrs().HardwareAddr.String() == mac {
				return l, nil
			}
		}
		if err := wait.sleep(ctx); err != nil {
			return nil, fmt.Errorf("waiting for the interface with address %s: %w", mac, err)
		}
	}
}
