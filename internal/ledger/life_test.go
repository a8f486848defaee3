// SPDX-License-Identifier: Apache-2.0

package ledger

import (
	"encoding/json"
	"path/filepath"
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
		Boot: []lab.BootStep{
			{Provision: lab.Provision{Kind: lab.ProvisionShell, Script: "./x", Args: []string{"a", ""}}, Timeout: time.Hour, Step: "sha256:1", File: "sha256:2"},
			{Provision: lab.Provision{Kind: lab.ProvisionShell, Shell: "true"}, Timeout: time.Minute, Step: "sha256:3"},
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
	moved.Boot = append([]lab.BootStep(nil), m.Boot...)
	moved.Boot[0].Place = "Labfile:9:9"
	if SpecOf(m).Digest() != SpecOf(moved).Digest() {
		t.Error("a spec is another one because a step has moved to another line")
	}
	moved.Boot[0].File = "sha256:4"
	if SpecOf(m).Digest() == SpecOf(moved).Digest() {
		t.Error("a spec is the same though the script of a boot step is another one")
	}
}

// What a ledger says of boot steps holds until the generation is ready, and a failure
// replaces what was said of the one before.
func TestBooted(t *testing.T) {
	book := Open(filepath.Join(t.TempDir(), "ledger.jsonl"))
	state := func(ty Type, n int, data any) Machine {
		t.Helper()
		if _, err := book.Append(Record{Type: ty, Machine: "web", Generation: n}, data); err != nil {
			t.Fatal(err)
		}
		records, err := book.Read()
		if err != nil {
			t.Fatal(err)
		}
		s, err := Fold(records)
		if err != nil {
			t.Fatal(err)
		}
		return s.Machines["web"]
	}
	with := Create{Spec: Spec{Role: "web", Life: Life{Boot: []BootStep{{Step: "sha256:1"}}}}}
	done := Booted{Digest: "sha256:2", Steps: 1, Took: 3 * time.Second}
	if m := state(MachineCreate, 1, Create{Spec: Spec{Role: "web"}}); m.Unbooted() {
		t.Error("one without steps has not run them")
	}
	if m := state(MachineCreate, 2, with); !m.Unbooted() {
		t.Error("steps have run that were never recorded")
	}
	m := state(MachineFailed, 2, Failed{Stage: "boot-step", Error: "exit code 3", Boot: &BootFailed{Step: 1, Of: 1, Code: 3}})
	if !m.Unbooted() || m.Failed.Boot == nil || m.Failed.Boot.Code != 3 {
		t.Errorf("after a failure: %+v", m)
	}
	for _, then := range []Type{MachineStop, MachineStopped, MachineStart, MachineExited} {
		if m := state(then, 2, someData(then)); !m.Unbooted() {
			t.Errorf("%s makes it one that has run its steps", then)
		}
	}
	if m := state(MachineFailed, 2, Failed{Stage: "check", Error: "no answer"}); m.Failed.Boot != nil {
		t.Errorf("the second failure is %+v", m.Failed)
	}
	if m := state(MachineBooted, 2, done); m.Unbooted() || m.Booted != done || m.Phase != PhaseFailed {
		t.Errorf("after the steps: %+v", m)
	}
	if m := state(MachineCreate, 3, with); !m.Unbooted() {
		t.Error("the next generation has run the steps of the one before")
	}
	if m := state(MachineReady, 3, Ready{}); m.Unbooted() { // as ledgers from before there were steps have it
		t.Error("one that was ready has not run its steps")
	}
	records, err := book.Read()
	if err != nil {
		t.Fatal(err)
	}
	all, err := Generations(records, "web")
	if err != nil || len(all) != 3 || all[0].Boot != nil || all[1].Boot == nil || *all[1].Boot != done || all[2].Boot != nil {
		t.Errorf("the generations are %+v, %v", all, err)
	}
	var summary string
	for _, r := range records {
		if r.Type == MachineBooted {
			summary = r.Summary()
		}
	}
	if summary != "web@2: ran 1 boot step in 3s" {
		t.Errorf("the history says %q", summary)
	}
}

// someData is data for a record whose data does not matter.
func someData(t Type) any {
	if t == MachineExited {
		return Exited{Reason: "guest"}
	}
	return nil
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
