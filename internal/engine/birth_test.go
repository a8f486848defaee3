// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"bytes"
	"context"
	"slices"
	"testing"
	"time"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/ledger"
	"github.com/labfile/lab/providers"
	"github.com/labfile/lab/providers/memory"
)

// TestSeedIsForTheLogin lets in whom lab logs in as: the Labfile's user before the
// box's, and root, which cloud images shut out, if neither says who.
func TestSeedIsForTheLogin(t *testing.T) {
	for _, tc := range []struct{ labfile, box, want string }{
		{"ops", "debian", "user:\n    name: ops\n"},
		{"", "debian", "user:\n    name: debian\n"},
		{"", "", "disable_root: false\n"},
	} {
		b := newBench(t)
		l := b.open()
		if err := l.makeDirs(); err != nil {
			t.Fatal(err)
		}
		m := lab.Machine{Name: "m", User: tc.labfile}
		c := ledger.Create{Spec: ledger.SpecOf(m), Address: lab.NetworkOf(l.ID()).Host(lab.FirstHost), User: tc.box}
		spec, err := (&session{Lab: l}).spec(lab.Generation{Lab: l.ID(), Machine: "m", Number: 1}, m, Image{}, c)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Contains(spec.Seed, []byte(tc.want)) {
			t.Errorf("user %q, box's user %q: the seed has no %q", tc.labfile, tc.box, tc.want)
		}
	}
}

// tardy is a provider that learns late how a machine has ended.
type tardy struct {
	*memory.Provider
	noticed chan struct{}
}

func (p tardy) Wait(ctx context.Context, g lab.Generation) (providers.Exit, error) {
	exit, err := p.Provider.Wait(ctx, g)
	select {
	case <-p.noticed:
	case <-ctx.Done():
	}
	return exit, err
}

// A machine that ended and is started again before the supervisor has noticed stays
// plugged in, and its end is recorded.
func TestStartBeforeTheEndIsNoticed(t *testing.T) {
	b := newBench(t)
	late := tardy{b.provider, make(chan struct{})}
	b.watched = late
	l := b.open()
	db := machine("db")
	b.up(l, b.want(db))
	b.provider.Kill(lab.Generation{Lab: l.ID(), Machine: "db", Number: 1})
	time.AfterFunc(100*time.Millisecond, func() { close(late.noticed) })
	b.up(l, b.want(db))
	<-late.noticed
	b.expectPlugged(l, "db@1 present")
	records, err := l.History()
	if err != nil {
		t.Fatal(err)
	}
	var got []ledger.Type
	for _, r := range records {
		if r.Type == ledger.MachineExited || r.Type == ledger.MachineStart || r.Type == ledger.MachineReady {
			got = append(got, r.Type)
		}
	}
	if want := []ledger.Type{ledger.MachineReady, ledger.MachineExited, ledger.MachineStart, ledger.MachineReady}; !slices.Equal(got, want) {
		t.Errorf("recorded %q, want %q", got, want)
	}
}
