// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"testing"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/providers"
)

// Two data directories may share a runtime directory. The sockets of the other
// one's machines are left alone for as long as somebody listens.
func TestGCLeavesSocketsThatSomebodyListensOn(t *testing.T) {
	b := newBench(t)
	id := lab.ID("theirs-00000000")
	dir := b.Dirs.RunLab(id)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, "db-1.qmp"), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	ln.SetUnlinkOnClose(false) // a killed process leaves its socket behind
	nothing := func(why string) {
		t.Helper()
		for _, dry := range []bool{true, false} {
			if found, err := b.GC(b.ctx, dry); err != nil || len(found) != 0 {
				t.Errorf("%s, dry run %v: %v, %v", why, dry, found, err)
			}
		}
	}
	nothing("somebody listens")
	ln.Close()

	lk, err := b.Lab(id).acquire("lab up")
	if err != nil {
		t.Fatal(err)
	}
	nothing("somebody has the lock")
	lk.release()

	if found, err := b.GC(b.ctx, false); err != nil || len(found) != 1 || found[0].Name != dir {
		t.Errorf("once nobody listens: %v, %v", found, err)
	}
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the directory: %v", err)
	}
}

// blind is a provider that cannot list its machines.
type blind struct {
	providers.Provider
	err error
}

func (p blind) List(context.Context, lab.ID) ([]providers.Machine, error) { return nil, p.err }

// What cannot be seen is not taken for gone.
func TestGCAndPruneDoNotGuess(t *testing.T) {
	b := newBench(t)
	l := b.Lab("shop-00000000")
	dir := b.Dirs.Lab(l.ID())
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	broken := errors.New("the disk is on fire")
	b.Providers["blind"] = blind{b.provider, broken}
	if _, err := b.BoxesInUse(b.ctx); !errors.Is(err, broken) {
		t.Errorf("BoxesInUse: %v", err)
	}
	if _, err := l.gc(b.ctx, false); !errors.Is(err, broken) {
		t.Errorf("gc: %v", err)
	}
	if _, err := os.Stat(dir); err != nil {
		t.Errorf("the lab's directory: %v", err)
	}
	b.Providers["blind"] = blind{b.provider, fmt.Errorf("no hypervisor: %w", providers.ErrIncapable)}
	if _, err := b.BoxesInUse(b.ctx); err != nil {
		t.Errorf("BoxesInUse without the provider: %v", err)
	}
}
