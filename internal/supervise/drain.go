// SPDX-License-Identifier: Apache-2.0

package supervise

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/labfile/lab/internal/guest/agentapi"
	"github.com/labfile/lab/internal/lab"
)

// drainPoll is how often a draining generation is looked at: the connections that
// other machines have with it end without telling.
const drainPoll = 20 * time.Millisecond

// Connections in a network where the machine runs do not pass here: its agent is asked.
const (
	// directGrace is for whoever looked the name up just before another generation took
	// over, and connects with the address that it got then.
	directGrace = time.Second
	// directPoll is how often the agent is asked.
	directPoll = 200 * time.Millisecond
	// directTime bounds an answer.
	directTime = 5 * time.Second
	// directTries is how often in a row a guest may not answer that had no connections
	// before: then nobody would miss it.
	directTries = 3
)

// drained waits until a generation that gave way has nothing left to do.
func (s *supervisor) drained(ctx context.Context, g lab.Generation) error {
	tick := time.NewTicker(drainPoll)
	defer tick.Stop()
	direct := directDrain{}
	defer direct.close()
	for {
		s.mu.Lock()
		m := s.generation(g)
		if m == nil {
			s.mu.Unlock()
			return nil
		}
		phase, gaveWay, drainedBy, st := m.phase, m.gaveWay, m.drainedBy, m.status()
		s.mu.Unlock()
		switch {
		case phase != PhaseDraining:
			return fmt.Errorf("waiting for the connections of %s to end: it is not draining but %s", g, phase)
		case time.Now().After(drainedBy):
			return nil
		case st.Open == 0 && direct.over(ctx, m, gaveWay, drainedBy):
			return nil
		}
		select {
		case <-tick.C:
		case <-m.ctx.Done():
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// directDrain looks at the connections that others have with a machine where it runs.
type directDrain struct {
	conn   net.Conn // to the agent
	asked  time.Time
	open   int // as it said last
	failed int // times in a row that it did not say
}

// over reports whether there are none, as far as that can be known, nor any to come.
func (d *directDrain) over(ctx context.Context, m *machine, gaveWay, drainedBy time.Time) bool {
	if !m.spec.Direct.IsValid() {
		return true
	}
	now := time.Now()
	if now.Sub(gaveWay) < directGrace || now.Sub(d.asked) < directPoll {
		return false
	}
	d.asked = now
	ctx, cancel := context.WithTimeout(ctx, min(directTime, drainedBy.Sub(now)))
	defer cancel()
	n, err := d.ask(ctx, m)
	if err != nil {
		m.s.log.Debug("asking for connections", "machine", m.spec.Generation, "error", err)
		d.close()
		d.conn = nil
		d.failed++
		return d.open == 0 && d.failed >= directTries
	}
	d.open, d.failed = n, 0
	return n == 0
}

// ask counts the connections.
func (d *directDrain) ask(ctx context.Context, m *machine) (n int, err error) {
	if d.conn == nil {
		conn, err := m.openAgent(ctx)
		if err != nil {
			return 0, err
		}
		d.conn = conn
		if err := agentapi.Begin(ctx, conn, agentapi.Control); err != nil {
			return 0, err
		}
	}
	answer, err := agentapi.Call(ctx, d.conn, agentapi.Request{Op: agentapi.OpHello})
	if err != nil {
		return 0, err
	}
	if answer.Hello == nil {
		return 0, errors.New("the agent did not say hello")
	}
	return answer.Hello.Connections[m.spec.Direct.Addr()], nil
}

func (d *directDrain) close() {
	if d.conn != nil {
		_ = d.conn.Close()
	}
}
