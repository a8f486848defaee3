// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/ledger"
	"github.com/labfile/lab/internal/supervise"
	"github.com/labfile/lab/providers"
)

// MachineState is what a machine is doing, in one word.
type MachineState string

// The states of a machine.
const (
	StateReady       MachineState = "ready"
	StateStarting    MachineState = "starting"    // some command works on it
	StateFailed      MachineState = "failed"      // it runs, and never became ready
	StateStopped     MachineState = "stopped"     // on purpose
	StateExited      MachineState = "exited"      // it ended by itself, or was killed
	StateBroken      MachineState = "broken"      // interrupted half-way; "lab up" replaces it
	StatePaused      MachineState = "paused"      // its processors are halted
	StateMissing     MachineState = "missing"     // recorded, but the provider does not have it
	StateUnreachable MachineState = "unreachable" // it runs, and cannot be reached: its sockets are gone
)

// Status is the state of a lab. Its JSON is the schema of "lab status --json".
type Status struct {
	ID         lab.ID          `json:"id"`
	Name       string          `json:"name"`
	Labfile    string          `json:"labfile"`
	Provider   string          `json:"provider"`
	URI        string          `json:"uri,omitempty"`     // of the daemon that the provider talks to
	Supervisor string          `json:"supervisor"`        // "running" or "none"
	Problem    string          `json:"problem,omitempty"` // why the supervisor could not be brought back
	Expires    *time.Time      `json:"expires,omitempty"` // when the lab is destroyed
	Machines   []MachineStatus `json:"machines"`
}

// MachineStatus is the state of a machine: what was recorded, checked against
// what is.
type MachineStatus struct {
	Name       lab.Name      `json:"name"`
	Role       string        `json:"role"`
	Generation int           `json:"generation"`
	State      MachineState  `json:"state"`
	Reason     string        `json:"reason,omitempty"` // why it is not ready, or what was left half done with it
	Box        string        `json:"box"`
	Image      string        `json:"image"` // digest
	Address    string        `json:"address"`
	Direct     string        `json:"direct,omitempty"` // its address where it runs
	Ports      []ledger.Port `json:"ports"`
	User       string        `json:"user"`
	Agent      bool          `json:"agent"`
	PID        int           `json:"pid,omitempty"`
	Accel      string        `json:"accel,omitempty"`
	CPUs       int           `json:"cpus"`
	Memory     lab.Bytes     `json:"memory"`   // bytes
	DiskUsed   lab.Bytes     `json:"diskUsed"` // bytes that its overlay takes on the host
	Written    lab.Bytes     `json:"written"`  // bytes of those that came since its birth: how far it may have drifted
	Born       *time.Time    `json:"born,omitempty"`
	Ready      *time.Time    `json:"ready,omitempty"`   // when it first became ready
	Running    *time.Time    `json:"running,omitempty"` // since when

	Tainted []string `json:"tainted,omitempty"` // why "lab up" replaces it
	Expired string   `json:"expired,omitempty"` // likewise: it is older than its max_age
	Entered int      `json:"entered,omitempty"` // how often somebody went into this generation by hand
}

