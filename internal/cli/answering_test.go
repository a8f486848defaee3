// SPDX-License-Identifier: Apache-2.0

package cli_test

import (
	"context"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/labfile/lab/boxes"
	"github.com/labfile/lab/internal/guest/guesttest"
	"github.com/labfile/lab/providers"
	"github.com/labfile/lab/providers/memory"
)

// newAnsweringDesk is newDesk with a box "answering", whose machines run an agent that
// takes logins: see hush.
func newAnsweringDesk(t *testing.T, labfile string) *desk {
	t.Helper()
	mute := newHush()
	d := newDeskOn(t, labfile, memory.Config{
		Program: func(providers.Spec) memory.Program {
			return func(ctx context.Context, g *memory.Guest) error {
				return (&guesttest.Guest{Banner: memory.Banner, Run: mute.answer, Hold: mute.hold}).Serve(ctx, g)
			}
		},
	})
	d.mute = mute
	store, err := boxes.Open(d.host.Dirs.Boxes())
	if err != nil {
		t.Fatal(err)
	}
	disk := filepath.Join(t.TempDir(), "disk.raw")
	if err := os.WriteFile(disk, []byte(strings.Repeat("y", 4096)), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err = store.Ingest(t.Context(), boxes.Ingredients{Config: boxes.Config{Architecture: "amd64", Agent: true}, Disk: disk}, "answering")
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// hush is what guests have in common: they answer, or are silent.
type hush struct {
	mu   sync.Mutex
	over chan struct{} // nil: they answer

	heard chan struct{} // has something once a guest was asked whether it is there, or runs "wait"
}

func newHush() *hush { return &hush{heard: make(chan struct{}, 1)} }

func (h *hush) hears() {
	select {
	case h.heard <- struct{}{}:
	default:
	}
}

func (h *hush) set(silent bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case silent && h.over == nil:
		h.over = make(chan struct{})
	case !silent && h.over != nil:
		close(h.over)
		h.over = nil
	}
}

// wait waits until guests may answer.
func (h *hush) wait() {
	h.mu.Lock()
	over := h.over
	h.mu.Unlock()
	if over != nil {
		<-over
	}
}

// answer carries out a command, or the program that is its input: only "exit N", "echo
// TEXT" and "wait" are known, which must be its last.
func (h *hush) answer(ctx context.Context, c guesttest.Command) int {
	if strings.Contains(c.Line, "lab-step") {
		if program, err := io.ReadAll(c.Stdin); err == nil && len(program) > 0 {
			c.Line = string(program)
		}
	}
	if strings.Contains(c.Line, "wait") && !strings.Contains(c.Line, "is-system-running") { // the latter has booted
		h.hears()
		<-ctx.Done() // until the host has enough of it
		return 0
	}
	if m := echoes.FindStringSubmatch(c.Line); m != nil {
		_, _ = io.WriteString(c.Output, m[1]+"\n")
	}
	code := 0
	if m := exits.FindStringSubmatch(c.Line); m != nil {
		code, _ = strconv.Atoi(m[1])
	}
	return code
}

// hold is guesttest.Guest's Hold.
func (h *hush) hold(hello bool) {
	if hello {
		h.hears()
	}
	h.wait()
}

var (
	exits  = regexp.MustCompile(`exit ([0-9]+)'?\s*$`)
	echoes = regexp.MustCompile(`echo ([^';]*)`)
)
