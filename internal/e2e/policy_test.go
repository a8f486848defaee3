// SPDX-License-Identifier: Apache-2.0

//go:build e2e

package e2e

import (
	"encoding/json"
	"strings"
	"testing"
	"time"
)

const policies = `lab: policies
machines:
  hands:
    box: builtin/tiny
    on_shell: taint
  shut:
    box: builtin/tiny
    on_shell: forbid
  old:
    box: builtin/tiny
    max_age: {after: 1h, then: stop}
`

// TestPolicies logs in where that taints, tries to where it is forbidden, lets a
// machine grow old, and burns.
func TestPolicies(t *testing.T) {
	s := ordinary(t).site(t, policies)
	s.ok("up")
	if p := s.lab("plan"); p.code != 0 {
		t.Errorf("the plan of a new lab: %s", p)
	}

	// A command by hand taints; the plan says why, and up replaces.
	s.ok("exec", "hands", "--", "echo mine > /etc/mine")
	p := s.lab("plan")
	if p.code != 2 || !strings.Contains(p.stdout, "tainted: exec by ") || !strings.Contains(p.stdout, "echo mine > /etc/mine") {
		t.Errorf("the plan for a tainted machine: %s", p)
	}
	s.ok("up")
	if m := s.machine("hands"); m.Generation != 2 || m.State != "ready" {
		t.Errorf("after up: %+v", m)
	}
	s.equal("what was done by hand", s.ok("exec", "hands", "--", "ls /etc/mine 2>/dev/null || echo gone"), "gone\n")

	// Where it is forbidden, nothing is run.
	for _, command := range [][]string{
		{"exec", "shut", "--", "touch /etc/mine"}, {"ssh", "shut", "touch /etc/mine"}, {"console", "shut"}, {"cp", "Labfile", "shut:/etc/mine"},
	} {
		s.fails(1, []string{"on_shell: forbid", "lab: hint: "}, command...)
	}
	if h := s.ok("history"); strings.Contains(h, "shut@1: exec by ") || !strings.Contains(h, "hands@1: exec by ") {
		t.Errorf("the history:\n%s", h)
	}

	// The drill: both come back, as new ones.
	var report struct {
		Recovered int
		Burnt     []struct {
			Machine         string
			Next            int
			Lost, Recovered int64
		}
	}
	if err := json.Unmarshal([]byte(s.ok("burn", "hands", "shut", "--yes", "--json")), &report); err != nil {
		t.Fatal(err)
	}
	if report.Recovered != 2 || report.Burnt[0].Next != 3 || report.Burnt[1].Next != 2 {
		t.Errorf("the report: %+v", report)
	}
	for _, b := range report.Burnt {
		t.Logf("%s came back in %v, %d bytes were lost", b.Machine, time.Duration(b.Recovered).Round(10*time.Millisecond), b.Lost)
	}

	// A machine that is too old is stopped by the lab's supervisor, which records why.
	s.write("Labfile", strings.Replace(policies, "after: 1h", "after: 2s", 1))
	s.ok("up") // it is overdue already: a new one, which will be soon
	s.wait("the old machine is stopped", func() bool { return s.machine("old").State == "stopped" })
	if h := s.ok("history", "old"); !strings.Contains(h, "expired (stop): it is ") {
		t.Errorf("the history of the old machine:\n%s", h)
	}
}
