// SPDX-License-Identifier: Apache-2.0

package plan

import (
	"fmt"
	"slices"

	"github.com/labfile/lab/internal/lab"
)

// NotRunning is why a machine that does not run is replaced by stop-first.
const NotRunning = "there is nothing to hand over: it does not run"

// strategy says how a machine is replaced, and why that is not what the Labfile says.
func strategy(m lab.Machine, runs bool, unreachable string) (lab.Strategy, string) {
	s := m.Replace.Strategy
	if s != lab.BlueGreen && s != lab.Rolling {
		return s, ""
	}
	if !runs {
		return lab.StopFirst, NotRunning
	}
	if unreachable != "" {
		return lab.StopFirst, "there is nothing to hand over: " + unreachable
	}
	for _, v := range m.Volumes {
		if !v.ReadOnly {
			return lab.StopFirst, fmt.Sprintf("volume %s is written by one generation at a time", v.Name)
		}
	}
	return s, ""
}

// pruned returns which of the leftovers gave way and could be kept, but for the number that
// the Labfile keeps.
func (r Recorded) pruned(leftovers []int) []int {
	var beyond []int
	for _, n := range leftovers {
		if slices.Contains(r.Retired, n) || slices.Contains(r.Outgoing, n) {
			beyond = append(beyond, n)
		}
	}
	return beyond
}

// leftovers returns which of the generations that exist are to be removed: those
// that nobody keeps, and those beyond the newest that the Labfile keeps; and which of
// those that are kept have yet to be retired. retiring is one that is about to be kept
// besides; 0 if there is none.
func (r Recorded) leftovers(exist []int, retiring, keep int) (left, retire []int) {
	var kept []int
	for _, n := range exist {
		if n == retiring || slices.Contains(r.Retired, n) || slices.Contains(r.Outgoing, n) {
			kept = append(kept, n)
		}
	}
	slices.Sort(kept)
	kept = kept[max(0, len(kept)-keep):]
	for _, n := range exist {
		switch {
		case !slices.Contains(kept, n) && !slices.Contains(r.Failed, n):
			left = append(left, n)
		case slices.Contains(kept, n) && slices.Contains(r.Outgoing, n):
			retire = append(retire, n)
		}
	}
	slices.Sort(left)
	slices.Sort(retire)
	return left, retire
}