// Status tells what there is. It takes no lock; if machines run without a
// supervisor, it brings one back first. ErrNoLab if there is no such lab.
func (l *Lab) Status(ctx context.Context) (Status, error) {
	state, seen, err := l.facts(ctx)
	if err != nil {
		return Status{}, err
	}
	problem := ""
	if err := l.recover(ctx, state, seen); err != nil {
		problem = err.Error() // what there is can be told all the same
	}
	st := Status{
		ID: l.id, Name: state.Opened.Name, Labfile: state.Opened.File,
		Provider: orDefault(state.Opened.Provider), URI: state.Opened.URI, Supervisor: "none",
		Machines: []MachineStatus{}, Problem: problem,
	}
	if state.Opened.Expires > 0 {
		st.Expires = moment(state.Since.Add(state.Opened.Expires))
	}
	if supervise.Alive(l.host.Dirs, l.id) {
		st.Supervisor = "running"
	}
	busy := l.locked()
	names := state.Names()
	for name := range seen {
		if !slices.Contains(names, name) {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	for _, name := range names {
		st.Machines = append(st.Machines, machineStatus(name, state.Machines[name], seen[name], busy))
	}
	return st, nil
}

// facts reads the ledger and looks at the machines.
func (l *Lab) facts(ctx context.Context) (ledger.State, map[lab.Name][]providers.Machine, error) {
	state, err := l.read()
	if err != nil {
		return state, nil, err
	}
	p, err := l.host.Provider(state.Opened)
	if err != nil {
		return state, nil, err
	}
	seen, err := observe(ctx, p, l.id)
	if err != nil {
		return state, nil, err
	}
	if !l.book.Exists() && len(seen) == 0 {
		return state, nil, ErrNoLab
	}
	return state, seen, nil
}

func machineStatus(name lab.Name, m ledger.Machine, seen []providers.Machine, busy bool) MachineStatus {
	st := MachineStatus{
		Name: name, Role: m.Create.Spec.Role, Generation: m.Generation, Box: m.Create.Spec.Box,
		Image: m.Create.Image, Ports: m.Ports, User: user(m.Create), Agent: m.Create.Agent,
		CPUs: m.Create.Spec.CPUs, Memory: m.Create.Spec.Memory,
		Born: moment(m.Born), Ready: moment(m.Ready),
		Tainted: m.Tainted, Entered: m.Entered,
		Expired: overdue(m, m.Create.Spec.Machine(name).MaxAge, time.Now()),
	}
	if st.Ports == nil {
		st.Ports = []ledger.Port{}
	}
	if m.Create.Address.IsValid() {
		st.Address = m.Create.Address.String()
	}
	if m.Create.Direct.IsValid() {
		st.Direct = m.Create.Direct.Addr().String()
	}
	i := slices.IndexFunc(seen, func(g providers.Machine) bool { return g.Number == m.Generation })
	var live providers.Machine
	switch {
	case i >= 0:
		live = seen[i]
	case len(seen) > 0 && m.Generation == 0:
		live = seen[len(seen)-1]
		st.Generation, st.State, st.Reason = live.Number, StateBroken, "it was found without a record"
	}
	if live.State != providers.StateRunning && live.State != providers.StatePaused {
		st.Ports = []ledger.Port{} // nobody listens for a machine that does not run
	}
	st.PID, st.Accel, st.DiskUsed, st.Running = live.PID, live.Accel, live.Disk, moment(live.Since)
	st.Written = live.Written
	if st.State == "" {
		st.State, st.Reason = judge(m, i >= 0, live, busy)
	}
	return st
}

// judge weighs the record against the facts.
func judge(m ledger.Machine, there bool, live providers.Machine, busy bool) (MachineState, string) {
	running := there && (live.State == providers.StateRunning || live.State == providers.StatePaused)
	ended := func() (MachineState, string) {
		e := m.Exited
		if e == (ledger.Exited{}) {
			e = ledger.Exited{Reason: string(live.Exit.Reason), Detail: live.Exit.Detail}
		}
		return StateExited, exitText(e)
	}
	switch m.Phase {
	case ledger.PhaseCreating, ledger.PhaseStarting, ledger.PhaseStopping, ledger.PhaseDestroying:
		switch {
		case busy:
			return StateStarting, "a command works on it"
		case m.Phase == ledger.PhaseStopping && running:
			m.Phase = m.StopFrom
			state, why := judge(m, there, live, busy)
			return state, cmp.Or(why, fmt.Sprintf("the command that was to stop it was interrupted, and it still runs; \"lab stop %s\" stops it", m.Name))
		case m.Phase == ledger.PhaseStopping && there && live.State == providers.StateStopped:
			return StateStopped, ""
		}
		return StateBroken, "a command was interrupted; \"lab up\" goes on from here"
	case ledger.PhaseFailed:
		return StateFailed, m.Failed.Error
	}
	if m.Unbooted() { // whatever runs there, it is not what was wanted
		return StateFailed, unbooted
	}
	switch {
	case !there:
		return StateMissing, "the provider does not have it"
	case live.State == providers.StateBroken:
		return StateBroken, live.Reason
	case running && live.Unreachable != "":
		return StateUnreachable, live.Unreachable
	case live.State == providers.StatePaused:
		return StatePaused, live.Reason
	case running:
		return StateReady, ""
	case m.Phase == ledger.PhaseStopped:
		if m.Stopped.Why != "" {
			return StateStopped, stoppedText(m.Stopped)
		}
		return StateStopped, ""
	}
	return ended()
}

func moment(t time.Time) *time.Time {
	if t.IsZero() {
		return nil
	}
	t = t.UTC()
	return &t
}

// Summary is a lab in a list.
type Summary struct {
	ID          lab.ID `json:"id"`
	Name        string `json:"name"`
	Labfile     string `json:"labfile"`
	LabfileGone bool   `json:"labfileGone,omitempty"`
	Provider    string `json:"provider"`
	Machines    int    `json:"machines"`
	Running     int    `json:"running"`
	Ready       int    `json:"ready"`
	Problem     string `json:"problem,omitempty"` // why the rest could not be told

	Volumes []string `json:"volumes,omitempty"` // of a destroyed lab: what is left of it
}

// List returns all labs of this user, sorted by ID. It looks at the machines
// themselves, so it is never stale.
func (h *Host) List(ctx context.Context) ([]Summary, error) {
	ids, err := h.ids(ctx)
	if err != nil {
		return nil, err
	}
	return h.Summaries(ctx, ids)
}

// Summaries is List for some labs; those that do not exist are left out.
func (h *Host) Summaries(ctx context.Context, ids []lab.ID) ([]Summary, error) {
	list := make([]Summary, 0, len(ids))
	for _, id := range ids {
		st, err := h.Lab(id).Status(ctx)
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		if l := h.Lab(id); err != nil && !l.book.Exists() {
			if kept, _ := l.volumes().Names(); len(kept) > 0 { // destroyed, but not its data
				list = append(list, Summary{ID: id, Volumes: kept})
				continue
			}
		}
		if errors.Is(err, ErrNoLab) {
			continue // destroyed while we looked, or rubbish for gc
		}
		s := Summary{ID: id, Name: st.Name, Labfile: st.Labfile, Provider: st.Provider, Machines: len(st.Machines)}
		if err != nil {
			s.Problem = err.Error()
		} else {
			s.Problem = st.Problem
		}
		for _, m := range st.Machines {
			if m.PID != 0 || m.Running != nil {
				s.Running++
			}
			if m.State == StateReady {
				s.Ready++
			}
		}
		if s.Labfile != "" {
			_, err := os.Stat(s.Labfile)
			s.LabfileGone = errors.Is(err, fs.ErrNotExist)
		}
		list = append(list, s)
	}
	return list, nil
}

// ids returns the labs that have files or machines.
func (h *Host) ids(ctx context.Context) ([]lab.ID, error) {
	var ids []lab.ID
	entries, err := os.ReadDir(h.Dirs.Labs())
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	for _, e := range entries {
		if e.IsDir() && lab.ValidLabel(e.Name()) {
			ids = append(ids, lab.ID(e.Name()))
		}
	}
	for _, p := range h.Providers {
		all, err := p.List(ctx, "")
		if err != nil {
			h.Log.Debug("listing machines", "provider", p.Name(), "err", err)
			continue
		}
		for _, m := range all {
			ids = append(ids, m.Lab)
		}
	}
	slices.Sort(ids)
	return slices.Compact(ids), nil
}

// FindByDir returns the labs whose Labfile stood in dir, which may have been moved since:
// for when it is lost.
func (h *Host) FindByDir(dir string) ([]lab.ID, error) {
	entries, err := os.ReadDir(h.Dirs.Labs())
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var ids []lab.ID
	for _, e := range entries {
		l := h.Lab(lab.ID(e.Name()))
		o, ok, err := l.origin()
		if err != nil || !ok || o.File == "" || !l.book.Exists() {
			continue
		}
		if filepath.Dir(o.File) == dir || moved(o, folderOf(filepath.Join(dir, "Labfile"))) {
			ids = append(ids, lab.ID(e.Name()))
		}
	}
	return ids, nil
}

// MachineNames returns the names of the lab's machines; none if there is no lab.
func (l *Lab) MachineNames() []lab.Name {
	state, err := l.read()
	if err != nil {
		return nil
	}
	return state.Names()
}

// Expand returns the machines of the lab that names stand for: a machine, or all
// replicas of a role. Errors: ErrNoLab, *NoMachineError.
func (l *Lab) Expand(names []lab.Name) ([]lab.Name, error) {
	state, err := l.read()
	if err != nil {
		return nil, err
	}
	return (&session{Lab: l, state: state}).choose(names)
}

// One returns the machine that a name stands for: its own, or that of a role with one
// replica. A machine that is gone keeps its name. Errors: *SeveralError, and those of
// reading the ledger.
func (l *Lab) One(name lab.Name) (lab.Name, error) {
	names, err := l.Expand([]lab.Name{name})
	var none *NoMachineError
	switch {
	case errors.As(err, &none), errors.Is(err, ErrNoLab):
		return name, nil
	case err != nil:
		return name, err
	case len(names) > 1 && !slices.Contains(names, name):
		return name, &SeveralError{Role: name, Machines: names}
	case len(names) > 1:
		return name, nil // a machine of that name, and others of a role that is called like it
	}
	return names[0], nil
}

// History returns everything that was recorded, oldest first. With a
// *ledger.CorruptError come the records before the damage.
func (l *Lab) History() ([]ledger.Record, error) {
	if !l.book.Exists() {
		return nil, ErrNoLab
	}
	return l.book.Read()
}
