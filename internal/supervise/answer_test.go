// SPDX-License-Identifier: Apache-2.0

package supervise

import (
	"context"
	"errors"
	"net"
	"sync/atomic"
	"testing"

	"github.com/labfile/lab/internal/guest/agentapi"
	"github.com/labfile/lab/internal/lab"
)

// A machine answers by its agent, whatever that knows, or else by its kernel. That is no
// use of the machine.
func TestAnswer(t *testing.T) {
	d := testDirs(t)
	_, c := run(t, d, nil)
	ctx := testContext(t)
	asked := make(chan struct{}, 100)
	var mute atomic.Bool
	with := boot(t, d, "db", 1, 10)
	with.streams = func(c net.Conn) {
		if _, err := agentapi.Accept(c); err != nil || agentapi.Answer(c, nil) != nil {
			return
		}
		_ = agentapi.Serve(c, func(r agentapi.Request) agentapi.Response {
			if r.Op == agentapi.OpHello {
				asked <- struct{}{}
			}
			if mute.Load() {
				<-with.ctx.Done()
			}
			return agentapi.Response{Error: "no such request"}
		})
	}
	without := boot(t, d, "web", 1, 11)
	for _, v := range []*vm{with, without} {
		m := v.machine()
		m.Agent = v == with
		if _, err := c.Plug(ctx, m); err != nil {
			t.Fatal(err)
		}
	}
	active := func() []any {
		st, err := c.Status(ctx)
		if err != nil {
			t.Fatal(err)
		}
		var all []any
		for _, m := range st.Machines {
			all = append(all, m.LastActive.UnixNano())
		}
		return all
	}
	before := active()
	for _, v := range []*vm{with, without} {
		if err := c.Answer(ctx, v.g); err != nil {
			t.Errorf("%s: %v", v.g, err)
		}
	}
	select {
	case <-asked:
	default:
		t.Error("the agent was not asked")
	}
	if after := active(); before[0] != after[0] || before[1] != after[1] {
		t.Errorf("it counts as a use: %v, %v", before, after)
	}
	if err := c.Answer(ctx, lab.Generation{Lab: labID, Machine: "db", Number: 2}); !errors.Is(err, ErrNotPlugged) {
		t.Errorf("a generation that is not there: %v", err)
	}
	mute.Store(true)
	short, cancel := context.WithCancel(ctx)
	go func() {
		<-asked
		cancel()
	}()
	if err := c.Answer(short, with.g); !errors.Is(err, context.Canceled) {
		t.Errorf("an agent that does not answer: %v", err)
	}
}
