// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/ledger"
)

func TestBurnBringsMachinesBack(t *testing.T) {
	b := newBench(t)
	l := b.open()
	w := b.want(machine("web", "db"), machine("db"), machine("spare"))
	if _, err := l.Burn(b.ctx, w, BurnOptions{}); !errors.Is(err, ErrNoLab) {
		t.Errorf("got %v, want ErrNoLab", err)
	}
	b.up(l, w)
	var told []Burnt
	all, err := l.Burn(b.ctx, w, BurnOptions{
		UpOptions: UpOptions{Options: Options{Machines: []lab.Name{"web", "db"}}},
		Tell:      func(x Burnt) { told = append(told, x) },
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(all) != 2 || !slices.Equal(all, told) || all[0].Machine != "db" || all[1].Machine != "web" {
		t.Fatalf("got %+v, told %+v", all, told)
	}
	for _, x := range all {
		if x.Round != 1 || x.Generation != 1 || x.Next != 2 || x.Recovered <= 0 || x.Recovered > time.Minute || x.Trouble != "" {
			t.Errorf("got %+v", x)
		}
	}
	b.expect(l, "db@2 ready", "spare@1 ready", "web@2 ready")
	if g, err := l.Generation("web", 1); err != nil || !slices.Equal(g.End, []string{"burnt in round 1 of a drill"}) {
		t.Errorf("generation 1 ended because %q, %v", g.End, err)
	}
}

func TestBurnInRounds(t *testing.T) {
	b := newBench(t)
	l := b.open()
	w := b.want(machine("a"), machine("b"), machine("c"))
	b.up(l, w)
	ctx, stop := context.WithCancel(b.ctx)
	defer stop()
	all, err := l.Burn(ctx, w, BurnOptions{Random: 1, Every: 20 * time.Millisecond, For: time.Minute, Tell: func(x Burnt) {
		if x.Round == 3 {
			stop()
		}
	}})
	if err != nil {
		t.Fatal(err)
	}
	var rounds []int
	generations := 3
	for _, x := range all {
		rounds = append(rounds, x.Round)
	}
	st, err := l.Status(b.ctx)
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range st.Machines {
		generations -= m.Generation - 1
	}
	if !slices.Equal(rounds, []int{1, 2, 3}) || generations != 0 {
		t.Errorf("rounds %v, and the machines are %v", rounds, b.states(l))
	}
	// A drill that lasts no longer than one round has one.
	if all, err = l.Burn(b.ctx, w, BurnOptions{Random: 1, Every: time.Hour, For: time.Minute}); err != nil || len(all) != 1 {
		t.Errorf("got %+v, %v", all, err)
	}
}

// An interruption ends the drill when the lab is up again.
func TestInterruptedBurnLeavesTheLabUp(t *testing.T) {
	b := newBench(t)
	l := b.open()
	w := b.want(machine("a"), machine("b"), machine("c"))
	b.up(l, w)
	ctx, interrupt := context.WithCancel(b.ctx)
	defer interrupt()
	rounds := 0
	all, err := l.Burn(ctx, w, BurnOptions{
		Random: 2, Every: time.Millisecond, For: time.Hour,
		UpOptions: UpOptions{Options: Options{Events: func(e Event) {
			if e.Stage == StageDestroyed {
				if rounds++; rounds == 4 { // the second round's last
					interrupt()
				}
			}
		}}},
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(all) != 4 || all[3].Round != 2 || all[3].Next == 0 {
		t.Errorf("got %+v", all)
	}
	st, err := l.Status(b.ctx)
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range st.Machines {
		if m.State != StateReady {
			t.Errorf("%s is %s", m.Name, m.State)
		}
	}
}

// A machine that does not come back ends the drill, and says why.
func TestBurnTellsWhatDoesNotRecover(t *testing.T) {
	b := newBench(t)
	l := b.open()
	w := b.want(machine("a"), machine("b"))
	b.up(l, w)
	w.Machines[1].Ready[0].Pattern, w.Machines[1].Ready[0].Timeout = "never printed", 100*time.Millisecond
	all, err := l.Burn(b.ctx, w, BurnOptions{For: time.Hour, Every: time.Millisecond})
	var up *UpError
	if !errors.As(err, &up) {
		t.Fatalf("got %v, want *UpError", err)
	}
	if len(all) != 2 || all[0].Trouble != "" || all[0].Next != 2 || all[1].Trouble == "" || all[1].Next != 0 {
		t.Errorf("got %+v", all)
	}
	if got := b.states(l); got[0] != "a@2 ready" || !strings.HasPrefix(got[1], "b@2 failed: ") {
		t.Errorf("the machines are %v", got)
	}
}

func TestNothingToBurn(t *testing.T) {
	b := newBench(t)
	l := b.open()
	w := b.want(machine("a"))
	b.up(l, w)
	if err := l.Stop(b.ctx, StopOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := l.Burn(b.ctx, w, BurnOptions{}); !errors.Is(err, ErrNothingToBurn) {
		t.Errorf("got %v", err)
	}
	records, err := l.History()
	if err != nil || slices.ContainsFunc(records, func(r ledger.Record) bool { return r.Type == ledger.MachineDestroy }) {
		t.Errorf("something was destroyed: %v", err)
	}
}
