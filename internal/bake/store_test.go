// SPDX-License-Identifier: Apache-2.0

package bake

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/labfile/lab/internal/lab"
)

// pantry is a store with the layers of three steps to put into it.
type pantry struct {
	*Store
	t      *testing.T
	layers []lab.Layer
}

func newPantry(t *testing.T) *pantry {
	layers, err := NewKeys(t.TempDir()).Layers(box, []lab.Provision{shell("one"), shell("two"), shell("three")})
	if err != nil {
		t.Fatal(err)
	}
	return &pantry{NewStore(filepath.Join(t.TempDir(), "layers")), t, layers}
}

// put bakes layer i with the given disks' contents on top of what is stored.
func (p *pantry) put(i int, size lab.Bytes, contents ...string) Entry {
	p.t.Helper()
	var disks []string
	for _, c := range contents {
		d := filepath.Join(p.t.TempDir(), "overlay")
		if err := os.WriteFile(d, []byte(c), 0o600); err != nil {
			p.t.Fatal(err)
		}
		disks = append(disks, d)
	}
	parent := box
	if i > 0 {
		parent = p.layers[i-1].Key
	}
	e, err := p.Put(context.Background(), p.Chain(box, p.layers[:i], nil), parent, p.layers[i], disks, size, time.Second)
	if err != nil {
		p.t.Fatal(err)
	}
	return e
}

// read returns what the chain's disks hold.
func (p *pantry) read(limit lab.Bytes) string {
	p.t.Helper()
	var all []string
	var limits []lab.Bytes
	if limit > 0 {
		limits = []lab.Bytes{limit, limit, limit}
	}
	for _, d := range p.Chain(box, p.layers, limits).Disks {
		b, err := os.ReadFile(d)
		if err != nil {
			p.t.Fatal(err)
		}
		all = append(all, string(b))
	}
	return strings.Join(all, " ")
}

func (p *pantry) expect(what string, limit lab.Bytes, want string) {
	p.t.Helper()
	if got := p.read(limit); got != want {
		p.t.Errorf("%s: the chain is %q, want %q", what, got, want)
	}
}

func TestChain(t *testing.T) {
	p := newPantry(t)
	p.expect("empty", 0, "")
	p.put(0, lab.GiB, "a")
	p.put(1, 2*lab.GiB, "b1", "b2")
	p.expect("two layers", 0, "a b1 b2")
	if c := p.Chain(box, p.layers, nil); c.Count != 2 || c.Size != 2*lab.GiB {
		t.Errorf("chain is %+v", c)
	}
	p.expect("a smaller disk", lab.GiB, "a")
	if c := p.Chain("sha256:other", p.layers, nil); c.Count != 0 {
		t.Error("a layer is found on top of another box")
	}
	p.put(2, 2*lab.GiB, "c")
	p.expect("three layers", 0, "a b1 b2 c")
	for _, d := range p.Chain(box, p.layers, nil).Disks {
		if fi, err := os.Stat(d); err != nil || fi.Mode() != 0o400 {
			t.Errorf("%s: %v %v", d, fi.Mode(), err)
		}
	}

	// A layer that is baked anew does not carry those that were on the old one, whose
	// disks stay.
	old := p.Chain(box, p.layers, nil).Disks
	p.put(0, lab.GiB, "A")
	p.expect("baked anew", 0, "A")
	for _, d := range old {
		if _, err := os.Stat(d); err != nil {
			t.Error(err)
		}
	}
	p.put(1, lab.GiB, "B")
	p.expect("on top of it", 0, "A B")
}

func TestDamagedLayersAreMissing(t *testing.T) {
	for name, damage := range map[string]func(dir, disk string) error{
		"disk gone": func(_, disk string) error { return os.Remove(disk) },
		"disk cut": func(_, disk string) error {
			return errors.Join(os.Remove(disk), os.WriteFile(disk, nil, 0o400))
		},
		"disk a link": func(dir, disk string) error {
			return errors.Join(os.Rename(disk, disk+".away"), os.Symlink(disk+".away", disk))
		},
		"record gone": func(dir, _ string) error { return os.Remove(filepath.Join(dir, entryFile)) },
		"record damaged": func(dir, _ string) error {
			return os.WriteFile(filepath.Join(dir, entryFile), []byte("{"), 0o600)
		},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPantry(t)
			p.put(0, lab.GiB, "a")
			p.put(1, lab.GiB, "b")
			disk := p.Chain(box, p.layers, nil).Disks[1]
			if err := damage(filepath.Dir(disk), disk); err != nil {
				t.Fatal(err)
			}
			p.expect("damaged", 0, "a")
			p.put(1, lab.GiB, "b")
			p.expect("mended", 0, "a b")
		})
	}
}

func TestLockIsForOne(t *testing.T) {
	p := newPantry(t)
	key := p.layers[0].Key
	first, err := p.Lock(t.Context(), key, func() { t.Error("it waits for nobody") })
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	waited := false
	if _, err := p.Lock(ctx, key, func() { waited = true }); !errors.Is(err, context.DeadlineExceeded) || !waited {
		t.Errorf("a taken lock gave %v, told %v", err, waited)
	}
	go func() { time.Sleep(50 * time.Millisecond); first.Unlock() }()
	second, err := p.Lock(t.Context(), key, func() {})
	if err != nil {
		t.Fatal(err)
	}
	second.Unlock()
}

func TestPrune(t *testing.T) {
	p := newPantry(t)
	for i, c := range []string{"a", "b", "c"} {
		p.put(i, lab.GiB, c)
	}
	stale := filepath.Join(p.dir, tmpPrefix+"x")
	if err := os.Mkdir(stale, 0o700); err != nil {
		t.Fatal(err)
	}
	texts := func(rs []Removed) (got []string) {
		for _, r := range rs {
			got = append(got, r.Text)
		}
		return got
	}
	keepSecond := func(key string) bool { return key == p.layers[1].Key }
	would, err := p.Prune(keepSecond, true)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"shell three"}, texts(would)); diff != "" {
		t.Error(diff)
	}
	p.expect("a dry run", 0, "a b c")
	if _, err := p.Prune(keepSecond, false); err != nil {
		t.Fatal(err)
	}
	p.expect("what is below stays", 0, "a b")

	busy, err := p.Lock(t.Context(), p.layers[0].Key, func() {})
	if err != nil {
		t.Fatal(err)
	}
	defer busy.Unlock()
	old := time.Now().Add(-2 * time.Hour)
	if err := os.Chtimes(stale, old, old); err != nil {
		t.Fatal(err)
	}
	gone, err := p.Prune(func(string) bool { return false }, false)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(2, len(gone)); diff != "" {
		t.Errorf("%s: %+v", diff, gone)
	}
	p.expect("what is being baked stays", 0, "a")
	if _, err := os.Stat(stale); err == nil {
		t.Error("what an interrupted bake left is still there")
	}
}
