// SPDX-License-Identifier: Apache-2.0

package network

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
)

// answerUDP answers each packet to a port with "name: packet".
func (g *guest) answerUDP(t testing.TB, port uint16, name string) {
	t.Helper()
	local := fullAddr(netip.AddrPortFrom(g.addr, port))
	c, err := gonet.DialUDP(g.stack, &local, nil, ipv4.ProtocolNumber)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		buf := make([]byte, 2048)
		for {
			n, from, err := c.ReadFrom(buf)
			if err != nil {
				return
			}
			_, _ = c.WriteTo([]byte(name+": "+string(buf[:n])), from)
		}
	}()
	t.Cleanup(func() { _ = c.SetDeadline(past); <-done; c.Close() })
}

// askUDP sends a packet until there is an answer to it: packets can be lost.
func askUDP(t testing.TB, c net.Conn, text string) string {
	t.Helper()
	buf := make([]byte, 2048)
	for end := time.Now().Add(patience); time.Now().Before(end); {
		if _, err := c.Write([]byte(text)); err != nil {
			t.Fatal(err)
		}
		_ = c.SetReadDeadline(time.Now().Add(time.Second))
		if n, err := c.Read(buf); err == nil {
			return string(buf[:n])
		}
	}
	t.Fatalf("no answer to %q", text)
	return ""
}

func client(t testing.TB, port uint16) net.Conn {
	t.Helper()
	c, err := net.Dial("udp4", fmt.Sprintf("127.0.0.1:%d", port))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func TestForwardUDP(t *testing.T) {
	s := newSwitch(t, Config{})
	g := plugGuest(t, s, "dns", 10)
	g.answerUDP(t, 53, "dns")
	f, err := s.ForwardUDP(0, g.addr, 53)
	if err != nil {
		t.Fatal(err)
	}
	one, two := client(t, f.HostPort()), client(t, f.HostPort())
	for i, c := range []net.Conn{one, two, one, two} {
		text := fmt.Sprint("question ", i)
		if got := askUDP(t, c, text); got != "dns: "+text {
			t.Errorf("the answer to %q is %q", text, got)
		}
	}

	// TCP has ports of its own.
	tcp, err := s.Forward(f.HostPort(), g.addr, 53)
	if err != nil {
		t.Error(err)
	} else {
		tcp.Stop()
	}
	_, err = s.ForwardUDP(f.HostPort(), g.addr, 54)
	var pe *PortError
	if !errors.As(err, &pe) || !pe.UDP || pe.Port != f.HostPort() || !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("a port that is taken: %v", err)
	}
	if err := Free(t.Context(), f.HostPort(), true); !errors.As(err, &pe) {
		t.Errorf("a port that is taken is free: %v", err)
	}
	f.Stop()
	f.Stop()
	if err := Free(t.Context(), f.HostPort(), true); err != nil {
		t.Errorf("a forward that was stopped has its port: %v", err)
	}
}

// What a client sends after a takeover goes to the successor.
func TestForwardUDPFollows(t *testing.T) {
	s := newSwitch(t, Config{})
	blue, green := plugGuest(t, s, "blue", 10), plugGuest(t, s, "green", 11)
	blue.answerUDP(t, 53, "blue")
	green.answerUDP(t, 53, "green")
	var to atomic.Pointer[guest]
	to.Store(blue)
	f, err := ListenUDP(t.Context(), 0, func(ctx context.Context) (net.Conn, error) { return s.DialUDP(ctx, to.Load().port, 53) })
	if err != nil {
		t.Fatal(err)
	}
	defer f.Stop()
	c := client(t, f.HostPort())
	if got := askUDP(t, c, "a"); got != "blue: a" {
		t.Errorf("got %q", got)
	}
	to.Store(green)
	f.Renew()
	if got := askUDP(t, c, "b"); got != "green: b" {
		t.Errorf("got %q", got)
	}
}

// Clients beyond the bound are not heard, and cost nothing.
func TestForwardUDPIsBounded(t *testing.T) {
	u := &udpForward{flows: map[netip.AddrPort]*udpFlow{}, dial: func(ctx context.Context) (net.Conn, error) {
		<-ctx.Done()
		return nil, ctx.Err()
	}}
	f := &Forward{}
	ctx, cancel := context.WithCancel(t.Context())
	for i := range maxClients + 10 {
		flow := u.flow(ctx, &f.wg, netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), uint16(1+i)))
		if (flow != nil) != (i < maxClients) {
			t.Fatalf("client %d: %v", i, flow)
		}
	}
	cancel()
	f.wg.Wait()
	if len(u.flows) > 0 {
		t.Errorf("%d flows are left", len(u.flows))
	}
}
