// SPDX-License-Identifier: Apache-2.0

package plan

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/labfile/lab/internal/lab"
)

// A generation that is what the Labfile asks for is replaced all the same if it is
// tainted or too old, and kept, with a note, if only the rules changed.
func TestPolicies(t *testing.T) {
	is := lab.Machine{
		Name: "web", Role: "web", Box: "base", Replace: lab.DefaultReplace, OnShell: lab.ShellAllow,
		MaxAge: lab.Expiry{After: time.Hour, Then: lab.ExpiryReplace},
	}
	tests := map[string]struct {
		recorded func(*Recorded)
		wanted   func(*lab.Machine)
		action   Action
		reasons  []string
		changes  []string
	}{
		"as wanted": {action: Keep},
		"tainted": {
			recorded: func(r *Recorded) { r.Tainted = []string{"ssh by ann", "by ben"} },
			action:   Replace, reasons: []string{"tainted: ssh by ann; by ben"},
		},
		"expired": {
			recorded: func(r *Recorded) { r.Expired = "it is 2h old, and max_age is 1h" },
			action:   Replace, reasons: []string{"expired: it is 2h old, and max_age is 1h"},
		},
		"both, and not what is wanted": {
			recorded: func(r *Recorded) { r.Tainted, r.Expired = []string{"a"}, "b" },
			wanted:   func(m *lab.Machine) { m.UserData = "x" },
			action:   Replace, reasons: []string{"user_data changed", "tainted: a", "expired: b"},
		},
		"other rules": {
			wanted: func(m *lab.Machine) {
				m.OnShell, m.Replace.Keep = lab.ShellForbid, 7
				m.MaxAge, m.Idle = lab.Expiry{}, lab.Expiry{After: time.Minute, Then: lab.ExpiryStop}
			},
			action: Keep,
			changes: []string{
				"replace changed", "on_shell changed: allow -> forbid", "max_age changed: replace after 1h0m0s -> never",
				"idle changed: never -> stop after 1m0s",
			},
		},
		"the usual rules, left out": {
			wanted: func(m *lab.Machine) { m.OnShell, m.Replace = "", lab.Replace{} },
			action: Keep,
		},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			rec := Recorded{Spec: is, Generation: 1, Image: "sha256:a", Phase: PhaseLived}
			want := is
			if tt.recorded != nil {
				tt.recorded(&rec)
			}
			if tt.wanted != nil {
				tt.wanted(&want)
			}
			p := Make(Input{
				Want: &lab.Lab{Machines: []lab.Machine{want}}, Recorded: map[lab.Name]Recorded{"web": rec},
				Observed: map[lab.Name][]Observed{"web": {{Number: 1, State: Running}}},
			})
			s := p.Steps[0]
			if s.Action != tt.action {
				t.Errorf("got %s, want %s", s.Action, tt.action)
			}
			if diff := cmp.Diff(tt.reasons, s.Reasons); diff != "" {
				t.Error(diff)
			}
			if diff := cmp.Diff(tt.changes, s.Changes); diff != "" {
				t.Error(diff)
			}
		})
	}
}
