// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"fmt"
	"slices"
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
		last := began
		pass := func(d time.Duration) {
			for range d / lookEvery {
				time.Sleep(lookEvery)
				synctest.Wait()
				w.look(time.Now(), last)
			}
		}
		pass(10 * time.Second) // asked after two, silent after four
		answer <- struct{}{}
		last = time.Now()
		pass(time.Second)
		if want := []string{"4s true", "10.5s false"}; !slices.Equal(said, want) {
			t.Errorf("got %q, want %q", said, want)
		}
		// Whoever answers is not silent, however little it says.
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
			t.Errorf("said %q of one who answers", said)
		}
		// What goes out is not silence: a long upload keeps the answer waiting.
		block := make(chan struct{})
		w.ask = func() { <-block }
		pass(2 * time.Second)
		for range 20 {
			last = time.Now()
			pass(time.Second)
		}
		if len(said) > 0 {
			t.Errorf("said %q of one who is busy", said)
		}
		close(block)
		synctest.Wait()
	})
}
