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

// saying makes the machine's agent one that says hello, with the connections that it has.
func (v *vm) saying(at netip.Addr, connections *atomic.Int64) (asked *atomic.Int64) {
	asked = new(atomic.Int64)
	v.mu.Lock()
	defer v.mu.Unlock()
	v.streams = func(c net.Conn) {
		h, err := agentapi.Accept(c)
		if err != nil || h.Kind != agentapi.Control {
			v.t.Errorf("a stream for %+v, %v", h, err)
			return
		}
		if agentapi.Answer(c, nil) != nil {
			return
		}
		_ = agentapi.Serve(c, func(r agentapi.Request) agentapi.Response {
			n := connections.Load()
			asked.Add(1)
			return agentapi.Response{Hello: &agentapi.Hello{Connections: map[netip.Addr]int{at: int(n), v.addr: 7}}}
		})
	}
	return asked
}

// TestDirectDrain has connections end that the supervisor does not see, or their time.
func TestDirectDrain(t *testing.T) {
	t.Parallel()
	d := testDirs(t)
	_, c := run(t, d, nil)
	ctx := testContext(t)
	at := netip.MustParsePrefix("10.130.1.10/16")
	var open atomic.Int64
	open.Store(2)
	last := boot(t, d, "web", 1, 10)
	asked := last.saying(at.Addr(), &open)
	m := last.machine()
	m.Direct = at
	if _, err := c.Plug(ctx, m); err != nil {
		t.Fatal(err)
	}
	give := func(number int, drain time.Duration) (over chan error) {
		t.Helper()
		next := boot(t, d, "web", number, 10)
		m := next.standby()
		m.Direct = netip.MustParsePrefix("10.130.2.10/16")
		if _, err := c.Plug(ctx, m); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Promote(ctx, next.g, nil, drain); err != nil {
			t.Fatal(err)
		}
		over = make(chan error, 1)
		old := last.g
		go func() { over <- c.Drained(ctx, old) }()
		last = next
		return over
	}
	old := last.g
	over := give(2, patience)
	for asked.Load() < 3 {
		select {
		case err := <-over:
			t.Fatalf("drained with connections open: %v", err)
		case <-time.After(time.Millisecond):
		}
	}
	open.Store(0)
	if err := <-over; err != nil {
		t.Fatal(err)
	}
	if err := c.Unplug(ctx, old); err != nil {
		t.Fatal(err)
	}

	// One whose agent talks nonsense keeps nobody waiting; nor does a time that is over.
	old = last.g
	if err := <-give(3, patience); err != nil {
		t.Fatal(err)
	}
	if err := c.Unplug(ctx, old); err != nil {
		t.Fatal(err)
	}
	if err := <-give(4, 0); err != nil {
		t.Fatal(err)
	}
}
