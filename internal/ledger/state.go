// SPDX-License-Identifier: Apache-2.0

package ledger

import (
	"cmp"
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/labfile/lab/internal/lab"
)

// Type says what a record records. Types are never renamed: old ledgers are
// read for ever. Intents are in the present tense, outcomes in the past.
type Type string

// The types of records, with the type of their data.
const (
	LabOpened        Type = "lab.opened"        // Opened
	MachineCreate    Type = "machine.create"    // Create: intent
	MachineReady     Type = "machine.ready"     // Ready
	MachineFailed    Type = "machine.failed"    // Failed
	MachineChanged   Type = "machine.changed"   // Changed: applied in place
	MachineStop      Type = "machine.stop"      // intent
	MachineStopped   Type = "machine.stopped"   //
	MachineStart     Type = "machine.start"     // intent
	MachineExited    Type = "machine.exited"    // Exited: seen by the supervisor
	MachineRestored  Type = "machine.restored"  // Restored: it was not replaced after all
	MachinePromoted  Type = "machine.promoted"  // a generation beside the present one is the present one from now on
	MachineRetired   Type = "machine.retired"   // Retired: it gave way, or never took over, and is kept
	MachineDestroy   Type = "machine.destroy"   // Destroy: intent
	MachineDestroyed Type = "machine.destroyed" //
)

// Opened is the data of LabOpened.
type Opened struct {
	Name     string `json:"name"`
	File     string `json:"file"` // absolute path of the Labfile
	Provider string `json:"provider"`

	Expires time.Duration `json:"expires,omitempty"` // nanoseconds from State.Since until the lab is destroyed; 0 means never
}

// Create is the data of MachineCreate: all that shapes the generation.
type Create struct {
	Spec    Spec       `json:"spec"`
	Address netip.Addr `json:"address"`
	Image   string     `json:"image"` // digest: the key of the last layer, or the box's
	Agent   bool       `json:"agent,omitempty"`
	User    string     `json:"user,omitempty"` // whom the box logs in
	Why     []string   `json:"why,omitempty"`

	Box    string      `json:"box,omitempty"`    // digest of the box; older records lack it, and their image is the box
	Layers []lab.Layer `json:"layers,omitempty"` // what was baked on top of the box

	From     string `json:"from,omitempty"`     // where the box came from, as the Labfile said it
	Rollback int    `json:"rollback,omitempty"` // the generation whose image and spec these are

	Standby bool `json:"standby,omitempty"` // it stands by beside the present one until it is promoted
}

// Ready is the data of MachineReady.
type Ready struct {
	Took  time.Duration `json:"took"` // nanoseconds since the intent
	Ports []Port        `json:"ports,omitempty"`
}

// Failed is the data of MachineFailed.
type Failed struct {
	Stage string `json:"stage"`
	Error string `json:"error"`
}

// Changed is the data of MachineChanged: the spec that holds from now on.
type Changed struct {
	Spec  Spec   `json:"spec"`
	Ports []Port `json:"ports,omitempty"`
}

// Restored is the data of MachineRestored: an earlier generation, which is stopped,
// is the present one again, because the one that was to take its place is undone.
type Restored struct {
	Create Create    `json:"create"`
	Born   time.Time `json:"born"`
	Ready  time.Time `json:"ready"`
	Ports  []Port    `json:"ports,omitempty"`

	Tainted []string `json:"tainted,omitempty"` // it still is
}

// Retired is the data of MachineRetired: a generation that is not the present one is
// kept on purpose, stopped, with its disk and its logs.
type Retired struct {
	Failed bool `json:"failed,omitempty"` // it never became ready
}

// Exited is the data of MachineExited.
type Exited struct {
	Reason string `json:"reason"`
	Detail string `json:"detail,omitempty"`
}

// Destroy is the data of MachineDestroy.
type Destroy struct {
	Why []string `json:"why,omitempty"`
}

// Port is a forward as it was bound.
type Port struct {
	Host  uint16 `json:"host"`
	Guest uint16 `json:"guest"`
}

// Spec is a lab.Machine as the ledger writes it.
type Spec struct {
	Role      string     `json:"role"`
	Box       string     `json:"box"`
	CPUs      int        `json:"cpus"`
	Memory    lab.Bytes  `json:"memory"`
	Disk      lab.Bytes  `json:"disk,omitempty"`
	DependsOn []lab.Name `json:"dependsOn,omitempty"`
	Ports     []Port     `json:"ports,omitempty"`
	Ready     []Check    `json:"ready,omitempty"`
	User      string     `json:"user,omitempty"`
	UserData  string     `json:"userData,omitempty"`
	Tests     []lab.Test `json:"tests,omitempty"` // the Labfile's checks on it
	Life
}

