// SPDX-License-Identifier: Apache-2.0

package ledger

import (
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/labfile/lab/internal/lab"
)

// TestGenerations tells three lives of one machine: one that was replaced, one that
// failed, and one that lives; and that of another machine beside.
func TestGenerations(t *testing.T) {
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	book := Open(filepath.Join(t.TempDir(), "ledger.jsonl"))
	book.now = func() time.Time { at = at.Add(time.Second); return at }
	start := at
	sec := func(n int) *time.Time { m := start.Add(time.Duration(n) * time.Second); return &m }
	add := func(ty Type, m lab.Name, n int, data any) {
		t.Helper()
		if _, err := book.Append(Record{Type: ty, Machine: m, Generation: n, Command: "lab up"}, data); err != nil {
			t.Fatal(err)
		}
	}
	spec := Spec{Role: "web", Box: "base", CPUs: 1}
	add(MachineCreate, "web", 1, Create{Spec: spec, Image: "sha256:a", Why: []string{"first creation"}}) // 1
	add(MachineReady, "web", 1, Ready{Took: time.Second})                                                // 2
	add(MachineCreate, "db", 1, Create{Spec: Spec{Role: "db"}, Image: "sha256:a"})                       // 3
	add(MachineStop, "web", 1, nil)                                                                      // 4
	add(MachineStopped, "web", 1, nil)                                                                   // 5
	add(MachineCreate, "web", 2, Create{Spec: spec, Image: "sha256:b", Why: []string{"box moved"}})      // 6
	add(MachineFailed, "web", 2, Failed{Stage: "check", Error: "no answer"})                             // 7
	add(MachineDestroy, "web", 2, Destroy{Why: []string{"it never became ready"}})                       // 8
	add(MachineDestroyed, "web", 2, nil)                                                                 // 9
	add(MachineCreate, "web", 3, Create{Spec: spec, Image: "sha256:a", Rollback: 1})                     // 10
	add(MachineReady, "web", 3, Ready{Took: 2 * time.Second, Ports: []Port{{Host: 8080, Guest: 80}}})    // 11
	add(MachineDestroy, "web", 1, Destroy{Why: []string{"replaced"}})                                    // 12
	add(MachineDestroyed, "web", 1, nil)                                                                 // 13
	records, err := book.Read()
	if err != nil {
		t.Fatal(err)
	}
	got, err := Generations(records, "web")
	if err != nil {
		t.Fatal(err)
	}
	none := []Port{}
	want := []Generation{
		{
			Machine: "web", Number: 1, Phase: PhaseGone, Why: []string{"first creation"}, Command: "lab up",
			Spec: spec, SpecDigest: spec.Digest(), Image: "sha256:a", Ports: none, Created: *sec(1), Born: sec(2),
			Took: time.Second, Ended: sec(13), End: []string{"replaced"},
		},
		{
			Machine: "web", Number: 2, Phase: PhaseGone, Why: []string{"box moved"}, Command: "lab up",
			Spec: spec, SpecDigest: spec.Digest(), Image: "sha256:b", Ports: none, Created: *sec(6),
			Trouble: "check: no answer", Ended: sec(9), End: []string{"it never became ready"},
		},
		{
			Machine: "web", Number: 3, Phase: PhaseReady, Why: []string{}, Command: "lab up",
			Spec: spec, SpecDigest: spec.Digest(), Image: "sha256:a", Rollback: 1, Ports: []Port{{Host: 8080, Guest: 80}},
			Created: *sec(10), Born: sec(11), Took: 2 * time.Second,
		},
	}
	if diff := cmp.Diff(want, got, cmpopts.IgnoreUnexported(Generation{})); diff != "" {
		t.Error(diff)
	}
	all, err := Generations(records, "")
	if err != nil || len(all) != 4 || all[0].Machine != "db" {
		t.Errorf("all machines have %d generations, %v", len(all), err)
	}
	if other := (Spec{Role: "web", Box: "base", CPUs: 2}); other.Digest() == spec.Digest() {
		t.Error("two specs have one digest")
	}
}
