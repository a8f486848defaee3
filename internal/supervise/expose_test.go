// SPDX-License-Identifier: Apache-2.0

package supervise

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"testing"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/proxy"
)

// A port of the gateway leads to the proxy that was named last, until all are replaced; what
// the Labfile exposes comes first.
func TestRelays(t *testing.T) {
	d := testDirs(t)
	_, c := run(t, d, nil)
	ctx := testContext(t)
	v := boot(t, d, "db", 1, 10)
	if _, err := c.Plug(ctx, v.machine()); err != nil {
		t.Fatal(err)
	}
	serve := func(says string) string {
		ln, err := net.Listen("tcp4", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { ln.Close() })
		go func() {
			for {
				c, err := ln.Accept()
				if err != nil {
					return
				}
				_, _ = io.WriteString(c, says)
				c.Close()
			}
		}()
		return ln.Addr().String()
	}
	first, second := serve("first"), serve("second")
	gateway := tcpip.AddrFrom4(lab.NetworkOf(labID).Gateway.As4())
	want := func(when string, port uint16, want string) {
		t.Helper()
		got := "refused"
		if conn, err := gonet.DialContextTCP(testContext(t), v.stack, tcpip.FullAddress{NIC: 1, Addr: gateway, Port: port}, ipv4.ProtocolNumber); err == nil {
			b, _ := io.ReadAll(conn)
			conn.Close()
			got = string(b)
		}
		if got != want {
			t.Errorf("%s: %s, want %s", when, got, want)
		}
	}
	relay := func(port uint16, to string) proxy.Relay {
		return proxy.Relay{Name: "gateway.lab.internal", Port: port, To: []string{to}}
	}
	exposed := netip.MustParseAddrPort(second).Port()
	steps := []struct {
		when string
		do   func() error
		want map[uint16]string
	}{
		{"at the beginning", func() error { return nil }, map[uint16]string{1: "refused"}},
		{"a session's", func() error { return c.Relay(ctx, []proxy.Relay{relay(1, first)}) }, map[uint16]string{1: "first"}},
		{"another session's", func() error { return c.Relay(ctx, []proxy.Relay{relay(2, second)}) }, map[uint16]string{1: "first", 2: "second"}},
		{"the same port", func() error { return c.Relay(ctx, []proxy.Relay{relay(1, second)}) }, map[uint16]string{1: "second", 2: "second"}},
		{"beside a port that is exposed", func() error {
			return c.Expose(ctx, []lab.Exposed{{Name: "api", Port: exposed}}, []proxy.Relay{relay(exposed, first), relay(3, first)})
		}, map[uint16]string{1: "refused", 2: "refused", 3: "first", exposed: "second"}},
		{"nothing any more", func() error { return c.Expose(ctx, nil, nil) }, map[uint16]string{3: "refused", exposed: "refused"}},
	}
	for _, s := range steps {
		if err := s.do(); err != nil {
			t.Fatal(err)
		}
		for port, says := range s.want {
			want(s.when, port, says)
		}
	}
}

func TestNamesOfHost(t *testing.T) {
	s := &supervisor{cfg: Config{ID: labID}}
	s.exposed = []lab.Exposed{{Name: "api", Port: 1}}
	s.relay([]proxy.Relay{{Name: "gateway.lab.internal", Port: 3128}, {Name: "secure.corp", Port: 443}})
	for n := range 2 * maxRelays {
		s.relay([]proxy.Relay{{Name: fmt.Sprintf("p%d", n), Port: uint16(1000 + n)}})
	}
	s.relay([]proxy.Relay{{Name: "secure.corp", Port: 443}})
	names := s.names()
	for _, name := range []string{"api", "gateway", "secure.corp"} {
		if a := names[name]; len(a) != 1 || a[0] != lab.NetworkOf(labID).Gateway {
			t.Errorf("%s leads to %v", name, a)
		}
	}
	if len(s.relays) != maxRelays || len(names) != maxRelays+2 {
		t.Errorf("%d relays and %d names are kept", len(s.relays), len(names))
	}
}
