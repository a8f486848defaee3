// SPDX-License-Identifier: Apache-2.0

//go:build e2e

package e2e

import (
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"

	"github.com/labfile/lab/providers/libvirt/daemontest"
)

// TestLibvirtNetwork has the machines of another host reach one another, and what that host
// reaches, without the way through this one.
func TestLibvirtNetwork(t *testing.T) {
	connected := func(network string) string {
		return strings.Replace(shop, "\n", "\nnetwork: "+network+"\n", 1)
	}
	s, far, uri := farSite(t, ordinary(t), connected("nat"))
	labfile := func(network string) { s.write("Labfile", at(uri, connected(network))) }
	networks := func() string { return strings.Join(strings.Fields(far.Virsh("net-list", "--all", "--name")), " ") }
	nat, isolated := fmt.Sprintf("lab-%s-nat", s.id), fmt.Sprintf("lab-%s-isolated", s.id)
	route := func(machine string) string {
		return strings.TrimSpace(s.ok("exec", machine, "--", "ip route | grep default"))
	}

	s.write("Labfile", connected("nat"))
	s.fails(5, []string{"network: nat", "provider qemu has the lab's own switch only"}, "up")
	s.write("Labfile", at("qemu:///session", connected("nat")))
	s.fails(5, []string{"the libvirt of a session, qemu:///session, makes no networks"}, "up")

	// A box is baked by that way, too.
	s.write("Labfile", strings.Replace(at(uri, connected("nat")), "  db:\n", "  db:\n    provision:\n      - shell: ip route > /etc/route\n", 1))
	s.ok("up")
	db := netip.MustParseAddr(s.machine("db").Direct)
	gateway := netip.PrefixFrom(db, 16).Masked().Addr().Next().String()
	want := "default via " + gateway + " dev eth1"
	s.equal("the networks", networks(), nat)
	s.equal("the way out of a bake", strings.TrimSpace(s.ok("exec", "db", "--", "grep default /etc/route")), want)
	s.equal("the way out", route("db"), want)
	s.ok("exec", "db", "--", "ping -c 1 -w 20 "+gateway)
	s.pings("web-1", "db", db.String())
	s.pings("db", "web-2", s.machine("web-2").Direct)
	resp, err := http.Get(fmt.Sprintf("http://127.0.0.1:%d/", s.machine("web-1").Ports[0].Host))
	if err != nil {
		t.Fatal(err)
	}
	if page, err := io.ReadAll(resp.Body); err != nil || resp.StatusCode != http.StatusOK || len(page) == 0 {
		t.Errorf("through a forwarded port: %s %q, %v", resp.Status, page, err)
	}
	resp.Body.Close()

	boot := func() string { return s.lab("exec", "db", "--", "cat /proc/sys/kernel/random/boot_id").stdout }
	old := boot()
	s.lab("exec", "db", "--", "reboot")
	s.wait("the guest is back", func() bool { b := boot(); return b != "" && b != old })
	s.equal("the way out after a reboot", route("db"), want)
	s.pings("db", "web-1", s.machine("web-1").Direct)
	s.ok("stop")
	far.Virsh("net-destroy", nat)
	s.ok("start")
	s.pings("db", "web-1", s.machine("web-1").Direct)

	// Where the Labfile says nothing, the world is reached as ever.
	s.write("Labfile", at(uri, shop))
	if plan := s.fails(2, nil, "plan"); !strings.Contains(plan.stdout+plan.stderr, "network changed: nat -> isolated") {
		t.Errorf("the plan: %s%s", plan.stdout, plan.stderr)
	}
	s.ok("up", "--yes")
	if got := networks(); !strings.Contains(got, isolated) {
		t.Errorf("the networks are %s", got)
	}
	s.pings("web-1", "db", s.machine("db").Direct)
	if got := route("db"); !strings.HasSuffix(got, "dev eth0") {
		t.Errorf("the way out: %s", got)
	}
	labfile("isolated")
	s.ok("plan")
	networkTakeovers(s, far, isolated)

	labfile("switch")
	s.ok("up", "--yes", "db")
	s.pings("db", "web-1", s.machine("web-1").Address) // who is in no network knows nothing of it
	s.pings("web-1", "db", s.machine("db").Address)
	s.ok("destroy", "--yes")
	s.gone = true
	s.equal("the networks", networks(), "")
	nothingFar(s, far)
}

// networkTakeovers replaces a machine that others reach where it runs. In its place the next
// one has its address; beside it, one of its own, and what is connected has its time.
func networkTakeovers(s *site, far *daemontest.Far, network string) {
	before := s.machine("web-1")
	s.ok("replace", "web-1", "--yes")
	after := s.machine("web-1")
	s.equal("the address at the switch", after.Address, before.Address)
	s.equal("the address where it runs", after.Direct, before.Direct)
	s.pings("db", "web-1", before.Direct)
	leases := func() int { return strings.Count(far.Virsh("net-dumpxml", network), "ip='"+before.Direct+"'") }
	if n := leases(); n != 1 {
		s.Errorf("%s is leased %d times", before.Direct, n)
	}

	labfile := string(read(s, filepath.Join(s.dir, "Labfile")))
	blueGreen := strings.Replace(labfile, `    ports: ["0:80"]`, "    ports: [\"0:80\"]\n    replace: {strategy: blue-green, drain: 5m}", 1)
	blueGreen = strings.Replace(blueGreen, "    ready:\n", "    ready:\n      - port: 80\n", 1)
	s.write("Labfile", blueGreen)
	s.ok("up", "--yes")
	s.ok("exec", "web-1", "--", "mkdir -p /srv/www/cgi-bin; printf '#!/bin/sh\\necho; sleep 30; hostname\\n' > /srv/www/cgi-bin/slow; chmod +x /srv/www/cgi-bin/slow")
	s.ok("exec", "db", "--", `
		(timeout 300 wget -q -O /tmp/slow http://web-1/cgi-bin/slow || echo lost > /tmp/slow) < /dev/null > /dev/null 2>&1 &
		(while [ ! -e /tmp/stop ]; do timeout 20 wget -q -O /dev/null http://web-1/ && echo ok || echo lost; done) < /dev/null > /tmp/requests 2>&1 &`)
	s.ok("replace", "web-1", "--yes")
	s.ok("exec", "db", "--", "touch /tmp/stop")
	s.equal("what was asked for long before", s.ok("exec", "db", "--", "cat /tmp/slow"), "web-1\n")
	requests := s.ok("exec", "db", "--", "cat /tmp/requests")
	if strings.Count(requests, "ok") < 10 || strings.Contains(requests, "lost") {
		s.Errorf("what was asked for meanwhile:\n%s", requests)
	}
	beside := s.machine("web-1")
	if beside.Direct == before.Direct {
		s.Errorf("two generations had %s at once", beside.Direct)
	}
	s.pings("db", "web-1", beside.Direct)
	s.write("Labfile", labfile)
	s.ok("up", "--yes")
}
