// SPDX-License-Identifier: Apache-2.0

package supervise

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/labfile/lab/internal/guest/agentapi"
)

// pipes is a session with an agent that serves each stream.
type pipes struct {
	done  chan struct{}
	serve func(net.Conn)
}

func (p pipes) Done() <-chan struct{} { return p.done }

func (p pipes) Open(context.Context) (net.Conn, error) {
	host, guest := net.Pipe()
	p.serve(guest)
	return host, nil
}

// A guest that stood still has the right time as soon as it goes on, whatever it knows
// of pings; so has one whose session begins.
func TestKeepClock(t *testing.T) {
	for _, knows := range []bool{true, false} {
		t.Run(fmt.Sprintf("knows=%v", knows), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { testKeepClock(t, knows) })
		})
	}
}

func testKeepClock(t *testing.T, knows bool) {
	ctx, cancel := context.WithCancel(context.Background())
	began := time.Now()
	var mu sync.Mutex
	var got []string
	var still time.Duration // how long the guest stands still at the next ping
	var wg sync.WaitGroup
	sess := pipes{done: make(chan struct{}), serve: func(c net.Conn) {
		wg.Go(func() {
			defer c.Close()
			if _, err := agentapi.Accept(c); err != nil || agentapi.Answer(c, nil) != nil {
				return
			}
			_ = agentapi.Serve(c, func(r agentapi.Request) agentapi.Response {
				mu.Lock()
				defer mu.Unlock()
				if r.Op == agentapi.OpRefresh {
					got = append(got, fmt.Sprint(r.Time.Sub(began)))
				}
				if r.Op == agentapi.OpPing {
					time.Sleep(still)
					still = 0
					if !knows {
						return agentapi.Response{Error: "no such request"}
					}
				}
				return agentapi.Response{Hello: &agentapi.Hello{}}
			})
		})
	}}
	m := &machine{s: &supervisor{log: slog.New(slog.DiscardHandler)}, ctx: ctx}
	wg.Go(func() { m.keepClock(sess) })
	check := func(want ...string) {
		t.Helper()
		synctest.Wait()
		mu.Lock()
		defer mu.Unlock()
		if !slices.Equal(got, want) {
			t.Errorf("the clock was set at %q, want %q", got, want)
		}
	}
	time.Sleep(time.Minute + time.Second)
	check("0s")
	mu.Lock()
	still = 30 * time.Second
	mu.Unlock()
	time.Sleep(10 * time.Minute)
	check("0s", "1m32s")
	close(sess.done)
	cancel()
	wg.Wait()
}

func TestLate(t *testing.T) {
	at := wall()
	for gap, want := range map[time.Duration]bool{
		clockInterval: false, clockInterval + clockSlack: false, clockInterval + clockSlack + 1: true,
		time.Hour:    true, // the host was suspended, or QEMU stopped
		-time.Second: true, // the host's clock was set back
	} {
		if got := late(at, at.Add(gap)); got != want {
			t.Errorf("late after %v: %v", gap, got)
		}
	}
}
