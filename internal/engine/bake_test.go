// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/plan"
)

func provisioned(name lab.Name, shells ...string) lab.Machine {
	m := machine(name)
	for _, s := range shells {
		m.Provision = append(m.Provision, lab.Provision{Kind: lab.ProvisionShell, Shell: s})
	}
	return m
}

// stock puts the first n layers of a machine's image into the store, as if they had
// been baked.
func (b *bench) stock(l *Lab, w *lab.Lab, name lab.Name, n int) {
	b.t.Helper()
	s := &session{Lab: l}
	if err := s.look(b.ctx, w); err != nil {
		b.t.Fatal(err)
	}
	_, _, images, err := s.plan(b.ctx, w, UpOptions{}, nil)
	if err != nil {
		b.t.Fatal(err)
	}
	img := images[name]
	j := &job{img: img}
	for i := range n {
		disk := filepath.Join(b.t.TempDir(), "overlay")
		if err := os.WriteFile(disk, []byte{byte(i)}, 0o600); err != nil {
			b.t.Fatal(err)
		}
		below := b.layers().Chain(img.Box, img.Layers[:i], img.limits)
		if _, err := b.layers().Put(b.ctx, below, j.parent(i), img.Layers[i], []string{disk}, img.Size, time.Second); err != nil {
			b.t.Fatal(err)
		}
	}
}

func TestImagesAreKnownBeforeTheyAreBaked(t *testing.T) {
	b := newBench(t)
	l := b.open()
	w := b.want(provisioned("web", "one", "two"), machine("db"))
	bakes := func() []string {
		t.Helper()
		p, err := l.Plan(b.ctx, w, UpOptions{})
		if err != nil {
			t.Fatal(err)
		}
		return p.Steps[0].Bake
	}
	if diff := cmp.Diff([]string{"step 1 of 2: shell one", "step 2 of 2: shell two"}, bakes()); diff != "" {
		t.Error(diff)
	}
	b.stock(l, w, "web", 1)
	if diff := cmp.Diff([]string{"step 2 of 2: shell two"}, bakes()); diff != "" {
		t.Error(diff)
	}
	b.stock(l, w, "web", 2)
	if got := bakes(); got != nil {
		t.Errorf("all is baked, and the plan says %v", got)
	}
	b.up(l, w)
	b.expect(l, "db@1 ready", "web@1 ready")
	if p := b.up(l, w); p.Changes() {
		t.Errorf("a second up would change something: %+v", p)
	}
	w = b.want(provisioned("web", "one", "three"), machine("db"))
	p, err := l.Plan(b.ctx, w, UpOptions{})
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"provision changed: step 2: shell two -> shell three"}
	if diff := cmp.Diff(want, p.Steps[0].Reasons); diff != "" || p.Steps[0].Action != plan.Replace {
		t.Errorf("%s: %+v", diff, p.Steps[0])
	}
}

func TestInterruptedBakeLeavesNothing(t *testing.T) {
	for name, run := range map[string]func(*Lab, context.Context, *lab.Lab, Options) error{
		"up": func(l *Lab, ctx context.Context, w *lab.Lab, o Options) error {
			_, err := l.Up(ctx, w, UpOptions{Options: o})
			return err
		},
		"bake": func(l *Lab, ctx context.Context, w *lab.Lab, o Options) error {
			_, err := l.Bake(ctx, w, BakeOptions{UpOptions: UpOptions{Options: o}})
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t)
			l := b.open()
			ctx, cancel := context.WithCancel(b.ctx)
			defer cancel()
			var (
				states []string
				once   sync.Once
			)
			err := run(l, ctx, b.want(provisioned("web", "one")), Options{Events: func(e Event) {
				if e.Stage != StageBake {
					return
				}
				go once.Do(func() { // while the throw-away machine waits for its guest
					for ctx.Err() == nil {
						if all, _ := b.provider.List(b.ctx, l.ID()); len(all) > 0 {
							st, _ := l.Status(b.ctx)
							for _, m := range st.Machines {
								states = append(states, string(m.Name))
							}
							cancel()
						}
						time.Sleep(time.Millisecond)
					}
				})
			}})
			if !errors.Is(err, context.Canceled) {
				t.Fatalf("got error %v", err)
			}
			if len(states) > 0 {
				t.Errorf("the throw-away machine was shown: %v", states)
			}
			if all, _ := b.provider.List(b.ctx, ""); len(all) != 0 {
				t.Errorf("machines are left: %v", all)
			}
			b.wg.Wait()
			for _, dir := range []string{b.Dirs.Lab(l.ID()), b.Dirs.RunLab(l.ID())} {
				if _, err := os.Stat(dir); err == nil {
					t.Errorf("%s is left", dir)
				}
			}
		})
	}
}
