// SPDX-License-Identifier: Apache-2.0

package ledger

import (
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestWhatPeopleDoByHand(t *testing.T) {
	l := Open(filepath.Join(t.TempDir(), "ledger.jsonl"))
	at := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	l.now = func() time.Time { at = at.Add(time.Minute); return at }
	add := func(typ Type, generation int, data any) Record {
		t.Helper()
		r, err := l.Append(Record{Type: typ, Machine: "web", Generation: generation}, data)
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	machine := func() Machine {
		t.Helper()
		records, err := l.Read()
		if err != nil {
			t.Fatal(err)
		}
		state, err := Fold(records)
		if err != nil {
			t.Fatal(err)
		}
		return state.Machines["web"]
	}
	add(MachineCreate, 1, Create{})
	add(MachineEntered, 1, Entered{Kind: "ssh", User: "ann"})
	entered := add(MachineEntered, 1, Entered{Kind: "exec", User: "ann", Command: []string{"sh", "-c", "a\nb " + strings.Repeat("x", 80)}})
	tainted := add(MachineTainted, 1, Tainted{Why: "a"})
	add(MachineTainted, 1, Tainted{Why: "b"})
	if m := machine(); m.Entered != 2 || !m.LastEntered.Equal(entered.Time) || !cmp.Equal(m.Tainted, []string{"a", "b"}) {
		t.Errorf("got entered %d, last %v, tainted %q", m.Entered, m.LastEntered, m.Tainted)
	}
	untainted := add(MachineUntainted, 1, Tainted{Why: "checked"})
	if m := machine(); len(m.Tainted) != 0 || m.Entered != 2 {
		t.Errorf("untainted, it is tainted %q and entered %d times", m.Tainted, m.Entered)
	}
	add(MachineTainted, 1, Tainted{Why: "c"})
	add(MachineCreate, 2, Create{})
	add(MachineTainted, 1, Tainted{Why: "late"}) // about the one before
	if m := machine(); len(m.Tainted) != 0 || m.Entered != 0 || !m.LastEntered.IsZero() {
		t.Errorf("the next generation inherits %q, %d, %v", m.Tainted, m.Entered, m.LastEntered)
	}
	add(MachineRestored, 1, Restored{Tainted: []string{"c"}})
	if m := machine(); m.Generation != 1 || !cmp.Equal(m.Tainted, []string{"c", "late"}) || m.Entered != 2 {
		t.Errorf("a generation that was not replaced after all is %d, tainted %q", m.Generation, m.Tainted)
	}
	for r, want := range map[*Record]string{
		&entered:   "web@1: exec by ann: sh -c a b " + strings.Repeat("x", 50) + "…",
		&tainted:   "web@1: tainted: a",
		&untainted: "web@1: no longer tainted: checked",
	} {
		if got := r.Summary(); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}

// The time of a lab's end is counted from its first opening, whatever is said later.
func TestExpiryIsCountedFromTheFirstOpening(t *testing.T) {
	l := Open(filepath.Join(t.TempDir(), "ledger.jsonl"))
	var first Record
	for i, expires := range []time.Duration{time.Hour, 2 * time.Hour, 0} {
		r, err := l.Append(Record{Type: LabOpened}, Opened{Name: "shop", Expires: expires})
		if err != nil {
			t.Fatal(err)
		}
		if i == 0 {
			first = r
		}
		records, err := l.Read()
		if err != nil {
			t.Fatal(err)
		}
		state, err := Fold(records)
		if err != nil {
			t.Fatal(err)
		}
		if state.Opened.Expires != expires || !state.Since.Equal(first.Time) {
			t.Errorf("got %v since %v, want %v since %v", state.Opened.Expires, state.Since, expires, first.Time)
		}
	}
}
