// SPDX-License-Identifier: Apache-2.0

package libvirt

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

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
		if err := p.Networks(); !errors.Is(err, providers.ErrIncapable) || !strings.Contains(err.Error(), uri) {
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

	// A subnet that the host uses for something else is left to that.
	foreign("other", lab.DirectNetworkOf(id, lab.NetworkNAT, 0), "other0")
	n, err := r.Network(ctx, id, lab.NetworkNAT)
	must(err)
	if want := lab.DirectNetworkOf(id, lab.NetworkNAT, 1); n != want {
		t.Errorf("the network is %v, want %v", n, want)
	}
	if again, err := r.Network(ctx, id, lab.NetworkNAT); err != nil || again != n {
		t.Errorf("the network is %v, then %v, %v", n, again, err)
	}
	if got := networks(); !slices.Equal(got, []string{nat, "other"}) {
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
	must(r.Destroy(ctx, webOne))
	if got := d.Virsh("net-dumpxml", nat); strings.Contains(got, "<host") {
		t.Errorf("the lease is left:\n%s", got)
	}

	// A network that only has the name is nobody's to use or to remove.
	isolated := fmt.Sprintf("lab-%s-isolated", id)
	foreign(isolated, lab.DirectNetworkOf(id, lab.NetworkIsolated, 7), "other1")
	if _, err := r.Network(ctx, id, lab.NetworkIsolated); err == nil || !strings.Contains(err.Error(), isolated) || !strings.Contains(err.Error(), "is left alone; rename it, or the lab") {
		t.Errorf("a foreign network of that name: %v", err)
	}
	for range 2 {
		must(r.RemoveNetworks(ctx, id))
	}
	if got := networks(); !slices.Equal(got, []string{isolated, "other"}) {
		t.Errorf("the networks are %q", got)
	}
	// Without its network there is nothing for a machine to give up.
	_, err = r.Network(ctx, id, lab.NetworkNAT)
	must(err)
	must(r.Create(ctx, spec))
	must(r.RemoveNetworks(ctx, id))
	must(r.Destroy(ctx, webOne))
}
