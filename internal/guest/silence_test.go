// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func TestWatch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		var said []string
		answer := make(chan struct{})
		w := &watch{ask: func() { <-answer }, changed: func(silent bool) {
			said = append(said, fmt.Sprint(time.Since(began), " ", silent))
		}}
		last, written := began, int64(0)
		rate := int64(0) // bytes from one look to the next
		pass := func(d time.Duration) {
			for range d / lookEvery {
				time.Sleep(lookEvery)
				synctest.Wait()
				written += rate
				w.look(time.Now(), last, written)
			}
		}
		pass(10 * time.Second) // asked after two, silent after four
		answer <- struct{}{}
		last = time.Now()
		pass(time.Second)
		if want := []string{"4s true", "10.25s false"}; !slices.Equal(said, want) {
			t.Errorf("got %q, want %q", said, want)
		}
		// A guest that answers is not silent, however little it says.
		said = nil
		go func() {
			for range answer {
			}
		}()
		close(answer)
		for range 10 {
			pass(3 * time.Second)
			last = time.Now()
		}
		synctest.Wait()
		if len(said) > 0 {
			t.Errorf("said %q of a guest that answers", said)
		}
		// A long upload keeps the answer waiting.
		block := make(chan struct{})
		w.ask = func() { <-block }
		rate = bulk
		pass(20 * time.Second)
		if len(said) > 0 {
			t.Errorf("said %q of a guest that takes much", said)
		}
		// It does not go on, or goes on slowly, as what somebody types does: nothing shows
		// that the guest takes it.
		rate = 10
		pass(20 * time.Second)
		if len(said) != 1 || !strings.HasSuffix(said[0], " true") {
			t.Errorf("said %q of a guest that answers nothing to a slow writer", said)
		}
		close(block)
		synctest.Wait()
	})
}
