// SPDX-License-Identifier: Apache-2.0

package cli_test

import (
	"cmp"
	"context"
	"io"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/labfile/lab/internal/cli"
	"github.com/labfile/lab/internal/engine"
	"github.com/labfile/lab/internal/lab"
)

// screen is what a command prints, for others to wait for.
type screen struct {
	mu      sync.Mutex
	text    strings.Builder
	changed chan struct{}
}

func newScreen() *screen { return &screen{changed: make(chan struct{}, 1)} }

func (s *screen) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.text.Write(p)
	select {
	case s.changed <- struct{}{}:
	default:
	}
	return len(p), nil
}

func (s *screen) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.text.String()
}

// shows waits until the screen shows text.
func (s *screen) shows(t *testing.T, text string) {
	t.Helper()
	limit := time.After(time.Minute)
	for !strings.Contains(s.String(), text) {
		select {
		case <-s.changed:
		case <-limit:
			t.Fatalf("it does not say %q:\n%s", text, s)
		}
	}
}

// Commands that wait for a machine say when it stands still or answers nothing, and when
// it answers again. A machine that only prints nothing is not silent.
func TestSilentMachine(t *testing.T) {
	for name, tc := range map[string]struct {
		args       []string
		more       string // of the Labfile
		generation int    // that is waited for
		shown      string // how the machine is named
	}{
		"console":   {args: []string{"console", "m"}},
		"logs":      {args: []string{"logs", "m", "--follow"}},
		"ssh-proxy": {args: []string{"ssh-proxy", "m"}},
		"exec":      {args: []string{"exec", "m", "--", "wait"}},
		"verify":    {args: []string{"verify"}, more: "checks: [{on: m, run: wait}]\n", shown: "m:"},
		"boot step": {args: []string{"replace", "m"}, more: "    boot: [{shell: wait}]\n", generation: 2, shown: "m:"},
		"replace":   {args: []string{"replace", "m"}, more: "    ready: [{exec: wait, timeout: 5m}]\n", generation: 2, shown: "m:"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d := newAnsweringDesk(t, answeringLab)
			defer func() { _, _, _ = d.run("destroy", "--yes") }()
			d.ok("up", "-q")
			d.write("Labfile", answeringLab+tc.more)
			g := lab.Generation{Lab: lab.ID(d.labID()), Machine: "m", Number: cmp.Or(tc.generation, 1)}
			shown := cmp.Or(tc.shown, "m")
			said := newScreen()
			ctx, stop := context.WithCancel(t.Context())
			in, typed := io.Pipe()
			ended := make(chan struct{})
			select { // of an earlier command
			case <-d.mute.heard:
			default:
			}
			go func() {
				defer close(ended)
				cli.Run(ctx, cli.Config{
					In: in, Out: io.Discard, Err: said,
					Getenv: func(k string) string { return d.env[k] },
					Dir:    func() (string, error) { return d.folder, nil },
					Host:   func(*slog.Logger) (*engine.Host, error) { return d.host, nil },
				}, tc.args)
			}()
			defer func() {
				stop()
				typed.Close()
				<-ended
			}()
			select {
			case <-d.mute.heard:
			case <-ended:
				t.Fatalf("it ended before the machine was asked:\n%s", said)
			case <-time.After(2 * time.Minute):
				t.Fatalf("the machine is not asked:\n%s", said)
			}
			d.mute.set(true)
			d.memory.Pause(g, true)
			said.shows(t, shown+" is paused; waiting for it")
			d.memory.Pause(g, false)
			d.mute.set(false)
			said.shows(t, shown+" answers again")
			d.mute.set(true)
			said.shows(t, shown+" does not answer; waiting for it")
			d.mute.set(false)
		})
	}
}
