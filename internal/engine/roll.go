// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"sync"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/plan"
)

// roll replaces the replicas of a role in their order, so many at a time. The first
// failure ends it.
type roll struct {
	width int // how many at a time

	mu      sync.Mutex
	ended   int
	failed  bool
	changed chan struct{} // closed and replaced when one ended
}

// place is a machine's place in a roll; its zero value is in none.
type place struct {
	*roll
	at int
}

// rolls returns the places of the machines that are replaced by rolling.
func rolls(p plan.Plan, want *lab.Lab) map[lab.Name]place {
	byRole, length := map[string]*roll{}, map[string]int{}
	places := map[lab.Name]place{}
	for _, step := range p.Steps {
		m, ok := want.Machine(step.Machine)
		if !ok || step.Action != plan.Replace || m.Replace.Strategy != lab.Rolling {
			continue
		}
		r := byRole[m.Role]
		if r == nil {
			r = &roll{width: max(1, m.Replace.MaxUnavailable), changed: make(chan struct{})}
			byRole[m.Role] = r
		}
		places[m.Name] = place{r, length[m.Role]}
		length[m.Role]++
	}
	return places
}

// turn waits for the machine's turn. It reports false if there is none, because a
// machine before it failed, or because ctx ended.
func (p place) turn(ctx context.Context) bool {
	if p.roll == nil {
		return ctx.Err() == nil
	}
	for {
		p.mu.Lock()
		ended, failed, changed := p.ended, p.failed, p.changed
		p.mu.Unlock()
		switch {
		case failed || ctx.Err() != nil:
			return false
		case p.at < ended+p.width:
			return true
		}
		select {
		case <-changed:
		case <-ctx.Done():
		}
	}
}

// end says how it went.
func (p place) end(ok bool) {
	if p.roll == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.ended++
	p.failed = p.failed || !ok
	close(p.changed)
	p.changed = make(chan struct{})
}
