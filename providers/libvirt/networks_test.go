// SPDX-License-Identifier: Apache-2.0

package libvirt

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/providers"
	"github.com/labfile/lab/providers/libvirt/daemontest"
	"github.com/labfile/lab/providers/providertest"
)

func TestNetworkGolden(t *testing.T) {
	for _, kind := range []lab.NetworkKind{lab.NetworkNAT, lab.NetworkIsolated} {
		n := Network{
			Name: "lab-shop-1f3a9c2b-" + string(kind), UUID: uuidOf("/home/ada/labs/shop-1f3a9c2b#" + string(kind)),
			Kind: kind, Subnet: lab.DirectNetworkOf("shop-1f3a9c2b", kind, 0),
		}
		got, err := n.XML()
		if err != nil {
			t.Fatal(err)
		}
		golden(t, "network-"+string(kind)+".xml", got)
	}
}

// Only root can make bridges.
func TestSessionHasNoNetworks(t *testing.T) {
	for _, uri := range []string{"qemu:///session", "qemu+ssh://far/session"} {
		p, ok := New(Config{Dirs: testDirs(t), URI: uri}).(providers.Networker)
		if !ok {
			t.Fatal("it is no Networker")
		}
		if err := p.Networks(t.Context()); !errors.Is(err, providers.ErrNoNetworks) || !strings.Contains(err.Error(), uri) {
			t.Errorf("%s: %v", uri, err)
		}
		if err := p.RemoveNetworks(t.Context(), "shop-1f3a9c2b"); err != nil { // there are none
			t.Errorf("%s: %v", uri, err)
		}
	}
}

