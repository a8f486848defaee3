// SPDX-License-Identifier: Apache-2.0

package ledger

import (
	"encoding/json"
	"fmt"
	"slices"
	"time"

	"github.com/labfile/lab/internal/lab"
)

// State is what the records add up to.
type State struct {
	Opened   Opened
	Since    time.Time // when the lab was first opened
	Machines map[lab.Name]Machine
	Proxied  bool // its guests got proxy settings, now or before
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
	Booted     Booted    // zero: its boot steps have not run to their end, or it has none
	Ready      time.Time // when it first became ready
	Ports      []Port    // as bound when it last became ready
	Failed     Failed
	Exited     Exited  // how it last ended by itself
	Stopped    Stopped // how it was last stopped
	StopFrom   Phase   // the phase that it was in when it was to be stopped
	Proxied    bool    // proxy settings were written into it

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

// Unbooted reports whether the generation has boot steps that were not run to their end.
// Such a generation never was ready, and cannot become it: they run at the first boot.
func (m Machine) Unbooted() bool {
	return len(m.Create.Spec.Boot) > 0 && m.Ready.IsZero() && m.Booted.Steps == 0
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

// Apply adds one record to the state. The zero State is that of an empty ledger.
func (s *State) Apply(r Record) error {
	if s.Machines == nil {
		s.Machines = map[lab.Name]Machine{}
	}
	if r.Type == LabOpened {
		s.Opened = Opened{} // what a record leaves out does not hold on
		if err := json.Unmarshal(r.Data, &s.Opened); err != nil {
			return fmt.Errorf("record %d: %w", r.Seq, err)
		}
		s.Proxied = s.Proxied || s.Opened.InheritProxy
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
		if m.Generation != r.Generation { // the record alone tells of it
			*m = Machine{
				Name: r.Machine, Generation: r.Generation,
				Create: d.Create, Born: d.Born, Ready: d.Ready, Tainted: d.Tainted,
			}
		}
		// What happened to it since the command looked at it still holds.
		m.Phase, m.Ports, m.Retired = PhaseStopped, d.Ports, false
		m.Failed, m.Exited = Failed{}, Exited{}
	case MachineBooted:
		into = &m.Booted
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
		m.Phase, m.Failed = PhaseFailed, Failed{}
		into = &m.Failed
	case MachineChanged:
		var d Changed
		if err := json.Unmarshal(r.Data, &d); err != nil {
			return err
		}
		m.Create.Spec, m.Ports = d.Spec, d.Ports
	case MachineStop:
		if m.Phase != PhaseStopping {
			m.StopFrom = m.Phase
		}
		m.Phase = PhaseStopping
	case MachineStays:
		if m.Phase == PhaseStopping {
			m.Phase = m.StopFrom
		}
	case MachineStopped:
		m.Phase = PhaseStopped
		m.Exited, m.Stopped = Exited{}, Stopped{}
		if len(r.Data) > 0 {
			into = &m.Stopped
		}
	case MachineProxied:
		var d Proxied
		if err := json.Unmarshal(r.Data, &d); err != nil {
			return err
		}
		m.Proxied = d.Written
	case MachineStart:
		m.Phase = PhaseStarting
	case MachineExited:
		switch m.Phase {
		case PhaseReady, PhaseStarting:
			m.Phase = PhaseExited
		case PhaseCreating, PhaseFailed:
		case PhaseStopping: // the end that was asked for, whether or not anybody waited for it
			m.Phase = PhaseStopped
			return nil
		default:
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
