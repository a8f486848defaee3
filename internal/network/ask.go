// SPDX-License-Identifier: Apache-2.0

package network

import (
	"context"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// askLook is how often Ask looks whether something came.
const askLook = 50 * time.Millisecond

// Ask sends the machine an ARP request of the gateway (RFC 826), which a guest's kernel
// answers without its services, and returns once a frame has come from it. The guest logs
// nothing of it, and it does not count for LastActive. The error is why the cable is gone,
// or ctx's cause.
func (p *Port) Ask(ctx context.Context) error {
	before := p.framesIn.Load()
	g := p.sw.gateway
	to := p.sw.macs[p.host]
	frame := make([]byte, header.EthernetMinimumSize+header.ARPSize)
	g.ethernet(frame, to, header.ARPProtocolNumber)
	arp := header.ARP(frame[header.EthernetMinimumSize:])
	arp.SetIPv4OverEthernet()
	arp.SetOp(header.ARPRequest)
	gateway, target := p.sw.net.Gateway.As4(), p.addr.As4()
	copy(arp.HardwareAddressSender(), g.mac[:])
	copy(arp.ProtocolAddressSender(), gateway[:])
	copy(arp.ProtocolAddressTarget(), target[:])
	p.send(frame)
	t := time.NewTicker(askLook)
	defer t.Stop()
	for p.framesIn.Load() == before {
		select {
		case <-t.C:
		case <-p.ctx.Done():
			return p.Err()
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return nil
}
