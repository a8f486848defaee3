// SPDX-License-Identifier: Apache-2.0

package network

import (
	"context"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/miekg/dns"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"

	"github.com/labfile/lab/internal/lab"
)

const (
	// maxQuestions bounds the questions to the outside that wait for an answer,
	// for each guest.
	maxQuestions = 64

	// maxDNSConns bounds the TCP connections to the name server, for each guest.
	maxDNSConns = 32

	// resolveTimeout bounds the wait for one of the host's resolvers. Guests
	// themselves wait for five seconds (resolv.conf(5)).
	resolveTimeout = 2 * time.Second
)

// nameTable is what the names of a lab mean. It is never changed, only replaced.
type nameTable struct {
	addrs map[string][]netip.Addr // by lower-case name without the domain
	ptrs  map[netip.Addr]string   // fully qualified
	// direct are addresses of machines in another network than the lab's, by those that
	// they have here.
	direct map[netip.Addr]netip.Prefix
	turn   atomic.Uint32 // which address comes first
}

// SetNames replaces the names that guests can look up. A name stands for itself
// and for itself in lab.Domain, in any case, and one with dots hides what it means outside; one with several addresses is
// answered with all of them, in turns. The reverse of an address is its name with
// no other address, the first in the alphabet if it has several.
//
// Machines that are in direct have an address in another network, too, which stands there
// with that network: a guest that asks for one in the same gets that.
func (s *Switch) SetNames(names map[string][]netip.Addr, direct map[netip.Addr]netip.Prefix) {
	t := &nameTable{addrs: make(map[string][]netip.Addr, len(names)), ptrs: make(map[netip.Addr]string), direct: maps.Clone(direct)}
	for name, addrs := range names {
		name = strings.ToLower(name)
		t.addrs[name] = slices.Clone(addrs)
		if len(addrs) != 1 || strings.Contains(name, ".") { // a name from outside is not the lab's to give back
			continue
		}
		full := name + "." + lab.Domain + "."
		if old, ok := t.ptrs[addrs[0]]; !ok || full < old {
			t.ptrs[addrs[0]] = full
			if other, ok := direct[addrs[0]]; ok {
				t.ptrs[other.Addr()] = full
			}
		}
	}
	s.names.Store(t)
}

// nameServer answers the guests' DNS questions, at the gateway's address.
type nameServer struct {
	sw        *Switch
	resolvers func() []netip.AddrPort
	servers   []*dns.Server
	waiting   [256]flowLimit // by last byte of the guest's address
}

func newNameServer(g *gateway, resolvers func() []netip.AddrPort) (*nameServer, error) {
	n := &nameServer{sw: g.sw, resolvers: resolvers}
	for i := range n.waiting {
		n.waiting[i].max = maxQuestions
	}
	at := fullAddr(netip.AddrPortFrom(g.sw.net.Gateway, lab.DNSPort))
	pc, err := gonet.DialUDP(g.stack, &at, nil, ipv4.ProtocolNumber)
	if err != nil {
		return nil, fmt.Errorf("starting the name server: %w", err)
	}
	ln, err := gonet.ListenTCP(g.stack, at, ipv4.ProtocolNumber)
	if err != nil {
		_ = pc.Close()
		return nil, fmt.Errorf("starting the name server: %w", err)
	}
	n.servers = []*dns.Server{
		{PacketConn: pc, Handler: dns.HandlerFunc(n.serveUDP)},
		{Listener: newGuestListener(g.sw, ln, maxDNSConns), Handler: dns.HandlerFunc(n.serveTCP)},
	}
	for _, srv := range n.servers {
		started := make(chan struct{})
		srv.NotifyStartedFunc = func() { close(started) }
		g.sw.wg.Go(func() {
			if err := srv.ActivateAndServe(); err != nil && g.sw.ctx.Err() == nil {
				g.sw.log.Error("the name server ended", "err", err)
			}
		})
		<-started
	}
	return n, nil
}

// guestListener accepts a bounded number of connections of each guest at a time,
// and closes the others.
type guestListener struct {
	net.Listener
	sw   *Switch
	open [256]flowLimit // by last byte of the guest's address
}

func newGuestListener(sw *Switch, ln net.Listener, most int32) *guestListener {
	l := &guestListener{Listener: ln, sw: sw}
	for i := range l.open {
		l.open[i].max = most
	}
	return l
}

func (l *guestListener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		host, ok := l.sw.hostOf(addrOf(c.RemoteAddr()))
		if !ok || !l.open[host].take() {
			c.Close()
			continue
		}
		return &guestConn{Conn: c, give: sync.OnceFunc(l.open[host].give)}, nil
	}
}

// guestConn is a connection that is counted.
type guestConn struct {
	net.Conn
	give func()
}

func (c *guestConn) Close() error {
	defer c.give()
	return c.Conn.Close()
}

func (n *nameServer) close() {
	ctx, cancel := context.WithTimeout(context.Background(), resolveTimeout)
	defer cancel()
	for _, srv := range n.servers {
		_ = srv.ShutdownContext(ctx)
	}
}

func (n *nameServer) serveUDP(w dns.ResponseWriter, ask *dns.Msg) {
	size := dns.MinMsgSize
	if opt := ask.IsEdns0(); opt != nil {
		size = max(size, int(opt.UDPSize()))
	}
	// What does not fit an Ethernet frame is asked again over TCP (RFC 9715).
	n.serve(w, ask, min(size, 1400))
}

