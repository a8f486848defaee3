// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"fmt"
	"strings"

	"github.com/labfile/lab/internal/engine"
	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/ledger"
	"github.com/labfile/lab/internal/plan"
	"github.com/labfile/lab/internal/ui"
)

// lossOf says what a plan takes away: which generations are stopped and kept, and which
// go with their disks, retired ones too. Machines that are replaced because the user
// asked for it count only if a disk is lost. It is empty if there is nothing to ask
// about. stillborn reports that a generation never became ready: such a one is kept to be
// looked at until the next replacement and no longer, so that its end needs no question,
// unless it is what a machine has.
func lossOf(p plan.Plan, asked func(lab.Name) bool, stillborn func(lab.Generation) bool) string {
	var kept, replaced, removed, destroyed []lab.Name
	for _, s := range p.Steps {
		called := func(n int) lab.Name {
			return lab.Name(lab.Generation{Machine: s.Machine, Number: n}.String())
		}
		present := false
		for _, n := range s.Leftovers {
			switch {
			case n == s.Generation && s.Action != plan.Keep:
				present = true
			case stillborn(lab.Generation{Machine: s.Machine, Number: n}):
			case s.Action == plan.Destroy:
				destroyed = append(destroyed, called(n))
			default:
				removed = append(removed, called(n))
			}
		}
		switch {
		case s.Action == plan.Destroy && s.Generation == 0:
			destroyed = append(destroyed, s.Machine)
		case s.Action == plan.Destroy:
			destroyed = append(destroyed, called(s.Generation))
		case s.Action != plan.Replace:
		case present:
			replaced = append(replaced, called(s.Generation))
		case !asked(s.Machine):
			kept = append(kept, called(s.Generation))
		}
	}
	var parts []string
	say := func(names []lab.Name, one, several string) {
		switch len(names) {
		case 0:
		case 1:
			parts = append(parts, fmt.Sprintf("%s %s.", names[0], one))
		default:
			parts = append(parts, fmt.Sprintf("%s %s.", ui.Names(names), several))
		}
	}
	say(kept, "is stopped; its disk is kept", "are stopped; their disks are kept")
	say(replaced, "is replaced; its disk is lost", "are replaced; their disks are lost")
	say(removed, "is removed; its disk is lost", "are removed; their disks are lost")
	say(destroyed, "is destroyed; its disk is lost", "are destroyed; their disks are lost")
	return strings.Join(parts, " ")
}

// stillborn returns what says of a generation that it never became ready. One of which
// nothing is recorded may have been.
func stillborn(l *engine.Lab) func(lab.Generation) bool {
	records, _ := l.History() // without it, too much is asked and nothing is lost unasked
	recorded, ready := map[lab.Generation]bool{}, map[lab.Generation]bool{}
	for _, r := range records {
		g := lab.Generation{Machine: r.Machine, Number: r.Generation}
		switch r.Type {
		case ledger.MachineCreate:
			recorded[g] = true
		case ledger.MachineReady:
			ready[g] = true
		}
	}
	return func(g lab.Generation) bool { return recorded[g] && !ready[g] }
}