// Check is a lab.Check as the ledger writes it.
type Check struct {
	Kind     lab.CheckKind `json:"kind"`
	Port     uint16        `json:"port,omitempty"`
	Path     string        `json:"path,omitempty"`
	Status   int           `json:"status,omitempty"`
	Command  string        `json:"command,omitempty"`
	Pattern  string        `json:"pattern,omitempty"`
	Timeout  time.Duration `json:"timeout"`
	Interval time.Duration `json:"interval"`
}

// SpecOf returns m as the ledger writes it.
func SpecOf(m lab.Machine) Spec {
	s := Spec{
		Role: m.Role, Box: m.Box, CPUs: m.CPUs, Memory: m.Memory, Disk: m.Disk,
		DependsOn: m.DependsOn, User: m.User, UserData: m.UserData,
	}
	s.Tests = m.Tests
	s.Life = lifeOf(m)
	for _, f := range m.Ports {
		s.Ports = append(s.Ports, Port{f.HostPort, f.GuestPort})
	}
	for _, c := range m.Ready {
		s.Ready = append(s.Ready, Check(c))
	}
	return s
}

// Machine returns the machine that the spec describes.
func (s Spec) Machine(name lab.Name) lab.Machine {
	m := lab.Machine{
		Name: name, Role: s.Role, Box: s.Box, CPUs: s.CPUs, Memory: s.Memory, Disk: s.Disk,
		DependsOn: s.DependsOn, User: s.User, UserData: s.UserData,
	}
	m.Tests = s.Tests
	s.fill(&m)
	for _, p := range s.Ports {
		m.Ports = append(m.Ports, lab.Forward{HostPort: p.Host, GuestPort: p.Guest})
	}
	for _, c := range s.Ready {
		m.Ready = append(m.Ready, lab.Check(c))
	}
	return m
}

// State is what the records add up to.
type State struct {
	Opened   Opened
	Since    time.Time // when the lab was first opened
	Machines map[lab.Name]Machine
}

// Phase says how far a generation's life has come, as far as it was recorded.
type Phase string

// The phases of a generation.
const (
	PhaseCreating   Phase = "creating"   // intended, never heard of again: interrupted, if nobody works on it
	PhaseReady      Phase = "ready"      // became ready
	PhaseFailed     Phase = "failed"     // did not become ready, kept for inspection
	PhaseStopping   Phase = "stopping"   // to be stopped; perhaps half done
	PhaseStopped    Phase = "stopped"    // stopped on purpose
	PhaseExited     Phase = "exited"     // it ended by itself, or was killed
	PhaseStarting   Phase = "starting"   // being started again
	PhaseRetired    Phase = "retired"    // gave way to a later one, stopped, kept
	PhaseDestroying Phase = "destroying" // to be destroyed; perhaps half done
	PhaseGone       Phase = "gone"       // destroyed
)

// Machine is the state of one machine: that of its present generation.
type Machine struct {
	Name       lab.Name
	Generation int
	Last       int // the highest number that a generation ever had
	Phase      Phase
	Create     Create    // with the spec that holds now
	Born       time.Time // when its creation was intended
	Ready      time.Time // when it first became ready
	Ports      []Port    // as bound when it last became ready
	Failed     Failed
	Exited     Exited // how it last ended by itself

	Tainted     []string  // why it is known to be a snowflake; empty if it is not
	Entered     int       // how often somebody went into this generation by hand
	LastEntered time.Time // when, the last time

	// The other generations that were not destroyed. Theirs have none themselves.
	Standby *Machine  // may take over, and if nobody works on it is a leftover; nil if there is none
	Past    []Machine // ascending; what is not retired is a leftover, too
	Retired bool      // of one in Past: it is kept on purpose
}

// Of returns one of the machine's generations, as far as it was not destroyed.
func (m Machine) Of(number int) (Machine, bool) {
	if m.Generation == number && number != 0 {
		return m, true
	}
	if m.Standby != nil && m.Standby.Generation == number {
		return *m.Standby, true
	}
	for _, p := range m.Past {
		if p.Generation == number {
			return p, true
		}
	}
	return Machine{}, false
}