func (n *nameServer) serveTCP(w dns.ResponseWriter, ask *dns.Msg) { n.serve(w, ask, dns.MaxMsgSize) }

func (n *nameServer) serve(w dns.ResponseWriter, ask *dns.Msg, size int) {
	reply := n.answer(w.RemoteAddr(), ask)
	reply.Truncate(size)
	_ = w.WriteMsg(reply) // the guest asks again
}

func (n *nameServer) answer(from net.Addr, ask *dns.Msg) *dns.Msg {
	reply := new(dns.Msg)
	if ask.Opcode != dns.OpcodeQuery {
		return reply.SetRcode(ask, dns.RcodeNotImplemented)
	}
	if len(ask.Question) != 1 || ask.Question[0].Qclass != dns.ClassINET {
		return reply.SetRcode(ask, dns.RcodeRefused)
	}
	if n.sw.names.Load().answer(addrOf(from), reply.SetReply(ask), n.sw.net.Subnet) {
		reply.RecursionAvailable = true
		if opt := ask.IsEdns0(); opt != nil {
			reply.SetEdns0(1400, false)
		}
		return reply
	}
	host, ok := n.sw.hostOf(addrOf(from))
	if !ok || !n.waiting[host].take() {
		return reply.SetRcode(ask, dns.RcodeServerFailure)
	}
	defer n.waiting[host].give()
	return n.askOutside(ask)
}

func addrOf(a net.Addr) netip.Addr {
	switch a := a.(type) {
	case *net.UDPAddr:
		return a.AddrPort().Addr().Unmap()
	case *net.TCPAddr:
		return a.AddrPort().Addr().Unmap()
	}
	return netip.Addr{}
}

// answer fills in the reply to a guest if the question is the lab's own to answer, and
// reports whether it is.
func (t *nameTable) answer(guest netip.Addr, reply *dns.Msg, subnet netip.Prefix) bool {
	q := reply.Question[0]
	name := strings.ToLower(strings.TrimSuffix(q.Name, "."))
	if addr, ok := reverseName(name); ok {
		if _, ours := t.ptrs[addr]; !ours && !subnet.Contains(addr) {
			return false
		}
		t.answerPTR(reply, q, addr)
		return true
	}
	short, local := strings.CutSuffix(name, "."+lab.Domain)
	local = local || name == lab.Domain
	addrs, known := t.addrs[short]
	switch {
	case !known && !local:
		// A bare word that is no machine's means nothing outside either; top
		// level domains have no addresses, but may be asked for the rest.
		if strings.Contains(name, ".") || name == "" || q.Qtype != dns.TypeA && q.Qtype != dns.TypeAAAA {
			return false
		}
		reply.Rcode = dns.RcodeNameError
	case !known && name != lab.Domain:
		reply.Rcode = dns.RcodeNameError
	case q.Qtype == dns.TypeA || q.Qtype == dns.TypeANY:
		first := 0
		if len(addrs) > 1 {
			first = int(t.turn.Add(1)) % len(addrs)
		}
		own, near := t.direct[guest]
		for i := range addrs {
			addr := addrs[(first+i)%len(addrs)]
			if other, ok := t.direct[addr]; near && ok && other.Masked() == own.Masked() {
				addr = other.Addr()
			}
			reply.Answer = append(reply.Answer, &dns.A{
				Hdr: dns.RR_Header{Name: q.Name, Rrtype: dns.TypeA, Class: dns.ClassINET},
				A:   addr.AsSlice(),
			})
		}
	}
	reply.Authoritative = true
	if local && len(reply.Answer) == 0 {
		reply.Ns = append(reply.Ns, startOfAuthority())
	}
	return true
}

func (t *nameTable) answerPTR(reply *dns.Msg, q dns.Question, addr netip.Addr) {
	reply.Authoritative = true
	name, ok := t.ptrs[addr]
	switch {
	case !ok:
		reply.Rcode = dns.RcodeNameError
	case q.Qtype == dns.TypePTR || q.Qtype == dns.TypeANY:
		reply.Answer = append(reply.Answer, &dns.PTR{
			Hdr: dns.RR_Header{Name: q.Name, Rrtype: dns.TypePTR, Class: dns.ClassINET},
			Ptr: name,
		})
	}
}

// startOfAuthority goes with answers that say no: resolvers may keep those for
// no time at all (RFC 2308), because the machine may come up in a moment.
func startOfAuthority() dns.RR {
	return &dns.SOA{
		Hdr: dns.RR_Header{Name: lab.Domain + ".", Rrtype: dns.TypeSOA, Class: dns.ClassINET},
		Ns:  "gateway." + lab.Domain + ".", Mbox: "lab." + lab.Domain + ".",
		Serial: 1, Refresh: 3600, Retry: 600, Expire: 86400,
	}
}

// reverseName returns the address that a name under in-addr.arpa stands for.
func reverseName(name string) (netip.Addr, bool) {
	rest, ok := strings.CutSuffix(name, ".in-addr.arpa")
	if !ok {
		return netip.Addr{}, false
	}
	labels := strings.Split(rest, ".")
	slices.Reverse(labels)
	addr, err := netip.ParseAddr(strings.Join(labels, "."))
	return addr, err == nil && addr.Is4()
}
