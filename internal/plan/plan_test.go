// SPDX-License-Identifier: Apache-2.0

package plan

import (
	"fmt"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/labfile/lab/internal/lab"
)

func machine(name lab.Name, deps ...lab.Name) lab.Machine {
	return lab.Machine{Name: name, Role: string(name), Box: "base", CPUs: 1, Memory: 256 * lab.MiB, DependsOn: deps}
}

func want(ms ...lab.Machine) *lab.Lab { return &lab.Lab{Name: "shop", Machines: ms} }

// lived is a machine that the ledger knows as ready.
func lived(m lab.Machine, generation int) Recorded {
	return Recorded{Spec: m, Generation: generation, Image: "sha256:aaa", Phase: PhaseLived}
}

func TestStep(t *testing.T) {
	db := machine("db")
	with := func(change func(*lab.Machine)) lab.Machine {
		m := db
		change(&m)
		return m
	}
	rec := func(change func(*Recorded)) *Recorded {
		r := lived(db, 3)
		change(&r)
		return &r
	}
	as := rec(func(*Recorded) {})
	runs := []Observed{{Number: 3, State: Running}}
	for _, tt := range []struct {
		name     string
		want     lab.Machine
		recorded *Recorded
		observed []Observed
		rebuild  bool
		step     Step
	}{
		{"new", db, nil, nil, false, Step{Action: Create, Reasons: []string{"first creation"}, Next: 1}},
		{"as wanted", db, as, runs, false, Step{Action: Keep, Generation: 3}},
		{
			"memory", with(func(m *lab.Machine) { m.Memory = lab.GiB }), as, runs, false,
			Step{Action: Replace, Reasons: []string{"memory changed: 256MiB -> 1GiB"}, Generation: 3, Next: 4, Leftovers: []int{3}},
		},
		{
			"several fields", with(func(m *lab.Machine) { m.CPUs, m.Disk, m.UserData = 2, lab.GiB, "x" }), as, runs, false,
			Step{
				Action: Replace, Generation: 3, Next: 4, Leftovers: []int{3},
				Reasons: []string{"cpus changed: 1 -> 2", "disk changed: the box's own -> 1GiB", "user_data changed"},
			},
		},
		{
			"network", with(func(m *lab.Machine) { m.Network = lab.NetworkNAT }), as, runs, false,
			Step{Action: Replace, Reasons: []string{"network changed: switch -> nat"}, Generation: 3, Next: 4, Leftovers: []int{3}},
		},
		{
			"box moved", db, rec(func(r *Recorded) { r.Image = "sha256:bbb" }), runs, false,
			Step{
				Action: Replace, Generation: 3, Next: 4, Leftovers: []int{3},
				Reasons: []string{"box base is pinned to another digest: sha256:bbb -> sha256:aaa"},
			},
		},
		{
			"port in place", with(func(m *lab.Machine) { m.Ports = []lab.Forward{{HostPort: 8080, GuestPort: 80}} }), as, runs, false,
			Step{Action: Keep, Changes: []string{"port 8080:80 added"}, Generation: 3},
		},
		{
			"checks in place", with(func(m *lab.Machine) {
				m.Tests = []lab.Test{{Kind: lab.TestPort, Subject: "tcp:80", Want: []lab.Want{{Attribute: "listening", Match: lab.Matcher{Op: lab.MatchIs, Value: "true"}}}}}
			}), as, runs, false,
			Step{Action: Keep, Changes: []string{"checks changed"}, Generation: 3},
		},
		{"stopped on purpose", db, rec(func(r *Recorded) { r.Stopped = true }), []Observed{{Number: 3, State: Stopped}}, false, Step{Action: Start, Reasons: []string{"it is stopped"}, Generation: 3}},
		{
			"killed", db, rec(func(r *Recorded) { r.Trouble = "its process was killed from outside" }),
			[]Observed{{Number: 3, State: Stopped}},
			false,
			Step{Action: Start, Reasons: []string{"it no longer runs: its process was killed from outside"}, Generation: 3},
		},
		{
			"interrupted", db, rec(func(r *Recorded) { r.Phase = PhaseUnfinished }), runs, false,
			Step{Action: Replace, Reasons: []string{"generation 3 was interrupted before it was ready"}, Generation: 3, Next: 4, Leftovers: []int{3}},
		},
		{
			"failed", db, rec(func(r *Recorded) { r.Phase, r.Trouble = PhaseFailed, "port 80: refused" }), runs, false,
			Step{Action: Replace, Reasons: []string{"generation 3 never became ready: port 80: refused"}, Generation: 3, Next: 4, Leftovers: []int{3}},
		},
		{
			"half made", db, as,
			[]Observed{{Number: 3, State: Broken}},
			false,
			Step{Action: Replace, Reasons: []string{"generation 3 is half made"}, Generation: 3, Next: 4, Leftovers: []int{3}},
		},
		{"vanished", db, as, nil, false, Step{Action: Create, Reasons: []string{"generation 3 has vanished"}, Next: 4}},
		{"destroyed before", db, rec(func(r *Recorded) { r.Phase = PhaseGone }), nil, false, Step{Action: Create, Reasons: []string{"it was destroyed"}, Next: 4}},
		{
			"half destroyed", db, rec(func(r *Recorded) { r.Phase = PhaseDestroying }),
			[]Observed{{Number: 3, State: Stopped}},
			false,
			Step{Action: Replace, Reasons: []string{"generation 3 is half destroyed"}, Generation: 3, Next: 4, Leftovers: []int{3}},
		},
		{
			"ledger lost", db, nil,
			[]Observed{{Number: 7, State: Running}},
			false,
			Step{Action: Replace, Reasons: []string{"it was found without a record"}, Generation: 7, Next: 8, Leftovers: []int{7}},
		},
		{
			"unreachable", db, as,
			[]Observed{{Number: 3, State: Running, Unreachable: "its sockets are gone"}},
			false,
			Step{Action: Start, Reasons: []string{"it cannot be reached: its sockets are gone; it is shut down and started again"}, Generation: 3},
		},
		{"an old generation is left over", db, as, []Observed{{Number: 2, State: Running}, {Number: 3, State: Running}}, false, Step{Action: Keep, Generation: 3, Leftovers: []int{2}}},
		{
			"rebuild", db, as, runs, true,
			Step{Action: Replace, Reasons: []string{"you asked to replace it"}, Generation: 3, Next: 4, Leftovers: []int{3}},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			in := Input{
				Lab: "shop-1", Want: want(tt.want), Images: map[lab.Name]Image{"db": {Digest: "sha256:aaa", Box: "sha256:aaa"}},
				Recorded: map[lab.Name]Recorded{}, Observed: map[lab.Name][]Observed{"db": tt.observed},
			}
			if tt.recorded != nil {
				in.Recorded["db"] = *tt.recorded
			}
			if tt.rebuild {
				in.Rebuild = []lab.Name{"db"}
			}
			tt.step.Machine = "db"
			p := Make(in)
			if diff := cmp.Diff(Plan{Lab: "shop-1", Steps: []Step{tt.step}}, p); diff != "" {
				t.Error(diff)
			}
			if keep := tt.step.Action == Keep && tt.step.Changes == nil && tt.step.Leftovers == nil; p.Changes() == keep {
				t.Errorf("Changes() = %v", p.Changes())
			}
		})
	}
}

func TestOrderAndSelection(t *testing.T) {
	l := want(machine("web", "db"), machine("db", "disk"), machine("disk"), machine("other"))
	recorded := map[lab.Name]Recorded{"old": lived(machine("old"), 1), "past": {Generation: 2, Phase: PhaseGone}}
	observed := map[lab.Name][]Observed{"old": {{Number: 1, State: Running}}, "stray": {{Number: 4, State: Running}}}
	for _, tt := range []struct {
		only []lab.Name
		want []string
	}{
		{nil, []string{"create disk", "create db", "create web", "create other", "destroy old", "destroy stray"}},
		{[]lab.Name{"db"}, []string{"create disk", "create db"}},
	} {
		p := Make(Input{Want: l, Only: tt.only, Recorded: recorded, Observed: observed})
		var got []string
		for _, s := range p.Steps {
			got = append(got, fmt.Sprintf("%s %s", s.Action, s.Machine))
		}
		if diff := cmp.Diff(tt.want, got); diff != "" {
			t.Errorf("only %v: %s", tt.only, diff)
		}
	}
}