// Fold adds the records up. Records of types it does not know are passed over:
// a newer lab may have written them.
func Fold(records []Record) (State, error) {
	s := State{Machines: map[lab.Name]Machine{}}
	for _, r := range records {
		if err := s.Apply(r); err != nil {
			return s, err
		}
	}
	return s, nil
}

// Apply adds one record to the state.
func (s *State) Apply(r Record) error {
	if r.Type == LabOpened {
		s.Opened = Opened{} // what a record leaves out does not hold on
		if err := json.Unmarshal(r.Data, &s.Opened); err != nil {
			return fmt.Errorf("record %d: %w", r.Seq, err)
		}
		if s.Since.IsZero() {
			s.Since = r.Time
		}
		return nil
	}
	if r.Machine == "" {
		return nil
	}
	m := s.Machines[r.Machine]
	if err := m.fold(r); err != nil {
		return fmt.Errorf("record %d: %w", r.Seq, err)
	}
	s.Machines[r.Machine] = m
	return nil
}

// fold adds a record to the generation that it is about.
func (m *Machine) fold(r Record) error {
	switch r.Type {
	case MachineCreate, MachineRestored, MachinePromoted:
		return m.succeed(r)
	}
	switch i := m.past(r.Generation); {
	case r.Generation == m.Generation:
		return m.apply(r)
	case m.Standby != nil && m.Standby.Generation == r.Generation:
		next := *m.Standby
		err := next.apply(r)
		m.Standby = &next
		if next.Phase == PhaseGone || r.Type == MachineRetired {
			m.Standby = nil
			m.lay(next)
		}
		return err
	case i >= 0:
		m.Past = slices.Clone(m.Past)
		err := m.Past[i].apply(r)
		if m.Past[i].Phase == PhaseGone {
			m.Past = slices.Delete(m.Past, i, i+1)
		}
		return err
	}
	return nil // about a generation that is gone
}

// succeed adds a record that decides which generation is the present one.
func (m *Machine) succeed(r Record) error {
	next, known := m.Of(r.Generation)
	if r.Type == MachinePromoted {
		if !known || r.Generation == m.Generation {
			return nil
		}
		if len(next.Ports) == 0 {
			next.Ports = m.Ports // they pass over with the name
		}
		next.Retired = false
	} else if err := next.apply(r); err != nil {
		return err
	}
	next.Last, next.Standby, next.Past = max(m.Last, r.Generation), nil, nil
	if r.Type == MachineCreate {
		if next.Create.Standby && m.Generation != 0 && m.Phase != PhaseGone {
			m.Last, m.Standby = next.Last, &next
			return nil
		}
		next.Ports = m.Ports // to be asked for again
	}
	before := *m
	*m = next
	m.Standby, m.Past = before.Standby, before.Past
	if m.Standby != nil && m.Standby.Generation == m.Generation {
		m.Standby = nil
	}
	if i := m.past(m.Generation); i >= 0 {
		m.Past = slices.Delete(slices.Clone(m.Past), i, i+1)
	}
	if before.Generation != m.Generation {
		m.lay(before)
	}
	return nil
}

// past returns where in Past a generation is, or -1.
func (m *Machine) past(number int) int {
	return slices.IndexFunc(m.Past, func(p Machine) bool { return p.Generation == number })
}

// lay puts a generation among those of the past, unless it is gone.
func (m *Machine) lay(old Machine) {
	if old.Generation == 0 || old.Phase == PhaseGone {
		return
	}
	old.Standby, old.Past = nil, nil
	m.Past = append(slices.Clone(m.Past), old)
	slices.SortFunc(m.Past, func(a, b Machine) int { return a.Generation - b.Generation })
}

