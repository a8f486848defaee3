// SPDX-License-Identifier: Apache-2.0

package fsutil

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
)

func TestLockDir(t *testing.T) {
	dir := t.TempDir()
	ctx, cancel := context.WithCancel(t.Context())
	first, err := LockDir(ctx, dir)
	if err != nil {
		t.Fatal(err)
	}
	type answer struct {
		f   *os.File
		err error
	}
	lock := func(ctx context.Context) chan answer {
		c := make(chan answer, 1)
		go func() {
			f, err := LockDir(ctx, dir)
			c <- answer{f, err}
		}()
		return c
	}
	given, second := lock(ctx), lock(t.Context())
	cancel()
	if a := <-given; !errors.Is(a.err, context.Canceled) || a.f != nil {
		t.Errorf("interrupted: %v, %v", a.f, a.err)
	}
	select {
	case a := <-second:
		t.Fatalf("two have the lock: %v", a.err)
	default:
	}
	first.Close()
	a := <-second // the one that gave up does not keep it
	if a.err != nil {
		t.Fatal(a.err)
	}
	a.f.Close()
	third := <-lock(ctx)
	if third.err != nil {
		t.Fatalf("a free lock of a context that has ended: %v", third.err)
	}
	third.f.Close()
	if _, err := LockDir(t.Context(), filepath.Join(dir, "none")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no folder: %v", err)
	}
}
