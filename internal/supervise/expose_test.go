// SPDX-License-Identifier: Apache-2.0

package supervise

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/network"
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
		{"a command's", func() error { return c.AddRelays(ctx, []proxy.Relay{relay(1, first)}) }, map[uint16]string{1: "first"}},
		{"another command's", func() error { return c.AddRelays(ctx, []proxy.Relay{relay(2, second)}) }, map[uint16]string{1: "first", 2: "second"}},
		{"the same port", func() error { return c.AddRelays(ctx, []proxy.Relay{relay(1, second)}) }, map[uint16]string{1: "second", 2: "second"}},
		{"beside a port that is exposed", func() error {
			return errors.Join(c.Expose(ctx, []lab.Exposed{{Name: "api", Port: exposed}}), c.ReplaceRelays(ctx, []proxy.Relay{relay(exposed, first), relay(3, first)}))
		}, map[uint16]string{1: "refused", 2: "refused", 3: "first", exposed: "second"}},
		{"nothing any more", func() error { return errors.Join(c.Expose(ctx, nil), c.ReplaceRelays(ctx, nil)) }, map[uint16]string{3: "refused", exposed: "refused"}},
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
	s := aside(t)
	s.exposed = []lab.Exposed{{Name: "api", Port: 1}}
	add := func(relays ...proxy.Relay) {
		t.Helper()
		if err := s.addRelays(relays); err != nil {
			t.Fatal(err)
		}
	}
	add(proxy.Relay{Name: "gateway.lab.internal", Port: 3128}, proxy.Relay{Name: "secure.corp", Port: 443})
	for n := range 2 * maxRelays {
		add(proxy.Relay{Name: fmt.Sprintf("p%d", n), Port: uint16(1000 + n)})
	}
	add(proxy.Relay{Name: "secure.corp", Port: 443})
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

// to3128 is one to PROXY:3128.
func to3128(port uint16, proxyHost string) proxy.Relay {
	return proxy.Relay{Name: "gateway.lab.internal", Port: port, To: []string{proxyHost + ":3128"}}
}

// aside returns a supervisor without clients and without a switch.
func aside(t *testing.T) *supervisor {
	t.Helper()
	s := &supervisor{cfg: Config{ID: labID, Dirs: testDirs(t)}}
	if err := os.MkdirAll(s.cfg.Dirs.RunLab(labID), 0o700); err != nil {
		t.Fatal(err)
	}
	return s
}

// leads says where the gateway's ports lead.
func leads(s *supervisor) map[uint16]string {
	m := map[uint16]string{}
	for port, to := range s.openPorts() {
		m[port] = strings.Join(to, " ")
	}
	return m
}

func TestPortsOfTheGateway(t *testing.T) {
	s := aside(t)
	ok := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	want := func(when string, want map[uint16]string) {
		t.Helper()
		if diff := cmp.Diff(want, leads(s)); diff != "" {
			t.Errorf("%s:\n%s", when, diff)
		}
	}
	ok(s.addRelays([]proxy.Relay{to3128(1, "a"), to3128(2, "b")}))
	ok(s.addRelays([]proxy.Relay{to3128(2, "c"), to3128(3, "d")}))
	want("added, the second port twice", map[uint16]string{1: "a:3128", 2: "c:3128", 3: "d:3128"})
	s.expose([]lab.Exposed{{Name: "api", Port: 2}})
	want("the Labfile's ports come first", map[uint16]string{1: "a:3128", 2: strings.Join(network.Loopback(2), " "), 3: "d:3128"})
	s.expose(nil)
	want("no longer exposed", map[uint16]string{1: "a:3128", 2: "c:3128", 3: "d:3128"})
	ok(s.replaceRelays([]proxy.Relay{to3128(4, "e")}))
	want("replaced", map[uint16]string{4: "e:3128"})
	for port := range uint16(maxRelays) {
		ok(s.addRelays([]proxy.Relay{to3128(100+port, "f")}))
	}
	if got := leads(s); len(got) != maxRelays || got[4] != "" || got[100] == "" {
		t.Errorf("the limit: %d relays, %v", len(got), got)
	}
	ok(s.replaceRelays(nil))
	want("none", map[uint16]string{})
}

// The next supervisor has the relays that guests were told of.
func TestRelaysOutliveTheSupervisor(t *testing.T) {
	d := testDirs(t)
	r, c := run(t, d, nil)
	ctx := testContext(t)
	if err := c.AddRelays(ctx, []proxy.Relay{to3128(1, "a")}); err != nil {
		t.Fatal(err)
	}
	if err := Stop(ctx, d, labID); err != nil {
		t.Fatal(err)
	}
	if err := r.wait(t); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(d.RunLab(labID), "relays.json")
	if fi, err := os.Stat(path); err != nil || fi.Mode() != 0o600 {
		t.Errorf("%v, %v", fi, err)
	}
	_, c = run(t, d, nil)
	if err := c.AddRelays(ctx, []proxy.Relay{to3128(2, "b")}); err != nil {
		t.Fatal(err)
	}
	got, err := Relays(d, labID)
	if diff := cmp.Diff([]proxy.Relay{to3128(1, "a"), to3128(2, "b")}, got); diff != "" || err != nil {
		t.Errorf("%v\n%s", err, diff)
	}
	if err := c.ReplaceRelays(ctx, nil); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a file without relays: %v", err)
	}
	if err := os.WriteFile(path, []byte("[{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Relays(d, labID); err == nil {
		t.Error("a damaged file is read")
	}
	if err := Stop(ctx, d, labID); err != nil {
		t.Fatal(err)
	}
	run(t, d, nil) // it serves all the same
}

// A supervisor of before there were relays refuses them, and the user is told what to do.
func TestOldSupervisorRefusesRelays(t *testing.T) {
	d := testDirs(t)
	if err := os.MkdirAll(d.RunLab(labID), 0o700); err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("unix", socketPath(d, labID))
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	go func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			var q request
			if readLine(bufio.NewReader(conn), &q) == nil {
				r := reply{Version: "v0.9.0", PID: 7}
				if q.Op != opHello {
					r = reply{Error: &wireError{Text: fmt.Sprintf("the lab's supervisor (version v0.9.0) does not know the request %q", q.Op)}}
				}
				_ = writeLine(conn, r)
			}
			conn.Close()
		}
	}()
	ctx := testContext(t)
	c, err := Dial(ctx, d, labID)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for what, err := range map[string]error{
		"add":     c.AddRelays(ctx, []proxy.Relay{to3128(1, "a")}),
		"replace": c.ReplaceRelays(ctx, nil),
	} {
		var old *OldError
		if !errors.As(err, &old) || old.Error() != "the lab's supervisor (process 7, version v0.9.0) is of an older lab, which does not know how" ||
			old.Hint() != `"kill 7" ends it: the machines run on, and the next command starts a new one` {
			t.Errorf("%s: %v", what, err)
		}
	}
}
