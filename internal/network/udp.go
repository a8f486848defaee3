// SPDX-License-Identifier: Apache-2.0

package network

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"sync"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
)

// maxClients bounds the clients of a forwarded UDP port. A packet of one more is lost.
const maxClients = 1024

// ListenUDP forwards packets to hostPort of 127.0.0.1 through dial, until Stop or the
// end of ctx: each client has a flow of its own, which ends when nothing went through it
// for a while. Host port 0 picks a free one. A port that cannot be had is a *PortError.
func ListenUDP(ctx context.Context, hostPort uint16, dial func(context.Context) (net.Conn, error)) (*Forward, error) {
	c, err := listenUDP(ctx, hostPort)
	if err != nil {
		return nil, err
	}
	u := &udpForward{conn: c, dial: dial, flows: map[netip.AddrPort]*udpFlow{}}
	f := &Forward{ln: c, port: uint16(c.LocalAddr().(*net.UDPAddr).Port), udp: u}
	ctx, f.cancel = context.WithCancel(ctx)
	context.AfterFunc(ctx, func() { c.Close() })
	f.wg.Go(func() { u.serve(ctx, &f.wg) })
	return f, nil
}

// listenUDP listens on a UDP port of the host's loopback. An error is a *PortError.
func listenUDP(ctx context.Context, hostPort uint16) (*net.UDPConn, error) {
	c, err := (&net.ListenConfig{}).ListenPacket(ctx, "udp4", net.JoinHostPort("127.0.0.1", strconv.Itoa(int(hostPort))))
	if err != nil {
		return nil, &PortError{Port: hostPort, UDP: true, Err: reason(err)}
	}
	return c.(*net.UDPConn), nil
}

// udpForward is a UDP port of the host that leads to a machine.
type udpForward struct {
	conn *net.UDPConn
	dial func(context.Context) (net.Conn, error)

	mu    sync.Mutex
	flows map[netip.AddrPort]*udpFlow // by client
}

// udpFlow is what one client sends and gets.
type udpFlow struct {
	packets chan []byte // from the client
	end     context.CancelFunc
}

// backlog is how many packets of a client wait for the guest. More are lost, as on any
// network.
const backlog = 64

// serve takes packets of clients until the socket is closed.
func (u *udpForward) serve(ctx context.Context, wg *sync.WaitGroup) {
	buf := make([]byte, 1<<16)
	for {
		n, from, err := u.conn.ReadFromUDPAddrPort(buf)
		if err != nil {
			if ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
				u.renew()
				return
			}
			continue // what a client did not take is told as an error of the socket
		}
		if flow := u.flow(ctx, wg, from); flow != nil {
			select {
			case flow.packets <- append([]byte(nil), buf[:n]...):
			default:
			}
		}
	}
}

// flow returns the client's flow, which it begins if there is none; nil if there are too
// many.
func (u *udpForward) flow(ctx context.Context, wg *sync.WaitGroup, client netip.AddrPort) *udpFlow {
	u.mu.Lock()
	defer u.mu.Unlock()
	if flow := u.flows[client]; flow != nil {
		return flow
	}
	if len(u.flows) >= maxClients {
		return nil
	}
	flow := &udpFlow{packets: make(chan []byte, backlog)}
	ctx, flow.end = context.WithCancel(ctx)
	u.flows[client] = flow
	wg.Go(func() {
		defer u.forget(client, flow)
		u.carry(ctx, flow, client)
	})
	return flow
}

func (u *udpForward) forget(client netip.AddrPort, flow *udpFlow) {
	flow.end()
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.flows[client] == flow {
		delete(u.flows, client)
	}
}

// renew ends every flow. The next packet of a client begins a new one, which leads to
// where the port leads then.
func (u *udpForward) renew() {
	u.mu.Lock()
	defer u.mu.Unlock()
	for client, flow := range u.flows {
		flow.end()
		delete(u.flows, client)
	}
}

// carry passes the packets of a flow both ways.
func (u *udpForward) carry(ctx context.Context, flow *udpFlow, client netip.AddrPort) {
	dctx, cancel := context.WithTimeout(ctx, dialTimeout)
	guest, err := u.dial(dctx)
	cancel()
	if err != nil {
		return
	}
	relay(ctx, &udpClient{u.conn, flow.packets, client, make(chan struct{}), sync.Once{}}, guest, udpIdle)
}

// udpClient is a client of the host as one end of a flow. Only what relay needs works.
type udpClient struct {
	*net.UDPConn // all clients have it in common
	packets      chan []byte
	addr         netip.AddrPort
	closed       chan struct{}
	once         sync.Once
}

func (c *udpClient) Read(b []byte) (int, error) {
	select {
	case p := <-c.packets:
		return copy(b, p), nil
	case <-c.closed:
		return 0, net.ErrClosed
	}
}

func (c *udpClient) Write(b []byte) (int, error) { return c.WriteToUDPAddrPort(b, c.addr) }

func (c *udpClient) SetDeadline(time.Time) error { return nil } // Close wakes Read

func (c *udpClient) Close() error {
	c.once.Do(func() { close(c.closed) })
	return nil
}

// Renew has what clients send from now on lead to where the forward leads now. A
// connection of TCP stays where it is.
func (f *Forward) Renew() {
	if f.udp != nil {
		f.udp.renew()
	}
}

// DialUDP returns a flow of packets to a UDP port of the machine that is plugged in at p,
// as DialPort. Whether a program listens there is not known.
func (s *Switch) DialUDP(_ context.Context, p *Port, port uint16) (net.Conn, error) {
	target := netip.AddrPortFrom(p.addr, port)
	if p.ctx.Err() != nil {
		return nil, fmt.Errorf("dialing %v: %w", target, context.Cause(p.ctx))
	}
	c, err := s.gateway.dialUDP(p, target)
	if err != nil {
		return nil, fmt.Errorf("dialing %v: %w", target, err)
	}
	p.touch()
	return p.tie(c), nil
}

// dialUDP makes a flow to a machine.
func (g *gateway) dialUDP(p *Port, to netip.AddrPort) (net.Conn, error) {
	wq := newQueue()
	ep, terr := g.stack.NewEndpoint(udp.ProtocolNumber, ipv4.ProtocolNumber, wq)
	if terr != nil {
		return nil, errors.New(terr.String())
	}
	err := g.claim(ep, protoUDP, p, to)
	if err == nil {
		if terr := ep.Connect(fullAddr(to)); terr != nil {
			err = errors.New(terr.String())
		}
	}
	if err != nil {
		ep.Close()
		return nil, err
	}
	return gonet.NewUDPConn(wq, ep), nil
}
