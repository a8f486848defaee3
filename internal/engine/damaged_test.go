// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"errors"
	"os"
	"strings"
	"testing"

	"github.com/labfile/lab/internal/ledger"
)

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
