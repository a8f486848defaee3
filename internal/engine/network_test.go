// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/ledger"
	"github.com/labfile/lab/internal/plan"
	"github.com/labfile/lab/providers"
	"github.com/labfile/lab/providers/memory"
)

// networker is a provider with networks.
type networker struct {
	*memory.Provider
	not  error
	told []string
	has  []providers.Networked
}

func (n *networker) Networked(context.Context) ([]providers.Networked, error) { return n.has, n.not }

func (n *networker) Networks(context.Context) error { return n.not }

func (n *networker) Network(_ context.Context, id lab.ID, kind lab.NetworkKind) (lab.Network, error) {
	n.told = append(n.told, "make "+string(kind))
	return lab.DirectNetworkOf(id, kind, 3), n.not
}

func (n *networker) RemoveNetworks(context.Context, lab.ID) error {
	n.told = append(n.told, "remove")
	return nil
}

// Addressed: it is its own daemon.
func (n *networker) URI() string                           { return "here" }
func (n *networker) At(string) (providers.Provider, error) { return n, nil }
func (n *networker) Reach(context.Context) error           { return nil }
func (n *networker) Daemons(lab.ID) ([]string, error)      { return nil, nil }

// TestNetworkRefused has a plan say what a network lacks.
func TestNetworkRefused(t *testing.T) {
	b := newBench(t)
	l := b.open()
	w := b.want(machine("db"))
	w.Machines[0].Network = lab.NetworkNAT
	refused := func(want string, incapable bool) {
		t.Helper()
		_, err := l.Plan(b.ctx, w, UpOptions{})
		if err == nil || !strings.Contains(err.Error(), want) || errors.Is(err, providers.ErrIncapable) != incapable {
			t.Errorf("got %v, want %s", err, want)
		}
	}
	refused("network: nat: host not capable: provider memory has the lab's own switch only", true)
	n := &networker{Provider: b.provider, not: fmt.Errorf("%w: no bridges here", providers.ErrNoNetworks)}
	b.Providers["memory"] = n
	refused("network: nat: host not capable: no bridges here", true)
	n.not = nil
	refused(`machine "db": network: nat needs a box with lab-agent`, false)
	n.not = errors.New("it hangs")
	refused("it hangs", false)
	w.Machines[0].Network = lab.NetworkAuto
	refused("it hangs", false)
	if len(n.told) > 0 {
		t.Errorf("a plan did %q", n.told)
	}
}

