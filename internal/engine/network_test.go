// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/providers"
	"github.com/labfile/lab/providers/memory"
)

// networker is a provider with networks.
type networker struct {
	*memory.Provider
	not  error
	told []string
}

func (n *networker) Networks() error { return n.not }

func (n *networker) Network(_ context.Context, id lab.ID, kind lab.NetworkKind) (lab.Network, error) {
	n.told = append(n.told, "make "+string(kind))
	return lab.DirectNetworkOf(id, kind, 3), nil
}

func (n *networker) RemoveNetworks(context.Context, lab.ID) error {
	n.told = append(n.told, "remove")
	return nil
}

// TestNetworkRefused has a plan say what a network lacks.
func TestNetworkRefused(t *testing.T) {
	b := newBench(t)
	l := b.open()
	w := b.want(machine("db"))
	w.Network = lab.NetworkNAT
	w.Machines[0].Network = w.Network
	refused := func(want string, incapable bool) {
		t.Helper()
		_, err := l.Plan(b.ctx, w, UpOptions{})
		if err == nil || !strings.Contains(err.Error(), want) || errors.Is(err, providers.ErrIncapable) != incapable {
			t.Errorf("got %v, want %s", err, want)
		}
	}
	refused("network: nat: host not capable: provider memory has the lab's own switch only", true)
	n := &networker{Provider: b.provider, not: fmt.Errorf("%w: no bridges here", providers.ErrIncapable)}
	b.Providers["memory"] = n
	refused("network: nat: host not capable: no bridges here", true)
	n.not = nil
	refused(`machine "db": network: nat needs a box with lab-agent`, false)
	if len(n.told) > 0 {
		t.Errorf("a plan did %q", n.told)
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
	for _, number := range []int{1, 2, 251} {
		direct, err := s.direct(b.ctx, lab.Generation{Lab: l.ID(), Machine: "db", Number: number}, lab.NetworkIsolated, at)
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, direct.String())
	}
	subnet := lab.DirectNetworkOf(l.ID(), lab.NetworkIsolated, 3).Subnet.Addr().As4()
	want := []string{fmt.Sprintf("10.%d.1.10/16", subnet[1]), fmt.Sprintf("10.%d.2.10/16", subnet[1]), fmt.Sprintf("10.%d.1.10/16", subnet[1])}
	if !slices.Equal(got, want) {
		t.Errorf("the addresses are %q, want %q", got, want)
	}
	if direct, err := s.direct(b.ctx, lab.Generation{}, lab.NetworkSwitch, at); err != nil || direct.IsValid() {
		t.Errorf("at the switch alone: %s, %v", direct, err)
	}
	if err := l.Destroy(b.ctx, Options{}); err != nil {
		t.Fatal(err)
	}
	if want := []string{"make isolated", "make isolated", "make isolated", "remove"}; !slices.Equal(n.told, want) {
		t.Errorf("it was asked to %q, want %q", n.told, want)
	}
}