// TestNetworks makes networks beside others of that host.
func TestNetworks(t *testing.T) {
	t.Parallel()
	d := daemontest.StartFar(t)
	r := testRemote(t, "qemu+tls://"+d.TLS+"/system?pkipath="+d.PKI, d.Daemon, testDirs(t))
	ctx, id := t.Context(), webOne.Lab
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	foreign := func(name string, n lab.Network, bridge string) {
		t.Helper()
		file := filepath.Join(t.TempDir(), "network.xml")
		text := fmt.Sprintf("<network><name>%s</name><bridge name='%s'/><ip address='%s' prefix='%d'/></network>", name, bridge, n.Gateway, n.Subnet.Bits())
		must(os.WriteFile(file, []byte(text), 0o600))
		d.Virsh("net-define", file)
		d.Virsh("net-start", name)
	}
	networks := func() []string {
		all := strings.Fields(d.Virsh("net-list", "--all", "--name"))
		slices.Sort(all)
		return all
	}
	nat := fmt.Sprintf("lab-%s-nat", id)

	// Subnets that the host uses for something else are left to that: a part of one, and one
	// that is not active.
	part := lab.DirectNetworkOf(id, lab.NetworkNAT, 0)
	part.Subnet = netip.PrefixFrom(part.Subnet.Addr(), 24)
	foreign("other", part, "other0")
	foreign("idle", lab.DirectNetworkOf(id, lab.NetworkNAT, 1), "other2")
	d.Virsh("net-destroy", "idle")
	n, err := r.Network(ctx, id, lab.NetworkNAT)
	must(err)
	if want := lab.DirectNetworkOf(id, lab.NetworkNAT, 2); n != want {
		t.Errorf("the network is %v, want %v", n, want)
	}
	if again, err := r.Network(ctx, id, lab.NetworkNAT); err != nil || again != n {
		t.Errorf("the network is %v, then %v, %v", n, again, err)
	}
	if got := networks(); !slices.Equal(got, []string{"idle", nat, "other"}) {
		t.Errorf("the networks are %q", got)
	}

	spec := providers.Spec{
		Generation: webOne, Image: providertest.BootImage(t, false), CPUs: 1, Memory: 16 * lab.MiB, Agent: true,
		Network: lab.NetworkNAT, Direct: n.Direct(lab.NetworkOf(id).Host(10), 1),
	}
	must(r.Create(ctx, spec))
	must(r.Create(ctx, spec)) // it is there
	lease := fmt.Sprintf("<host mac='%s' ip='%s'/>", lab.MACOf(spec.Direct), spec.Direct)
	if got := d.Virsh("net-dumpxml", nat); strings.Count(got, lease) != 1 {
		t.Errorf("the network has no %s:\n%s", lease, got)
	}
	// Somebody ends it, or the host was restarted: a start brings it back.
	d.Virsh("net-destroy", nat)
	must(r.Start(ctx, webOne))
	if got := d.Virsh("domiflist", domainName(webOne)); !strings.Contains(got, nat) || !strings.Contains(got, lab.MACOf(spec.Direct)) {
		t.Errorf("the machine's interfaces:\n%s", got)
	}
	// Somebody removes it.
	must(r.Stop(ctx, webOne, 0))
	d.Virsh("net-destroy", nat)
	d.Virsh("net-undefine", nat)
	must(r.Start(ctx, webOne))
	if got := d.Virsh("net-dumpxml", nat); strings.Count(got, lease) != 1 {
		t.Errorf("the network has no %s:\n%s", lease, got)
	}
	// What is leased stays for the next generation.
	must(r.Destroy(ctx, webOne))
	if got := d.Virsh("net-dumpxml", nat); strings.Count(got, lease) != 1 {
		t.Errorf("the network has no %s:\n%s", lease, got)
	}
	// An address that is not leased from the beginning is from the network's next start on: what
	// machines say to one another is not interrupted for it.
	beside := spec
	beside.Number, beside.Direct = 2, n.Direct(lab.NetworkOf(id).Host(10), leasedSlots+1)
	lease = fmt.Sprintf("<host mac='%s' ip='%s'/>", lab.MACOf(beside.Direct), beside.Direct)
	for range 2 {
		must(r.Create(ctx, beside))
		must(r.Start(ctx, beside.Generation))
		for which, want := range map[string]int{"": 0, "--inactive": 1} {
			if got := d.Virsh(strings.Fields("net-dumpxml " + nat + " " + which)...); strings.Count(got, lease) != want {
				t.Errorf("net-dumpxml %s has %s not %d times:\n%s", which, lease, want, got)
			}
		}
		must(r.Destroy(ctx, beside.Generation))
	}
	// One that somebody undefined while it was active outlives its end again.
	d.Virsh("net-undefine", nat)
	if again, err := r.Network(ctx, id, lab.NetworkNAT); err != nil || again != n {
		t.Errorf("the network is %v, then %v, %v", n, again, err)
	}
	d.Virsh("net-destroy", nat)
	d.Virsh("net-start", nat)
	if got := d.Virsh("net-dumpxml", nat); !strings.Contains(got, spec.Direct.String()) {
		t.Errorf("started again it has no %s:\n%s", spec.Direct, got)
	}

	// Somebody took its subnet while it was not active: nobody has an address in it.
	d.Virsh("net-destroy", nat)
	foreign("taker", n, "other3")
	moved, err := r.Network(ctx, id, lab.NetworkNAT)
	must(err)
	if want := lab.DirectNetworkOf(id, lab.NetworkNAT, 3); moved != want {
		t.Errorf("the network is %v, want %v", moved, want)
	}
	// With a machine in it it stays.
	spec.Direct = moved.Direct(lab.NetworkOf(id).Host(10), 1)
	must(r.Create(ctx, spec))
	d.Virsh("net-destroy", nat)
	foreign("second", moved, "other4")
	if _, err := r.Network(ctx, id, lab.NetworkNAT); err == nil || !strings.Contains(err.Error(), "destroy the lab to have it another subnet") {
		t.Errorf("its subnet was taken: %v", err)
	}
	must(r.Destroy(ctx, webOne))
	for _, name := range []string{"taker", "second"} {
		d.Virsh("net-destroy", name)
		d.Virsh("net-undefine", name)
	}

	// A network that only has the name is nobody's to use or to remove.
	isolated := fmt.Sprintf("lab-%s-isolated", id)
	foreign(isolated, lab.DirectNetworkOf(id, lab.NetworkIsolated, 7), "other1")
	if _, err := r.Network(ctx, id, lab.NetworkIsolated); err == nil || !strings.Contains(err.Error(), isolated) || !strings.Contains(err.Error(), "is left alone; rename it, or the lab") {
		t.Errorf("a foreign network of that name: %v", err)
	}
	// Both its own daemon and one of a session, which knows where images are, find what is ours.
	session := New(Config{Dirs: r.p.cfg.Dirs, URI: "qemu:///session", Getenv: d.Getenv}).(providers.Networker)
	networked := func(want ...providers.Networked) {
		t.Helper()
		for _, p := range []providers.Networker{r, session} {
			if got, err := p.Networked(ctx); err != nil || !slices.Equal(got, want) {
				t.Errorf("%T: these labs have networks: %v, %v; want %v", p, got, err, want)
			}
		}
	}
	networked(providers.Networked{Lab: id, URI: r.URI()})
	for range 2 {
		must(r.RemoveNetworks(ctx, id))
	}
	networked()
	if got := networks(); !slices.Equal(got, []string{"idle", isolated, "other"}) {
		t.Errorf("the networks are %q", got)
	}
	// Without its network there is nothing for a machine to give up.
	n, err = r.Network(ctx, id, lab.NetworkNAT)
	must(err)
	spec.Direct = n.Direct(lab.NetworkOf(id).Host(10), 1)
	must(r.Create(ctx, spec))
	must(r.RemoveNetworks(ctx, id))
	must(r.Destroy(ctx, webOne))
}