// TestNetworkAuto is the best that there is for each machine.
func TestNetworkAuto(t *testing.T) {
	b := newBench(t)
	l := b.open()
	w := b.want(machine("db"), machine("old"), machine("web"))
	for i, kind := range []lab.NetworkKind{lab.NetworkAuto, lab.NetworkAuto, lab.NetworkSwitch} {
		w.Machines[i].Network = kind
	}
	images := map[lab.Name]Image{"db": {}, "old": {}, "web": {}}
	for _, name := range []lab.Name{"db", "web"} {
		img := images[name]
		img.Agent = true
		images[name] = img
	}
	able := &networker{Provider: b.provider}
	unable := &networker{Provider: b.provider, not: providers.ErrNoNetworks}
	for _, c := range []struct {
		provider providers.Provider
		db       lab.NetworkKind
	}{{b.provider, lab.NetworkSwitch}, {unable, lab.NetworkSwitch}, {able, lab.NetworkIsolated}} {
		got, err := (&session{Lab: l, provider: c.provider}).networked(b.ctx, w, images)
		if err != nil {
			t.Fatal(err)
		}
		kinds := []lab.NetworkKind{got.Machines[0].Network, got.Machines[1].Network, got.Machines[2].Network}
		if want := []lab.NetworkKind{c.db, lab.NetworkSwitch, lab.NetworkSwitch}; !slices.Equal(kinds, want) {
			t.Errorf("%T: the machines have %q, want %q", c.provider, kinds, want)
		}
	}
	if w.Machines[0].Network != lab.NetworkAuto {
		t.Error("what the Labfile says was changed")
	}

	// What a machine has stays, whatever its host has become able to do, but nat.
	for present, kind := range map[lab.NetworkKind]lab.NetworkKind{
		lab.NetworkSwitch: lab.NetworkSwitch, lab.NetworkIsolated: lab.NetworkIsolated, lab.NetworkNAT: lab.NetworkIsolated,
	} {
		for _, n := range []*networker{able, unable} {
			s := &session{Lab: l, provider: n}
			s.state.Machines = map[lab.Name]ledger.Machine{"db": {Generation: 1, Create: ledger.Create{Spec: ledger.Spec{Network: present}}}}
			got, err := s.networked(b.ctx, w, images)
			if err != nil {
				t.Fatal(err)
			}
			if n == unable && present == lab.NetworkNAT {
				kind = lab.NetworkSwitch
			}
			if got.Machines[0].Network != kind {
				t.Errorf("%q became %q, want %q", present, got.Machines[0].Network, kind)
			}
		}
	}
	// A network that cannot be made is done without, for those that nobody said it of.
	s := &session{Lab: l, provider: able}
	some := *w
	some.Machines = slices.Clone(w.Machines)
	some.Machines[2].Network = lab.NetworkIsolated
	got, err := s.networked(b.ctx, &some, images)
	if err != nil {
		t.Fatal(err)
	}
	s.provider = &networker{Provider: b.provider, not: errors.New("dnsmasq is missing")}
	var told []string
	s.opt.Events = func(e Event) { told = append(told, fmt.Sprintf("%s: %s", e.Machine, e.Text)) }
	p := plan.Plan{Steps: []plan.Step{{Machine: "db", Action: plan.Create}}}
	if err := s.connect(b.ctx, got, p); err != nil || got.Machines[0].Network != lab.NetworkSwitch || !slices.Equal(told, []string{"db: at the lab's switch only: dnsmasq is missing"}) {
		t.Errorf("the machine has %q: %v, %q", got.Machines[0].Network, err, told)
	}
	p.Steps = append(p.Steps, plan.Step{Machine: "web", Action: plan.Create})
	if err := s.connect(b.ctx, got, p); err == nil {
		t.Error("a network that was asked for was done without")
	}

	// A network is made before there are machines, once, and a host that cannot is an error with a way out.
	w.Machines[0].Network, w.Machines[1].Network = lab.NetworkNAT, lab.NetworkNAT
	p = plan.Plan{Steps: []plan.Step{
		{Machine: "db", Action: plan.Create}, {Machine: "old", Action: plan.Replace}, {Machine: "web", Action: plan.Create}, {Machine: "gone", Action: plan.Destroy},
	}}
	if err := (&session{Lab: l, provider: able}).connect(b.ctx, w, p); err != nil || !slices.Equal(able.told, []string{"make nat"}) {
		t.Errorf("%q, %v", able.told, err)
	}
	unable.not = errors.New("dnsmasq is missing")
	var hint interface{ Hint() string }
	if err := (&session{Lab: l, provider: unable}).connect(b.ctx, w, p); !errors.Is(err, unable.not) || !errors.As(err, &hint) || !strings.Contains(hint.Hint(), "network: switch") {
		t.Errorf("got %v", err)
	}
	p.Steps = []plan.Step{{Machine: "db", Action: plan.Start}, {Machine: "web", Action: plan.Replace}}
	if err := (&session{Lab: l, provider: unable}).connect(b.ctx, w, p); err != nil {
		t.Errorf("for nothing that is born: %v", err)
	}
}

// A generation has the address of the one before it, unless both run at once.
func TestSlots(t *testing.T) {
	in := func(slot int, retired bool) ledger.Machine {
		m := ledger.Machine{Retired: retired}
		if slot != 0 {
			n := lab.DirectNetworkOf("shop", lab.NetworkNAT, 0)
			m.Create.Direct = netip.PrefixFrom(n.Direct(netip.MustParseAddr("10.64.0.10"), slot), n.Subnet.Bits())
		}
		return m
	}
	with := func(m ledger.Machine, standby int, past ...ledger.Machine) ledger.Machine {
		if standby != 0 {
			s := in(standby, false)
			m.Standby = &s
		}
		m.Past = past
		return m
	}
	for name, c := range map[string]struct {
		m                ledger.Machine
		instead, besides int
	}{
		"the first":           {ledger.Machine{}, 1, 1},
		"at the switch only":  {in(0, false), 1, 1},
		"the second":          {in(1, false), 1, 2},
		"after a takeover":    {in(2, false), 2, 1},
		"a kept one":          {with(in(1, false), 0, in(2, true)), 1, 2},
		"a draining one":      {with(in(2, false), 0, in(1, false)), 2, 3},
		"a standby left over": {with(in(1, false), 2), 1, 3},
	} {
		if got := slot(c.m, false); got != c.instead {
			t.Errorf("%s: instead of it in slot %d, want %d", name, got, c.instead)
		}
		if got := slot(c.m, true); got != c.besides {
			t.Errorf("%s: beside it in slot %d, want %d", name, got, c.besides)
		}
	}
}

