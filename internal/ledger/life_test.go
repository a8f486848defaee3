// SPDX-License-Identifier: Apache-2.0

package ledger

import (
	"encoding/json"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/labfile/lab/internal/lab"
)

func TestSpecKeepsLife(t *testing.T) {
	empty := ""
	m := lab.Machine{
		Name: "db-2", Role: "db", Box: "base", CPUs: 1, Memory: lab.GiB,
		Provision: []lab.Provision{
			{Kind: lab.ProvisionShell, Script: "./x", Args: []string{"a", ""}},
			{Kind: lab.ProvisionFile, Content: &empty, To: "/etc/x", Owner: "a:b", Mode: "0600"},
		},
		Volumes: []lab.Volume{{Name: "data-2", Size: lab.GiB, FS: "ext4", Mount: "/srv", Owner: "a", Mode: "0700", ReadOnly: true}},
		Mounts:  []lab.Mount{{From: "/a", To: "/b", Writable: true, Owner: "a:b"}},
		Replace: lab.Replace{Strategy: lab.Rolling, MaxUnavailable: 2, OnFailure: lab.DiscardFailed},
		OnShell: lab.ShellForbid,
		MaxAge:  lab.Expiry{After: time.Hour, Then: lab.ExpiryDestroy},
		Idle:    lab.Expiry{After: time.Minute, Then: lab.ExpiryStop},
	}
	if diff := cmp.Diff(m, again(t, m)); diff != "" {
		t.Errorf("the ledger changes a machine (-was +is):\n%s", diff)
	}
	moved := m
	moved.Provision = append([]lab.Provision(nil), m.Provision...)
	moved.Provision[0].Place = "Labfile:7:9"
	if SpecOf(m).Digest() != SpecOf(moved).Digest() {
		t.Error("a spec is another one because a step has moved to another line")
	}
}

// A ledger from before there were policies has none of their keys, and a machine
// that says nothing of them reads the same.
func TestSpecWithoutLifeIsDefault(t *testing.T) {
	var s Spec
	old := `{"role":"web","box":"base","cpus":1,"memory":1048576}`
	if err := json.Unmarshal([]byte(old), &s); err != nil {
		t.Fatal(err)
	}
	want := lab.Machine{
		Name: "web", Role: "web", Box: "base", CPUs: 1, Memory: lab.MiB,
		Replace: lab.DefaultReplace, OnShell: lab.ShellAllow,
	}
	got := s.Machine("web")
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("an old spec reads as (-want +got):\n%s", diff)
	}
	data, err := json.Marshal(SpecOf(got))
	if err != nil {
		t.Fatal(err)
	}
	if string(data) != old {
		t.Errorf("it is written as %s, want %s", data, old)
	}
}

// again returns m as it comes back from a ledger.
func again(t *testing.T, m lab.Machine) lab.Machine {
	t.Helper()
	data, err := json.Marshal(SpecOf(m))
	if err != nil {
		t.Fatal(err)
	}
	var s Spec
	if err := json.Unmarshal(data, &s); err != nil {
		t.Fatal(err)
	}
	return s.Machine(m.Name)
}
