// SPDX-License-Identifier: Apache-2.0

package supervise

import (
	"net"
	"net/netip"
	"sync/atomic"
	"testing"
	"time"

	"github.com/labfile/lab/internal/guest/agentapi"
)

// saying makes the machine's agent one that says how many connections it has at an address. A
// negative number has it break off.
func (v *vm) saying(at netip.Addr, connections *atomic.Int64) (asked *atomic.Int64) {
	asked = new(atomic.Int64)
	v.mu.Lock()
	defer v.mu.Unlock()
	v.streams = func(c net.Conn) {
		h, err := agentapi.Accept(c)
		if err != nil {
			return // the agent died, or the supervisor gave up
		}
		if h.Kind != agentapi.Control {
			v.t.Errorf("a stream for %+v", h)
			return
		}
		if agentapi.Answer(c, nil) != nil {
			return
		}
		_ = agentapi.Serve(c, func(r agentapi.Request) agentapi.Response {
			if r.Op != agentapi.OpHello { // the clock's keeper
				return agentapi.Response{Hello: &agentapi.Hello{}}
			}
			n := connections.Load()
			asked.Add(1)
			if n < 0 {
				c.Close()
			}
			return agentapi.Response{Hello: &agentapi.Hello{Connections: map[netip.Addr]int{at: int(n), v.addr: 7}}}
		})
	}
	return asked
}

// TestDirectDrain has connections end that the supervisor does not see, or their time.
func TestDirectDrain(t *testing.T) {
	for name, c := range map[string]struct {
		drain       time.Duration
		connections []int64 // that the agent speaks of, one after the other; the last one goes on
		mute        bool
		least       time.Duration
	}{
		"nobody":               {drain: time.Hour, connections: []int64{0}, least: directGrace},
		"somebody, for a time": {drain: time.Hour, connections: []int64{2, 2, 1, 0}, least: directGrace + 3*directPoll},
		"somebody, for ever":   {drain: 3 * time.Second, connections: []int64{1}, least: 3 * time.Second},
		"then no answer":       {drain: 3 * time.Second, connections: []int64{1, -1}, least: 3 * time.Second},
		"a broken answer":      {drain: time.Hour, connections: []int64{-1, 1, 0}, least: directGrace + 2*directPoll},
		"no answer ever":       {drain: time.Hour, connections: []int64{-1}, least: directGrace + 2*directPoll},
		"nonsense":             {drain: time.Hour, mute: true, least: directGrace + 2*directPoll},
		"no time":              {drain: 0, connections: []int64{1}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d := testDirs(t)
			_, client := run(t, d, nil)
			ctx := testContext(t)
			at := netip.MustParsePrefix("10.130.1.10/16")
			old, next := boot(t, d, "web", 1, 10), boot(t, d, "web", 2, 10)
			var open atomic.Int64
			asked := new(atomic.Int64)
			if !c.mute { // else it echoes
				open.Store(c.connections[0])
				asked = old.saying(at.Addr(), &open)
			}
			m, standby := old.machine(), next.standby()
			m.Direct, standby.Direct = at, netip.MustParsePrefix("10.130.2.10/16")
			for _, m := range []Machine{m, standby} {
				if _, err := client.Plug(ctx, m); err != nil {
					t.Fatal(err)
				}
			}
			began, over := time.Now(), make(chan error, 1)
			if _, err := client.Promote(ctx, next.g, nil, c.drain); err != nil {
				t.Fatal(err)
			}
			go func() { over <- client.Drained(ctx, old.g) }()
			for {
				select {
				case err := <-over:
					if err != nil {
						t.Fatal(err)
					}
					if took := time.Since(began); took < c.least {
						t.Errorf("it took %s, and should at least %s", took, c.least)
					}
					if n := asked.Load(); n < int64(len(c.connections)) && c.drain > 0 && !c.mute {
						t.Errorf("it was asked %d times", n)
					}
					return
				case <-time.After(time.Millisecond):
					if n := asked.Load(); n > 0 && n < int64(len(c.connections)) {
						open.Store(c.connections[n])
					}
				}
			}
		})
	}
}
