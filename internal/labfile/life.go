// SPDX-License-Identifier: Apache-2.0

package labfile

import (
	"time"

	"github.com/labfile/lab/internal/lab"
)

// replaceEntry is the value of replace.
type replaceEntry struct {
	place
	Strategy       text     `yaml:"strategy" short:"yes" oneof:"stop-first blue-green rolling" default:"stop-first" also:"type mode" doc:"stop-first: the old generation is shut down, then the next one boots. blue-green: the next one boots beside the old one, and takes over name, address and ports once it is ready. rolling: replicas one after the other, each as by blue-green where it can be."`
	MaxUnavailable integer  `yaml:"max_unavailable" range:"1..100" default:"1" also:"maxunavailable parallel batch" doc:"rolling: how many replicas are replaced at a time."`
	Drain          duration `yaml:"drain" range:"0s..24h" default:"10s" also:"grace drain_timeout" doc:"blue-green and rolling: how long connections to the old generation may go on."`
	OnFailure      text     `yaml:"on_failure" oneof:"keep discard" default:"keep" also:"onfailure failure" doc:"What becomes of a generation that never became ready: it is kept, stopped, with its disk and logs, until the next replacement; or discarded."`
	Keep           integer  `yaml:"keep" range:"0..100" default:"2" also:"history retain" doc:"How many retired generations keep their disks, to be compared with and gone back to."`
}

// ageEntry is the value of max_age.
type ageEntry struct {
	place
	After duration `yaml:"after" need:"24h" short:"yes" range:"1s..87600h" also:"age" doc:"Time since the generation's birth."`
	Then  text     `yaml:"then" oneof:"replace stop destroy" default:"replace" also:"action" doc:"What happens to the machine."`
}

// idleEntry is the value of idle.
type idleEntry struct {
	place
	After duration `yaml:"after" need:"30m" short:"yes" range:"1s..87600h" also:"age" doc:"Time since the machine was last used."`
	Then  text     `yaml:"then" oneof:"stop replace destroy" default:"stop" also:"action" doc:"What happens to the machine."`
}

// life sets how the machines of a role are replaced, used by hand, and ended.
func (c *converter) life(r *role, m *lab.Machine) {
	e := &r.row.value
	m.Replace = c.replace(r)
	m.OnShell = lab.ShellAllow
	if e.OnShell.set() {
		m.OnShell = lab.Shell(e.OnShell.value)
	}
	m.MaxAge = expiry(e.MaxAge.After, e.MaxAge.Then, lab.ExpiryReplace)
	m.Idle = expiry(e.Idle.After, e.Idle.Then, lab.ExpiryStop)
}

// replace returns how the machines of a role are replaced, defaults filled in.
func (c *converter) replace(r *role) lab.Replace {
	e := &r.row.value.Replace
	out := lab.DefaultReplace
	if e.Strategy.set() {
		out.Strategy = lab.Strategy(e.Strategy.value)
	}
	if e.OnFailure.set() {
		out.OnFailure = lab.OnFailure(e.OnFailure.value)
	}
	if e.Drain.set() {
		out.Drain = e.Drain.value
		if out.Strategy == lab.StopFirst {
			c.add(e.Drain.place, "with the strategy stop-first no connection outlives the old generation; leave drain out, or write strategy: blue-green")
		}
	}
	if e.Keep.set() {
		out.Keep = e.Keep.value
	}
	rolling := out.Strategy == lab.Rolling
	if rolling && !r.replicated() {
		c.add(e.Strategy.place, "the strategy rolling is for replicas; add %q, or write blue-green", "count: 2")
	}
	if u := e.MaxUnavailable; u.set() {
		out.MaxUnavailable = u.value
		count := r.row.value.Count.value
		switch {
		case !rolling:
			c.add(u.place, "max_unavailable is for the strategy rolling only")
		case r.replicated() && u.value > count:
			c.add(u.place, "%d is more than the %d replicas that there are", u.value, count)
		}
	}
	return out
}

func expiry(after duration, then text, usual lab.ExpiryAction) lab.Expiry {
	if !after.set() {
		return lab.Expiry{}
	}
	out := lab.Expiry{After: after.value.Round(time.Millisecond), Then: usual}
	if then.set() {
		out.Then = lab.ExpiryAction(then.value)
	}
	return out
}
