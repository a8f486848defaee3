// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/labfile/lab/internal/dirs"
	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/providers"
	"github.com/labfile/lab/providers/memory"
)

// scripted is a provider whose machine has a state from a time on.
type scripted struct {
	providers.Provider
	began time.Time
	then  []scene
}

type scene struct {
	from time.Duration
	is   providers.Machine
}

func (p *scripted) Inspect(context.Context, lab.Generation) (providers.Machine, error) {
	now := providers.Machine{State: providers.StateRunning}
	for _, s := range p.then {
		if time.Since(p.began) >= s.from {
			now = s.is
		}
	}
	if now.State == unknown.State {
		return now, errors.New("no answer")
	}
	return now, nil
}

// unknown is a machine that cannot be inspected.
var unknown providers.Machine

// A pause is told within five seconds, once and with its reason, and so is its end. A
// machine that is off is not silent.
func TestAttend(t *testing.T) {
	paused := providers.Machine{State: providers.StatePaused, Reason: "no space left"}
	running := providers.Machine{State: providers.StateRunning}
	off := providers.Machine{State: providers.StateStopped}
	unplugged := providers.Machine{State: providers.StateRunning, Unreachable: "its cable is out"}
	for name, tc := range map[string]struct {
		then []scene
		a    Attention
		want []string
	}{
		"fine":                  {},
		"paused":                {then: []scene{{10 * time.Second, paused}}, want: []string{"is paused: no space left; waiting for it"}},
		"paused from the start": {then: []scene{{0, paused}}, want: []string{"is paused: no space left; waiting for it"}},
		"paused and resumed": {
			then: []scene{{10 * time.Second, paused}, {20 * time.Second, running}, {40 * time.Second, paused}},
			want: []string{"is paused: no space left; waiting for it", "answers again", "is paused: no space left; waiting for it"},
		},
		"paused for a moment": {then: []scene{{10 * time.Second, paused}, {10500 * time.Millisecond, running}}},
		"shuts down":          {then: []scene{{10 * time.Second, paused}, {20 * time.Second, off}}, a: Attention{Leaving: true}, want: []string{"is paused: no space left; waiting for it"}},
		"off and on": {
			then: []scene{{10 * time.Second, paused}, {20 * time.Second, off}, {30 * time.Second, running}, {40 * time.Second, paused}, {50 * time.Second, running}},
			want: []string{"is paused: no space left; waiting for it", "is paused: no space left; waiting for it", "answers again"},
		},
		"unplugged": {then: []scene{{10 * time.Second, paused}, {20 * time.Second, unplugged}}, want: []string{"is paused: no space left; waiting for it"}},
		"not known": {then: []scene{{10 * time.Second, paused}, {20 * time.Second, unknown}}, want: []string{"is paused: no space left; waiting for it"}},
		"off":       {then: []scene{{10 * time.Second, off}}, a: Attention{Expected: true}},
	} {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			synctest.Test(t, func(t *testing.T) {
				p := &scripted{began: time.Now(), then: tc.then}
				l := &Lab{host: &Host{Dirs: dirs.Dirs{Data: root, Run: root}}, id: "shop-1f3a9c2b"}
				var said []string
				tc.a.Tell = func(why *Silence) {
					said = append(said, why.Waiting())
					since := time.Since(p.began)
					late := slices.ContainsFunc(tc.then, func(s scene) bool { return s.from <= since && since <= s.from+5*time.Second })
					if !late {
						t.Errorf("told after %v", since)
					}
				}
				_, leave := newAttendant(l, p, lab.Generation{Machine: "web", Number: 1}, tc.a).start(t.Context())
				time.Sleep(time.Minute)
				leave()
				if !slices.Equal(said, tc.want) {
					t.Errorf("said %q, want %q", said, tc.want)
				}
			})
		})
	}
}

// A login that hears nothing counts, whatever else is heard; one that ends while it is
// silent leaves it to the next to say that the machine goes on.
func TestAttendLogins(t *testing.T) {
	var said []string
	a := newAttendant(&Lab{}, &scripted{}, lab.Generation{Machine: "web", Number: 1}, Attention{Tell: func(why *Silence) {
		said = append(said, fmt.Sprint(why != nil))
	}})
	ctx := t.Context()
	a.changed(ctx, "one", true)
	a.changed(ctx, "two", true)
	a.changed(ctx, "one", false)
	if want := []string{"true"}; !slices.Equal(said, want) {
		t.Errorf("said %q, want %q", said, want)
	}
	a.ended("two")
	if want := []string{"true"}; !slices.Equal(said, want) {
		t.Errorf("said %q when a silent login ended, want %q", said, want)
	}
	a.heard(ctx)
	if want := []string{"true", "false"}; !slices.Equal(said, want) {
		t.Errorf("said %q, want %q", said, want)
	}
}

// A machine that is paused while it should shut down is told of, and that it goes on. That
// it answers nobody meanwhile is no news.
func TestStopOfAMachineThatIsPaused(t *testing.T) {
	b := newBench(t)
	pressed := make(chan struct{})
	b.provider = memory.New(memory.Config{Program: func(providers.Spec) memory.Program {
		return func(ctx context.Context, g *memory.Guest) error {
			if _, err := g.Write([]byte(memory.Banner + "\n")); err != nil {
				return err
			}
			select {
			case <-g.PowerButton():
				close(pressed)
				<-ctx.Done()
			case <-ctx.Done():
			}
			return nil
		}
	}})
	b.Providers["memory"], b.watched = b.provider, b.provider
	l := b.open()
	b.up(l, b.want(machine("web")))
	web := lab.Generation{Lab: l.ID(), Machine: "web", Number: 1}
	go func() {
		<-pressed
		b.provider.Pause(web, true)
	}()
	ctx, enough := context.WithCancel(b.ctx)
	defer enough()
	var said []string
	err := l.Stop(ctx, StopOptions{Grace: time.Minute, Options: Options{Events: func(e Event) {
		if e.Stage != StageNote || !strings.Contains(e.Text, "paused") && !strings.Contains(e.Text, "answer") {
			return
		}
		if said = append(said, e.Text); len(said) == 1 {
			b.provider.Pause(web, false)
		} else {
			enough()
		}
	}}})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("stop: %v", err)
	}
	if want := []string{"is paused; waiting for it", "answers again"}; !slices.Equal(said, want) {
		t.Errorf("it said %q, want %q", said, want)
	}
}
