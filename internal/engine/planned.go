// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/labfile/lab/internal/fsutil"
	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/ledger"
	"github.com/labfile/lab/internal/plan"
)

// plannedVersion is raised when an older program would misread a plan's file.
const plannedVersion = 1

// Planned is a plan that was written down, to be carried out later exactly as it
// is or not at all.
type Planned struct {
	Version  int        `json:"version"`
	Lab      lab.ID     `json:"lab"`
	Labfile  string     `json:"labfile"` // absolute path
	Made     time.Time  `json:"made"`
	Machines []lab.Name `json:"machines,omitempty"` // as they were named; empty for all
	Wanted   string     `json:"wanted"`             // digest of what the machines are to be, and of their images
	Plan     plan.Plan  `json:"plan"`
}

// MovedError says that a plan no longer holds.
type MovedError struct{ Why []string }

// Error implements error.
func (e *MovedError) Error() string {
	return "the plan no longer holds: " + strings.Join(e.Why, "; ")
}

// Hint is the next step.
func (e *MovedError) Hint() string { return "make a new plan, and read it" }

// PlanFor is Plan, in a form that can be kept and given to Up as UpOptions.Exactly.
func (l *Lab) PlanFor(ctx context.Context, want *lab.Lab, o UpOptions) (Planned, error) {
	s := &session{Lab: l, opt: o.Options}
	if err := s.look(ctx, want); err != nil {
		return Planned{}, err
	}
	want, p, images, err := s.plan(ctx, want, o, nil)
	if err != nil {
		return Planned{}, err
	}
	return Planned{
		Version: plannedVersion, Lab: l.id, Labfile: want.File, Made: time.Now().UTC().Round(0),
		Machines: o.Machines, Wanted: wanted(want, images), Plan: p,
	}, nil
}

// Write puts the plan into a file of mode 0600, which is replaced as a whole.
func (p Planned) Write(path string) error {
	text, err := json.MarshalIndent(p, "", "  ")
	if err != nil {
		return fmt.Errorf("writing the plan: %w", err)
	}
	if err := fsutil.WriteFile(path, append(text, '\n'), 0o600); err != nil {
		return fmt.Errorf("writing the plan: %w", err)
	}
	return nil
}

// maxPlanned bounds a plan's file, in bytes.
const maxPlanned = 16 << 20

// ReadPlanned reads what Write wrote.
func ReadPlanned(path string) (Planned, error) {
	fi, err := os.Stat(path)
	if err != nil {
		return Planned{}, fmt.Errorf("reading the plan: %w", err)
	}
	if !fi.Mode().IsRegular() || fi.Size() > maxPlanned {
		return Planned{}, fmt.Errorf("reading the plan: %s is not a file that \"lab plan --out\" wrote", path)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return Planned{}, fmt.Errorf("reading the plan: %w", err)
	}
	var p Planned
	if err := json.Unmarshal(text, &p); err != nil || p.Version == 0 {
		return Planned{}, fmt.Errorf("reading the plan: %s is not a file that \"lab plan --out\" wrote", path)
	}
	if p.Version != plannedVersion {
		return Planned{}, fmt.Errorf("reading the plan: %s has version %d, this lab knows version %d", path, p.Version, plannedVersion)
	}
	return p, nil
}

// holds returns a *MovedError unless now is the plan that was written down, for
// the same machines from the same images.
func (p Planned) holds(id lab.ID, want *lab.Lab, images map[lab.Name]Image, now plan.Plan) error {
	if p.Lab != id {
		return &MovedError{[]string{fmt.Sprintf("it is for lab %s, and this is %s", p.Lab, id)}}
	}
	var why []string
	before := map[lab.Name]plan.Step{}
	for _, s := range p.Plan.Steps {
		before[s.Machine] = s
	}
	for _, s := range now.Steps {
		old, ok := before[s.Machine]
		delete(before, s.Machine)
		switch {
		case !ok:
			why = append(why, fmt.Sprintf("%s: was not in it, and is to %s now", s.Machine, s.Action))
		case old.Action != s.Action:
			why = append(why, fmt.Sprintf("%s: was to %s, and is to %s now", s.Machine, old.Action, s.Action))
		case !same(old, s):
			why = append(why, fmt.Sprintf("%s: the reasons to %s are others now", s.Machine, s.Action))
		}
	}
	for name, s := range before {
		why = append(why, fmt.Sprintf("%s: was to %s, and is not there any more", name, s.Action))
	}
	if len(why) == 0 && p.Wanted != wanted(want, images) {
		why = append(why, "the Labfile or a box has changed")
	}
	if len(why) == 0 {
		return nil
	}
	slices.Sort(why)
	return &MovedError{why}
}

func same(a, b plan.Step) bool {
	a.Undone, b.Undone = "", "" // it has been done by the time that the plan is carried out
	x, errX := json.Marshal(a)
	y, errY := json.Marshal(b)
	return errors.Join(errX, errY) == nil && bytes.Equal(x, y)
}

// wanted is the digest of what the machines are to be. Without it two plans that
// create a machine would look alike, whatever machine that is.
func wanted(want *lab.Lab, images map[lab.Name]Image) string {
	specs, digests := map[lab.Name]string{}, map[lab.Name]string{}
	for _, m := range want.Machines {
		specs[m.Name] = ledger.SpecOf(m).Digest()
	}
	for name, img := range images {
		digests[name] = img.Digest
	}
	text, err := json.Marshal([]any{specs, digests}) // maps are written with sorted keys
	if err != nil {
		panic("digests are strings: " + err.Error())
	}
	return fmt.Sprintf("sha256:%x", sha256.Sum256(text))
}