// TestNetworkGoesWithTheLab gives generations addresses, and removes the network last.
func TestNetworkGoesWithTheLab(t *testing.T) {
	b := newBench(t)
	n := &networker{Provider: b.provider}
	b.Providers["memory"] = n
	l := b.open()
	b.up(l, b.want(machine("db")))
	s := &session{Lab: l, provider: n}
	at := lab.NetworkOf(l.ID()).Host(10)
	var got []string
	for _, slot := range []int{1, 2} {
		direct, err := s.direct(b.ctx, lab.NetworkIsolated, at, slot)
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, direct.String())
	}
	subnet := lab.DirectNetworkOf(l.ID(), lab.NetworkIsolated, 3).Subnet.Addr().As4()
	want := []string{fmt.Sprintf("10.%d.1.10/16", subnet[1]), fmt.Sprintf("10.%d.2.10/16", subnet[1])}
	if !slices.Equal(got, want) {
		t.Errorf("the addresses are %q, want %q", got, want)
	}
	if direct, err := s.direct(b.ctx, lab.NetworkSwitch, at, 1); err != nil || direct.IsValid() {
		t.Errorf("at the switch alone: %s, %v", direct, err)
	}
	if err := l.Destroy(b.ctx, Options{}); err != nil {
		t.Fatal(err)
	}
	if want := []string{"make isolated", "make isolated", "remove"}; !slices.Equal(n.told, want) {
		t.Errorf("it was asked to %q, want %q", n.told, want)
	}
}

// TestGCNetworks removes the networks of labs that are no more.
func TestGCNetworks(t *testing.T) {
	b := newBench(t)
	n := &networker{Provider: b.provider}
	b.Providers["memory"] = n
	l := b.open()
	b.up(l, b.want(machine("db")))
	lost := lab.NewID("lost", "/lost/Labfile")
	busy := lab.NewID("busy", "/busy/Labfile")
	held, err := b.Lab(busy).acquire("lab up")
	if err != nil {
		t.Fatal(err)
	}
	for _, id := range []lab.ID{l.ID(), lost, busy} {
		n.has = append(n.has, providers.Networked{Lab: id, URI: "here"})
	}
	want := []Garbage{{Kind: "network", Name: string(lost) + " at here", Why: "its lab is gone"}}
	for _, dry := range []bool{true, false} {
		got, err := b.GC(b.ctx, dry)
		got = slices.DeleteFunc(got, func(g Garbage) bool { return g.Kind != "network" })
		if err != nil || !slices.Equal(got, want) {
			t.Errorf("dry run %t: %+v, %v", dry, got, err)
		}
	}
	if !slices.Equal(n.told, []string{"remove"}) {
		t.Errorf("it was asked to %q", n.told)
	}
	held.release()

	// Machines of a lab whose folder is gone are for "lab destroy".
	n.told, n.has = nil, n.has[:1]
	if err := os.Rename(b.Dirs.Lab(l.ID()), b.Dirs.Lab(l.ID())+"-away"); err != nil {
		t.Fatal(err)
	}
	if got, err := b.GC(b.ctx, true); err != nil || slices.ContainsFunc(got, func(g Garbage) bool { return g.Kind == "network" }) {
		t.Errorf("beside machines: %+v, %v", got, err)
	}
	if err := os.Rename(b.Dirs.Lab(l.ID())+"-away", b.Dirs.Lab(l.ID())); err != nil {
		t.Fatal(err)
	}
	n.not = errors.New("it is off")
	if _, err := b.GC(b.ctx, true); !errors.Is(err, n.not) {
		t.Errorf("got %v", err)
	}
}
