// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"errors"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/providers"
)

// halting is a provider that says the next of these about any machine, the last one for
// ever.
type halting struct {
	providers.Provider
	says []providers.Machine
}

func (h *halting) Inspect(context.Context, lab.Generation) (providers.Machine, error) {
	m := h.says[0]
	if len(h.says) > 1 {
		h.says = h.says[1:]
	}
	return m, nil
}

// A bake whose machine is halted by its hypervisor, because the disk is full, ends with
// that at once. One that somebody paused is waited for.
func TestBakeOfPausedMachine(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		running := providers.Machine{State: providers.StateRunning}
		paused := providers.Machine{State: providers.StatePaused}
		full := providers.Machine{State: providers.StatePaused, Reason: "no space left"}
		p := &halting{says: []providers.Machine{running, paused, paused, running, full}}
		var said []string
		s := &session{provider: p, opt: Options{Events: func(e Event) { said = append(said, e.Text) }}}
		began := time.Now()
		err := (&oven{s: s}).watched(t.Context(), lab.Generation{Machine: "bake-1"}, func(ctx context.Context) error {
			<-ctx.Done()
			return context.Cause(ctx)
		})
		var end *endError
		if !errors.As(err, &end) || err.Error() != "the machine is paused: no space left" {
			t.Errorf("got %v", err)
		}
		if took := time.Since(began); took != 5*pauseInterval {
			t.Errorf("it took %v", took)
		}
		if want := []string{"is paused: no space left"}; !slices.Equal(said, want) {
			t.Errorf("said %q, want %q", said, want)
		}
		synctest.Wait()
	})
}