// TestNetworkInterrupted leaves no network that is gone with its end, whenever that was: what
// is made already is there for the next.
func TestNetworkInterrupted(t *testing.T) {
	t.Parallel()
	d := daemontest.StartFar(t)
	r := testRemote(t, "qemu+tls://"+d.TLS+"/system?pkipath="+d.PKI, d.Daemon, testDirs(t))
	if err := r.Networks(t.Context()); err != nil {
		t.Fatal(err)
	}
	for wait := 5 * time.Millisecond; ; wait = wait * 3 / 2 {
		ctx, cancel := context.WithTimeout(t.Context(), wait)
		_, err := r.Network(ctx, webOne.Lab, lab.NetworkIsolated)
		cancel()
		got := d.Virsh("net-list", "--all")
		if fields := strings.Fields(got); got != "" && (len(fields) != 4 || fields[3] != "yes") || got == "" && err == nil {
			t.Errorf("after %s (%v): %s", wait, err, got)
		}
		if err == nil {
			return
		}
	}
}

// TestNoNetworkDriver is about a daemon that can make no networks, which some distributions
// have by default: it has none to remove, and says what it lacks.
func TestNoNetworkDriver(t *testing.T) {
	dirs, err := filepath.Glob("/usr/lib*/libvirt/connection-driver")
	if more, e := filepath.Glob("/usr/lib/*/libvirt/connection-driver"); e == nil {
		dirs = append(dirs, more...)
	}
	if err != nil || len(dirs) == 0 {
		t.Fatal("libvirt's drivers are not where they are looked for", err)
	}
	drivers := t.TempDir()
	if err := os.Chmod(drivers, 0o755); err != nil {
		t.Fatal(err)
	}
	all, err := filepath.Glob(filepath.Join(dirs[0], "*.so"))
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range all {
		if name := filepath.Base(path); name != "libvirt_driver_network.so" {
			if err := os.Symlink(path, filepath.Join(drivers, name)); err != nil {
				t.Fatal(err)
			}
		}
	}
	t.Setenv("LIBVIRT_DRIVER_DIR", drivers)
	b := benchOf(t, daemontest.StartSystem(t))
	if err := b.p.RemoveNetworks(b.ctx(), webOne.Lab); err != nil {
		t.Errorf("RemoveNetworks: %v", err)
	}
	if n, err := b.p.Network(b.ctx(), webOne.Lab, lab.NetworkNAT); !errors.Is(err, providers.ErrNoNetworks) {
		t.Errorf("it made %v, %v", n, err)
	}
	found, err := b.p.Check(b.ctx())
	b.must(err)
	if text := fmt.Sprint(found); !strings.Contains(text, "{network warning libvirt can make no networks") {
		t.Errorf("the findings: %s", text)
	}
	b.up()
	b.destroyed()
}
