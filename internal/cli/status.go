// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/labfile/lab/internal/engine"
	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/ledger"
	"github.com/labfile/lab/internal/ui"
)

func (a *app) statusCommand() *command {
	return &command{
		name: "status", aliases: []string{"ps"}, group: groupDaily, lab: true, reports: true,
		short: "show the lab's machines",
		long: `Shows what there is, from live facts. It never waits for another command, and
brings the lab's supervisor back if that died. If only instances with a --name are up
from the Labfile, it lists those. A narrow terminal gets fewer columns; --json has all.`,
		examples: []string{
			"lab status", "the lab of this folder",
			"lab status --json | jq '.machines[].address'", "for a script",
		},
		run: func(ctx context.Context, _ request) error {
			want, l, err := a.existingAnd(ctx)
			if err != nil {
				return err
			}
			st, err := l.Status(ctx)
			if errors.Is(err, engine.ErrNoLab) && !a.asJSON {
				if others := a.named(); len(others) > 0 {
					if err := ui.Labs(a.Out, others, a.ui.OutPage()); err != nil {
						return err
					}
				}
			}
			if err != nil {
				return err
			}
			a.inOrder(&st, want)
			missing := absent(want, st)
			if a.asJSON {
				return ui.JSON(a.Out, statusJSON{st, missing})
			}
			if err := a.printStatus(st); err != nil {
				return err
			}
			if len(missing) > 0 {
				a.ui.Note("not up: %s (%q creates what is missing)", ui.Names(missing), a.say("up"))
			}
			return nil
		},
	}
}

// inOrder puts the machines into the order of the Labfile: of want or, if that is nil, of
// the one that the lab was made from, if it can still be read. Others come behind, by
// name and number.
func (a *app) inOrder(st *engine.Status, want *lab.Lab) {
	if want == nil && st.Labfile != "" {
		want, _ = a.load(st.Labfile) // its trouble is not what was asked about
	}
	place := map[lab.Name]int{}
	if want != nil {
		for i, m := range want.Machines {
			place[m.Name] = i - len(want.Machines)
		}
	}
	slices.SortStableFunc(st.Machines, func(x, y engine.MachineStatus) int {
		if c := place[x.Name] - place[y.Name]; c != 0 {
			return c
		}
		return natural(string(x.Name), string(y.Name))
	})
}

// natural compares names as people order them: "web-2" before "web-10".
func natural(x, y string) int {
	i, j := strings.LastIndexByte(x, '-')+1, strings.LastIndexByte(y, '-')+1
	m, merr := strconv.Atoi(x[i:])
	n, nerr := strconv.Atoi(y[j:])
	if x[:i] == y[:j] && merr == nil && nerr == nil && m != n {
		return m - n
	}
	return strings.Compare(x, y)
}

// statusJSON is the schema of "lab status --json".
type statusJSON struct {
	engine.Status
	Absent []lab.Name `json:"absent,omitempty"` // the Labfile has them, the lab has not
}

// absent returns the machines of the Labfile that the lab does not have. want may
// be nil.
func absent(want *lab.Lab, st engine.Status) []lab.Name {
	if want == nil {
		return nil
	}
	there := map[lab.Name]bool{}
	for _, m := range st.Machines {
		there[m.Name] = true
	}
	var names []lab.Name
	for _, m := range want.Machines {
		if !there[m.Name] {
			names = append(names, m.Name)
		}
	}
	return names
}

// listJSON is the schema of "lab list --json".
type listJSON struct {
	Labs []engine.Summary `json:"labs"`
}

func (a *app) listCommand() *command {
	return &command{
		name: "list", aliases: []string{"ls"}, group: groupLook, reports: true,
		short: "list all your labs",
		long:  `Lists every lab of this user, wherever its Labfile is, from live facts.`,
		examples: []string{
			"lab list", "all labs",
			"lab status --lab ID", "a closer look at one of them",
		},
		run: func(ctx context.Context, _ request) error {
			h, err := a.host()
			if err != nil {
				return err
			}
			labs, err := h.List(ctx)
			if err != nil {
				return err
			}
			if a.asJSON {
				if labs == nil {
					labs = []engine.Summary{}
				}
				return ui.JSON(a.Out, listJSON{labs})
			}
			return ui.Labs(a.Out, labs, a.ui.OutPage())
		},
	}
}

// historyJSON is the schema of "lab history --json".
type historyJSON struct {
	Records     []ledger.Record     `json:"records"`
	Generations []ledger.Generation `json:"generations"`
}

func (a *app) historyCommand() *command {
	return &command{
		name: "history", group: groupLook, args: "[MACHINE]", max: 1, lab: true, reports: true,
		short: "show what happened to the lab",
		long: `Prints the lab's ledger, the record of everything that was done to it, oldest first;
for one machine also its generations. "lab show MACHINE@N" shows one of those.`,
		complete: a.completeMachines,
		examples: []string{
			"lab history", "of the whole lab",
			"lab history web", "of one machine",
		},
		run: func(ctx context.Context, r request) error {
			l, name, err := a.one(ctx, r)
			if err != nil {
				return err
			}
			all, err := l.History()
			if err != nil {
				return err
			}
			records := []ledger.Record{}
			for _, rec := range all {
				if name == "" || rec.Machine == name {
					records = append(records, rec)
				}
			}
			generations, err := l.Generations(name)
			if err != nil {
				return err
			}
			if a.asJSON {
				return ui.JSON(a.Out, historyJSON{records, generations})
			}
			if name != "" {
				if err := ui.Generations(a.Out, generations, time.Now(), a.ui.OutPage()); err != nil {
					return err
				}
				fmt.Fprintln(a.Out)
			}
			return ui.History(a.Out, records, a.ui.OutPage())
		},
	}
}
