// SPDX-License-Identifier: Apache-2.0

package ledger

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"slices"
	"time"

	"github.com/labfile/lab/internal/lab"
)

// Generation is one incarnation of a machine as the records tell it, from why it
// was born to how it ended. Its JSON is the schema of "lab show --json".
type Generation struct {
	Machine    lab.Name      `json:"machine"`
	Number     int           `json:"generation"`
	Phase      Phase         `json:"phase"`
	Why        []string      `json:"why"` // it was born
	Command    string        `json:"command,omitempty"`
	Spec       Spec          `json:"spec"`       // that holds now, or held last
	SpecDigest string        `json:"specDigest"` // of Spec
	Image      string        `json:"image"`      // digest of what it was born from
	From       string        `json:"from,omitempty"`
	Layers     []lab.Layer   `json:"layers,omitempty"`   // what was baked on top of the box
	Rollback   int           `json:"rollback,omitempty"` // the generation that it goes back to
	Address    string        `json:"address"`
	Direct     string        `json:"direct,omitempty"` // its address where it runs
	Ports      []Port        `json:"ports"`
	Created    time.Time     `json:"created"`
	Born       *time.Time    `json:"born,omitempty"` // when it first became ready
	Took       time.Duration `json:"took,omitempty"` // nanoseconds from Created to Born
	Boot       *Booted       `json:"boot,omitempty"` // its boot steps have run
	Trouble    string        `json:"trouble,omitempty"`
	Ended      *time.Time    `json:"ended,omitempty"` // when it was destroyed
	End        []string      `json:"end,omitempty"`   // why

	create Create
}

// Create returns the record of its making.
func (g Generation) Create() Create { return g.create }

// String renders the generation as users write it: "web@3".
func (g Generation) String() string {
	return lab.Generation{Machine: g.Machine, Number: g.Number}.String()
}

// Generations returns every generation that a machine ever had, oldest first, or
// those of all machines, sorted by machine, if name is empty.
func Generations(records []Record, name lab.Name) ([]Generation, error) {
	byNumber := map[lab.Generation]*life{}
	var order []lab.Generation
	for _, r := range records {
		if r.Machine == "" || name != "" && r.Machine != name {
			continue
		}
		id := lab.Generation{Machine: r.Machine, Number: r.Generation}
		l := byNumber[id]
		if l == nil {
			l = &life{g: Generation{Machine: r.Machine, Number: r.Generation, Command: r.Command, Created: r.Time}}
			byNumber[id] = l
			order = append(order, id)
		}
		if err := l.apply(r); err != nil {
			return nil, fmt.Errorf("record %d: %w", r.Seq, err)
		}
	}
	slices.SortStableFunc(order, func(a, b lab.Generation) int {
		if a.Machine != b.Machine {
			if a.Machine < b.Machine {
				return -1
			}
			return 1
		}
		return a.Number - b.Number
	})
	state, err := Fold(records)
	if err != nil {
		return nil, err
	}
	all := make([]Generation, 0, len(order))
	for _, id := range order {
		g := byNumber[id].finish()
		if now := state.Machines[id.Machine]; now.Generation == id.Number {
			g.Ports = orEmpty(now.Ports) // what took over has them from the one before
		}
		all = append(all, g)
	}
	return all, nil
}

// life folds the records of one generation. The phases are those of Machine.
type life struct {
	m   Machine
	g   Generation
	end []string
}

func (l *life) apply(r Record) error {
	if err := l.m.apply(r); err != nil {
		return err
	}
	switch r.Type {
	case MachineReady:
		if l.g.Born == nil {
			var d Ready
			if err := json.Unmarshal(r.Data, &d); err != nil {
				return err
			}
			born := r.Time
			l.g.Born, l.g.Took = &born, d.Took
		}
	case MachineDestroy:
		var d Destroy
		if len(r.Data) > 0 {
			if err := json.Unmarshal(r.Data, &d); err != nil {
				return err
			}
		}
		l.end = d.Why
	case MachineDestroyed:
		ended := r.Time
		l.g.Ended, l.g.End = &ended, l.end
	}
	return nil
}

func (l *life) finish() Generation {
	g, c := l.g, l.m.Create
	g.create, g.Phase = c, l.m.Phase
	g.Why, g.Spec, g.SpecDigest = orEmpty(c.Why), c.Spec, c.Spec.Digest()
	g.Image, g.From, g.Layers, g.Rollback = c.Image, c.From, c.Layers, c.Rollback
	if c.Address.IsValid() {
		g.Address = c.Address.String()
	}
	if c.Direct.IsValid() {
		g.Direct = c.Direct.Addr().String()
	}
	g.Ports = orEmpty(l.m.Ports)
	if booted := l.m.Booted; booted.Steps > 0 {
		g.Boot = &booted
	}
	if !l.m.Born.IsZero() {
		g.Created = l.m.Born
	}
	switch {
	case l.m.Failed.Error != "":
		g.Trouble = l.m.Failed.Stage + ": " + l.m.Failed.Error
	case l.m.Exited.Reason != "":
		g.Trouble = l.m.Exited.Reason
		if l.m.Exited.Detail != "" {
			g.Trouble += ": " + l.m.Exited.Detail
		}
	}
	return g
}

func orEmpty[T any](list []T) []T {
	if list == nil {
		return []T{}
	}
	return list
}

// Digest is the SHA-256 of the spec as the ledger writes it: two generations with
// one digest were asked for in the same words.
func (s Spec) Digest() string {
	text, err := json.Marshal(s)
	if err != nil {
		panic("a spec holds strings, numbers and lists only: " + err.Error())
	}
	return fmt.Sprintf("sha256:%x", sha256.Sum256(text))
}
