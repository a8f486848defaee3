// SPDX-License-Identifier: Apache-2.0

package ledger

import (
	"encoding/json"
	"fmt"
	"strings"

	"github.com/labfile/lab/internal/lab"
)

// The types of records about what people did to a machine by hand, and what follows
// from it.
const (
	MachineEntered   Type = "machine.entered"   // Entered
	MachineTainted   Type = "machine.tainted"   // Tainted
	MachineUntainted Type = "machine.untainted" // Tainted: why it is trusted again
	MachineExpired   Type = "machine.expired"   // Expired: intent; of the whole lab if it names no machine
)

// Entered is the data of MachineEntered: who went into a machine, and what for.
type Entered struct {
	Kind    string   `json:"kind"` // "ssh", "exec", "cp" or "console"
	User    string   `json:"user"` // of this host
	Command []string `json:"command,omitempty"`
}

// String says in a few words who did what: `ssh by ann: uname -a`.
func (e Entered) String() string {
	text := e.Kind + " by " + e.User
	if len(e.Command) == 0 {
		return text
	}
	line := []rune(strings.Join(strings.Fields(strings.Join(e.Command, " ")), " "))
	if len(line) > 60 {
		line = append(line[:60], '…')
	}
	return text + ": " + string(line)
}

// Tainted is the data of MachineTainted and MachineUntainted.
type Tainted struct {
	Why string `json:"why,omitempty"`
}

// Expired is the data of MachineExpired.
type Expired struct {
	Then lab.ExpiryAction `json:"then"`
	Why  string           `json:"why"`
}

// byHand applies a record about what people did.
func (m *Machine) byHand(r Record) error {
	switch r.Type {
	case MachineEntered:
		m.Entered++
		m.LastEntered = r.Time
	case MachineTainted:
		var d Tainted
		if err := json.Unmarshal(r.Data, &d); err != nil {
			return err
		}
		m.Tainted = append(m.Tainted[:len(m.Tainted):len(m.Tainted)], d.Why)
	case MachineUntainted:
		m.Tainted = nil
	}
	return nil
}

// byHandSummary is Summary for such a record.
func (r Record) byHandSummary() string {
	g := lab.Generation{Machine: r.Machine, Number: r.Generation}
	var d Tainted
	switch r.Type {
	case MachineExpired:
		var e Expired
		if json.Unmarshal(r.Data, &e) == nil && r.Machine != "" {
			return fmt.Sprintf("%s: expired (%s): %s", g, e.Then, e.Why)
		} else if r.Machine == "" {
			return fmt.Sprintf("expired (%s): %s", e.Then, e.Why)
		}
	case MachineEntered:
		var e Entered
		if json.Unmarshal(r.Data, &e) == nil {
			return fmt.Sprintf("%s: %s", g, e)
		}
	case MachineTainted:
		if json.Unmarshal(r.Data, &d) == nil {
			return fmt.Sprintf("%s: tainted: %s", g, d.Why)
		}
	case MachineUntainted:
		if json.Unmarshal(r.Data, &d) == nil {
			return strings.TrimSuffix(fmt.Sprintf("%s: no longer tainted: %s", g, d.Why), ": ")
		}
	}
	return string(r.Type)
}