func (m *Machine) apply(r Record) error {
	var into any
	switch r.Type {
	case MachineCreate:
		*m = Machine{Name: r.Machine, Generation: r.Generation, Phase: PhaseCreating, Born: r.Time}
		into = &m.Create
	case MachineRestored:
		var d Restored
		if err := json.Unmarshal(r.Data, &d); err != nil {
			return err
		}
		*m = Machine{
			Name: r.Machine, Generation: r.Generation, Phase: PhaseStopped,
			Create: d.Create, Born: d.Born, Ready: d.Ready, Ports: d.Ports, Tainted: d.Tainted,
		}
	case MachineReady:
		m.Phase = PhaseReady
		m.Failed, m.Exited = Failed{}, Exited{}
		if m.Ready.IsZero() {
			m.Ready = r.Time
		}
		var d Ready
		if err := json.Unmarshal(r.Data, &d); err != nil {
			return err
		}
		m.Ports = d.Ports
	case MachineFailed:
		m.Phase = PhaseFailed
		into = &m.Failed
	case MachineChanged:
		var d Changed
		if err := json.Unmarshal(r.Data, &d); err != nil {
			return err
		}
		m.Create.Spec, m.Ports = d.Spec, d.Ports
	case MachineStop:
		m.Phase = PhaseStopping
	case MachineStopped:
		m.Phase = PhaseStopped
		m.Exited = Exited{}
	case MachineStart:
		m.Phase = PhaseStarting
	case MachineExited:
		switch m.Phase {
		case PhaseReady, PhaseStarting:
			m.Phase = PhaseExited
		case PhaseCreating, PhaseFailed:
		default: // the end that was asked for
			return nil
		}
		into = &m.Exited
	case MachineRetired:
		var d Retired
		if err := json.Unmarshal(r.Data, &d); err != nil {
			return err
		}
		if m.Retired = true; !d.Failed {
			m.Phase = PhaseRetired
		}
	case MachineDestroy:
		m.Phase = PhaseDestroying
	case MachineDestroyed:
		m.Phase = PhaseGone
	case MachineEntered, MachineTainted, MachineUntainted:
		return m.byHand(r)
	}
	if into == nil {
		return nil
	}
	return json.Unmarshal(r.Data, into)
}

// Names returns the machines that are not gone, sorted.
func (s State) Names() []lab.Name {
	var names []lab.Name
	for name, m := range s.Machines {
		if m.Phase != PhaseGone {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

// Summary says in one line, for a person, what the record records.
func (r Record) Summary() string {
	g := lab.Generation{Machine: r.Machine, Number: r.Generation}
	get := func(v any) bool { return json.Unmarshal(r.Data, v) == nil }
	switch r.Type {
	case LabOpened:
		var d Opened
		if get(&d) {
			return fmt.Sprintf("lab %q opened from %s on %s", d.Name, d.File, d.Provider)
		}
	case MachineCreate:
		var d Create
		if get(&d) {
			return because(fmt.Sprintf("%s: creating from %s (%s) at %s", g, d.Spec.Box, Short(d.Image), d.Address), d.Why)
		}
	case MachineReady:
		var d Ready
		if get(&d) {
			return fmt.Sprintf("%s: ready after %s", g, d.Took.Round(10*time.Millisecond))
		}
	case MachineFailed:
		var d Failed
		if get(&d) {
			return fmt.Sprintf("%s: failed (%s): %s", g, d.Stage, d.Error)
		}
	case MachineChanged:
		return fmt.Sprintf("%s: changed in place", g)
	case MachineStop:
		return fmt.Sprintf("%s: stopping", g)
	case MachineStopped:
		return fmt.Sprintf("%s: stopped", g)
	case MachineStart:
		return fmt.Sprintf("%s: starting", g)
	case MachineExited:
		var d Exited
		if get(&d) {
			return strings.TrimSuffix(fmt.Sprintf("%s: exited: %s, %s", g, d.Reason, d.Detail), ", ")
		}
	case MachineDestroy:
		var d Destroy
		if get(&d) {
			return because(fmt.Sprintf("%s: destroying", g), d.Why)
		}
	case MachineRestored:
		return fmt.Sprintf("%s: kept after all, stopped", g)
	case MachinePromoted:
		return fmt.Sprintf("%s: took over", g)
	case MachineRetired:
		var d Retired
		if get(&d) && d.Failed {
			return fmt.Sprintf("%s: kept for inspection, stopped", g)
		}
		return fmt.Sprintf("%s: retired, kept", g)
	case MachineDestroyed:
		return fmt.Sprintf("%s: destroyed", g)
	case MachineEntered, MachineTainted, MachineUntainted, MachineExpired:
		return r.byHandSummary()
	}
	if about := r.volumeSummary(); about != "" {
		return about
	}
	return cmp.Or(r.bakeSummary(), string(r.Type))
}

func because(what string, why []string) string {
	if len(why) == 0 {
		return what
	}
	return what + ": " + strings.Join(why, "; ")
}

// Short shortens a digest for the eye: "sha256:0123456789ab".
func Short(digest string) string {
	if algo, hex, ok := strings.Cut(digest, ":"); ok && len(hex) > 12 {
		return algo + ":" + hex[:12]
	}
	return digest
}
