// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"errors"
	"os"
	"strings"
	"testing"

	"github.com/labfile/lab/internal/ledger"
)

// TestDestroyWithoutTheLedger removes a lab whose machines run and whose ledger is none:
// a folder cannot be read, even by root.
func TestDestroyWithoutTheLedger(t *testing.T) {
	b := newBench(t)
	l := b.open()
	b.up(l, b.want(machine("db")))
	path := b.Dirs.Ledger(l.ID())
	if err := errors.Join(os.Remove(path), os.Mkdir(path, 0o700)); err != nil {
		t.Fatal(err)
	}
	if _, err := l.Status(b.ctx); err == nil {
		t.Fatal("the ledger can be read")
	}
	var notes []string
	err := l.Destroy(b.ctx, Options{Events: func(e Event) {
		if e.Stage == StageNote {
			notes = append(notes, e.Text)
		}
	}})
	if err != nil {
		t.Fatal(err)
	}
	if len(notes) != 1 || !strings.HasPrefix(notes[0], "going on without the ledger: reading the ledger: ") {
		t.Errorf("told %q", notes)
	}
	left, err := b.provider.List(b.ctx, l.ID())
	if err != nil || len(left) > 0 {
		t.Errorf("left over: %v, %v", left, err)
	}
	if _, err := os.Stat(b.Dirs.Lab(l.ID())); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the lab's folder: %v", err)
	}
}

// TestDestroyWithADamagedLedger removes a lab whose machines run and whose ledger
// cannot be read.
func TestDestroyWithADamagedLedger(t *testing.T) {
	b := newBench(t)
	l := b.open()
	b.up(l, b.want(machine("db")))
	path := b.Dirs.Ledger(l.ID())
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(strings.Replace(string(text), `"seq":2`, `"seq":7`, 1)), 0o600); err != nil {
		t.Fatal(err)
	}
	var damaged *ledger.CorruptError
	if _, err := l.Status(b.ctx); !errors.As(err, &damaged) {
		t.Fatalf("the ledger is not damaged: %v", err)
	}
	if err := l.Destroy(b.ctx, Options{}); err != nil {
		t.Fatal(err)
	}
	left, err := b.provider.List(b.ctx, l.ID())
	if err != nil || len(left) > 0 {
		t.Errorf("left over: %v, %v", left, err)
	}
}
