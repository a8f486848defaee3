// SPDX-License-Identifier: Apache-2.0

package supervise

import (
	"context"
	"errors"
	"net"
	"time"

	"github.com/labfile/lab/internal/guest"
	"github.com/labfile/lab/internal/guest/agentapi"
	"github.com/labfile/lab/internal/guest/channel"
)

// clockInterval is how often a guest is asked whether it is there, and clockSlack how
// much later than that its answer may come until its clock is set.
const (
	clockInterval = 2 * time.Second
	clockSlack    = time.Second
)

// session is a *channel.Session.
type session interface {
	Open(ctx context.Context) (net.Conn, error)
	Done() <-chan struct{}
}

var _ session = (*channel.Session)(nil)

// keepClock sets the guest's clock when the session begins, and whenever the guest or
// the host stood still: a clock does not go on while its machine is paused, its
// hypervisor stopped, or the host suspended. It ends with the session.
func (m *machine) keepClock(sess session) {
	ctx, cancel := context.WithCancel(m.ctx)
	defer cancel()
	go func() {
		select {
		case <-sess.Done():
			cancel()
		case <-ctx.Done():
		}
	}()
	if err := setClock(ctx, sess); err != nil {
		m.s.log.Debug("setting the clock of a machine", "machine", m.spec.Generation, "err", err)
		return // an agent that cannot, or is gone
	}
	conn, err := sess.Open(ctx)
	if err != nil {
		return
	}
	defer conn.Close()
	if err := agentapi.Begin(ctx, conn, agentapi.Control); err != nil {
		return
	}
	for last := wall(); m.pause(ctx, clockInterval); {
		// An agent of an earlier lab refuses what it does not know, which is an answer.
		_, err := agentapi.Call(ctx, conn, agentapi.Request{Op: agentapi.OpPing})
		var refused *agentapi.RefusedError
		if err != nil && !errors.As(err, &refused) {
			return
		}
		now := wall()
		if late(last, now) {
			m.s.log.Info("a machine stood still; its clock is set", "machine", m.spec.Generation, "for", now.Sub(last))
			if err := setClock(ctx, sess); err != nil {
				m.s.log.Warn("setting the clock of a machine", "machine", m.spec.Generation, "err", err)
			}
			now = wall()
		}
		last = now
	}
}

// late reports whether more time than expected went by between two answers, or whether
// the host's clock was set back.
func late(last, now time.Time) bool {
	gap := now.Sub(last)
	return gap > clockInterval+clockSlack || gap < 0
}

// wall is the time of day without the monotonic clock, which stands still with the
// host.
func wall() time.Time { return time.Now().Round(0) }

// clockTries is how often the clock is set: a guest under load may be slow each time.
const clockTries = 3

// setClock sets the guest's clock, again if the answer was late: the guest may have
// stood still meanwhile.
func setClock(ctx context.Context, sess session) error {
	for range clockTries {
		began := wall()
		conn, err := sess.Open(ctx)
		if err != nil {
			return err
		}
		err = guest.Refresh(ctx, conn)
		conn.Close()
		if took := wall().Sub(began); err != nil || 0 <= took && took < clockSlack {
			return err
		}
	}
	return nil
}

// pause waits, and reports whether ctx goes on.
func (m *machine) pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}
