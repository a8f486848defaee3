// SPDX-License-Identifier: Apache-2.0

package network

import (
	"context"
	"net/netip"
	"os"
	"strconv"
	"sync"
	"time"

	"github.com/miekg/dns"
)

// askOutside passes a question on to the host's resolvers, in their order, and
// returns the first answer that is one.
func (n *nameServer) askOutside(ask *dns.Msg) *dns.Msg {
	ctx, cancel := context.WithTimeout(n.sw.ctx, 2*resolveTimeout)
	defer cancel()
	q := ask.Copy()
	q.Id = dns.Id() // the guest's would make forging an answer easier
	var last *dns.Msg
	for _, server := range n.resolvers() {
		r, err := n.exchange(ctx, q, server.String())
		if err != nil {
			continue
		}
		last = r
		if r.Rcode == dns.RcodeSuccess || r.Rcode == dns.RcodeNameError {
			break
		}
	}
	if last == nil {
		return new(dns.Msg).SetRcode(ask, dns.RcodeServerFailure)
	}
	last.Id = ask.Id
	return last
}

// exchange asks over UDP, and over TCP what UDP has no room for.
func (n *nameServer) exchange(ctx context.Context, q *dns.Msg, server string) (*dns.Msg, error) {
	for _, network := range []string{"udp", "tcp"} {
		c := dns.Client{Net: network, Timeout: resolveTimeout}
		r, _, err := c.ExchangeContext(ctx, q, server)
		if err != nil || !r.Truncated || network == "tcp" {
			return r, err
		}
	}
	return nil, context.Cause(ctx)
}

// resolvConf reads the host's name servers, again whenever the file changed: a
// laptop changes networks while labs run.
type resolvConf struct {
	mu      sync.Mutex
	read    time.Time // modification time of what was read
	looked  time.Time
	current []netip.AddrPort
}

const resolvConfPath = "/etc/resolv.conf"

func (r *resolvConf) servers() []netip.AddrPort {
	r.mu.Lock()
	defer r.mu.Unlock()
	if time.Since(r.looked) < time.Second {
		return r.current
	}
	r.looked = time.Now()
	fi, err := os.Stat(resolvConfPath)
	if err != nil || fi.ModTime().Equal(r.read) {
		return r.current
	}
	conf, err := dns.ClientConfigFromFile(resolvConfPath)
	if err != nil {
		return r.current
	}
	r.read, r.current = fi.ModTime(), nil
	port, err := strconv.ParseUint(conf.Port, 10, 16)
	if err != nil {
		port = 53 // of resolv.conf(5)
	}
	for _, s := range conf.Servers {
		if a, err := netip.ParseAddr(s); err == nil {
			r.current = append(r.current, netip.AddrPortFrom(a, uint16(port)))
		}
	}
	return r.current
}
