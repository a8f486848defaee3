// SPDX-License-Identifier: Apache-2.0

//go:build e2e

package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
)

// shop is a lab of three small machines, one role of them with replicas.
const shop = `lab: shop
machines:
  db:
    box: builtin/tiny
  web:
    box: builtin/tiny
    count: 2
    depends_on: [db]
    ports: ["0:80"]
    ready:
      - exec: ping -c 1 -w 10 db
`

// TestLab goes through the life of a lab, in the order in which a user would.
func TestLab(t *testing.T) {
	eachUser(t, func(t *testing.T, w *world) {
		live(t, w.site(t, shop), life)
	})
}

// step is one of a lab's life.
type step struct {
	name string
	test func(*site)
}

var life = []step{
	{"two ups, one winner", twoUps},
	{"up again", upAgain},
	{"status and list", statusAndList},
	{"exec", execCommands},
	{"cp", cpBothWays},
	{"standstill", standsStill},
	{"names", names},
	{"forwards", forwards},
	{"loopback", loopback},
	{"openssh", openSSH},
	{"logs", logsFollow},
	{"console", console},
	{"stop and start", stopStart},
	{"rebuild", rebuild},
	{"second instance", secondInstance},
	{"supervisor killed", supervisorKilled},
	{"hypervisor killed", hypervisorKilled},
	{"guest powers off", guestPowersOff},
	{"reboot of the host", hostReboots},
	{"history", history},
	{"destroy", destroy},
}

func live(t *testing.T, s *site, steps []step) {
	for i, step := range steps {
		ok := t.Run(step.name, func(t *testing.T) {
			sub := *s
			sub.TB = t
			step.test(&sub)
			s.gone = sub.gone
		})
		if !ok && i == 0 {
			t.FailNow() // no lab, no tests
		}
	}
}

// twoUps starts the lab with two commands at once: one does it, the other says
// who does it.
func twoUps(s *site) {
	a, b := s.start("up"), s.start("up")
	ra, rb := a.end(), b.end()
	if ra.code > rb.code {
		ra, rb = rb, ra
	}
	s.failed(ra, 0, "ready")
	s.failed(rb, 4, "lab: error: ", "is locked", "lab up", "lab: hint: ")
	s.Logf("up took %s", ra.took)
}

func upAgain(s *site) {
	before := s.status()
	s.ok("up")
	after := s.status()
	for i, m := range after.Machines {
		if m.PID != before.Machines[i].PID || m.Generation != 1 {
			s.Errorf("a second up changed %+v to %+v", before.Machines[i], m)
		}
	}
	s.ok("plan") // exit code 0: no differences
	if _, err := os.Stat(filepath.Join(s.dir, "Labfile.lock")); err != nil {
		s.Error(err)
	}
	s.ok("up", "--locked")
}

func statusAndList(s *site) {
	st := s.status()
	s.equal("id", st.ID, string(s.id))
	s.equal("labfile", st.Labfile, filepath.Join(s.dir, "Labfile"))
	s.equal("supervisor", st.Supervisor, "running")
	var names []string
	for _, m := range st.Machines {
		names = append(names, m.Name)
		s.equal("state of "+m.Name, m.State, "ready")
		s.equal("reason of "+m.Name, m.Reason, "")
	}
	s.equal("machines", strings.Join(names, " "), "db web-1 web-2")
	table := s.ok("status")
	for _, text := range append(names, "ready", st.Machines[0].Address) {
		if !strings.Contains(table, text) {
			s.Errorf("lab status lacks %q:\n%s", text, table)
		}
	}
	type summary struct {
		ID       string `json:"id"`
		Machines int    `json:"machines"`
		Running  int    `json:"running"`
		Ready    int    `json:"ready"`
	}
	var list struct {
		Labs []summary `json:"labs"`
	}
	if out := s.ok("list", "--json"); json.Unmarshal([]byte(out), &list) != nil {
		s.Fatalf("lab list --json is not JSON: %q", out)
	}
	if !slices.Contains(list.Labs, summary{string(s.id), 3, 3, 3}) {
		s.Errorf("lab list: %+v", list)
	}
}

func stopStart(s *site) {
	before := s.machine("web-1")
	s.ok("exec", "web-1", "--", "echo kept > /root/file; sync")
	s.ok("stop", "web-1")
	m := s.machine("web-1")
	s.equal("state", m.State, "stopped")
	if m.PID != 0 {
		s.Errorf("a stopped machine has process %d", m.PID)
	}
	s.fails(1, []string{"lab: error: ", "web-1", "is stopped", "lab: hint: "}, "exec", "web-1", "--", "true")
	s.ok("stop", "web-1") // stopping what is stopped succeeds
	s.ok("start", "web-1")
	m = s.machine("web-1")
	s.equal("state", m.State, "ready")
	s.equal("address", m.Address, before.Address)
	s.equal("disk", s.ok("exec", "web-1", "--", "cat /root/file"), "kept\n")
	if m.Generation != 1 {
		s.Errorf("start made generation %d", m.Generation)
	}
}

func rebuild(s *site) {
	before := s.machine("web-1")
	other := s.machine("web-2")
	s.ok("exec", "web-1", "--", "echo gone > /root/file; sync")
	s.ok("rebuild", "web-1")
	m := s.machine("web-1")
	s.equal("state", m.State, "ready")
	s.equal("address", m.Address, before.Address)
	if m.Generation != 2 {
		s.Errorf("rebuild made generation %d", m.Generation)
	}
	if now := s.machine("web-2"); now.PID != other.PID {
		s.Errorf("rebuild of web-1 touched web-2: process %d, then %d", other.PID, now.PID)
	}
	s.equal("disk", s.ok("exec", "web-1", "--", "ls /root/file 2>&1 || true"), "ls: /root/file: No such file or directory\n")
	s.equal("name", s.ok("exec", "web-1", "--", "hostname"), "web-1\n")
	s.pings("web-2", "web-1", s.reached("web-1"))
	old := filepath.Join(s.machines(), "web-1", "1")
	if !s.far {
		old = filepath.Join(old, "disk.qcow2")
	}
	if _, err := os.Stat(old); err != nil {
		s.Errorf("the old generation is not kept: %v", err)
	}
}

func secondInstance(s *site) {
	two := s.second("two")
	two.ok("up", "db")
	st := two.status()
	if len(st.Machines) != 1 || st.Machines[0].Name != "db" || st.Machines[0].State != "ready" {
		s.Errorf("second instance: %+v", st)
	}
	if st.Machines[0].Address == s.machine("db").Address {
		s.Errorf("both instances have a db at %s", st.Machines[0].Address)
	}
	two.ok("exec", "db", "--", "echo two > /root/which")
	s.fails(1, nil, "exec", "db", "--", "cat /root/which")
	two.ok("destroy", "--yes")
	two.gone = true
	two.nothingLeft()
	s.equal("first instance's db", s.machine("db").State, "ready")
	s.equal("exec in it", s.ok("exec", "db", "--", "hostname"), "db\n")
}

func supervisorKilled(s *site) {
	before := s.status()
	s.kill(s.supervisor())
	for _, m := range before.Machines {
		if _, err := os.Stat(fmt.Sprintf("/proc/%d", m.PID)); err != nil {
			s.Errorf("machine %s died with the supervisor", m.Name)
		}
	}
	after := s.status() // any command brings it back
	s.equal("supervisor", after.Supervisor, "running")
	for i, m := range after.Machines {
		s.equal("state of "+m.Name, m.State, "ready")
		if m.PID != before.Machines[i].PID {
			s.Errorf("%s has process %d, had %d", m.Name, m.PID, before.Machines[i].PID)
		}
		if fmt.Sprint(m.Ports) != fmt.Sprint(before.Machines[i].Ports) {
			s.Errorf("%s has ports %v, had %v", m.Name, m.Ports, before.Machines[i].Ports)
		}
	}
	s.equal("exec", s.ok("exec", "web-1", "--", "hostname"), "web-1\n")
	s.pings("web-1", "db", s.reached("db"))

	// The same, met by a command that needs the guest at once.
	s.kill(s.supervisor())
	s.equal("exec", s.ok("exec", "web-2", "--", "hostname"), "web-2\n")
}

func hypervisorKilled(s *site) {
	before := s.machine("web-2")
	s.kill(before.PID)
	s.wait("the death of web-2 is recorded", func() bool { return strings.Contains(s.ok("history"), "killed") })
	m := s.machine("web-2")
	s.equal("state", m.State, "exited")
	if !strings.Contains(m.Reason, "killed from outside") {
		s.Errorf("reason: %q", m.Reason)
	}
	s.fails(2, nil, "plan") // there is something to do
	s.ok("up")
	m = s.machine("web-2")
	s.equal("state", m.State, "ready")
	s.equal("address", m.Address, before.Address)
	s.pings("db", "web-2", s.reached("web-2"))
}

func guestPowersOff(s *site) {
	s.lab("exec", "web-2", "--", "poweroff")
	s.wait("web-2 is off", func() bool { return s.machine("web-2").State == "exited" })
	if m := s.machine("web-2"); !strings.Contains(m.Reason, "shut itself down") {
		s.Errorf("reason: %q", m.Reason)
	}
	s.ok("up", "web-2")
	s.equal("state", s.machine("web-2").State, "ready")
}

// hostReboots ends every process of the lab and its runtime directory, which is
// what a reboot of the host does.
func hostReboots(s *site) {
	before := s.machine("db")
	s.ok("exec", "db", "--", "echo kept > /root/file; sync")
	s.kill(s.supervisor())
	for _, p := range s.processes() {
		// One of a network's two dnsmasqs ends with the other.
		if err := syscall.Kill(p.pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
			s.Fatal(err)
		}
		s.ended(p.pid)
	}
	if left := s.processes(); len(left) > 0 {
		s.Errorf("survived: %v", left)
	}
	if err := os.RemoveAll(s.w.runtime()); err != nil {
		s.Fatal(err)
	}
	st := s.status()
	s.equal("supervisor", st.Supervisor, "none")
	for _, m := range st.Machines {
		s.equal("state of "+m.Name, m.State, "exited")
	}
	s.ok("up")
	m := s.machine("db")
	s.equal("state", m.State, "ready")
	s.equal("address", m.Address, before.Address)
	s.equal("disk", s.ok("exec", "db", "--", "cat /root/file"), "kept\n")
	if m.Generation != before.Generation {
		s.Errorf("generation %d, was %d", m.Generation, before.Generation)
	}
}

func history(s *site) {
	text := s.ok("history")
	for _, want := range []string{"lab up", "lab rebuild web-1", "killed", "web-1", "ready"} {
		if want == "killed" && s.far {
			continue // nothing was
		}
		if !strings.Contains(text, want) {
			s.Errorf("lab history lacks %q:\n%s", want, text)
		}
	}
}

func destroy(s *site) {
	s.fails(3, []string{"--yes"}, "destroy") // no terminal to ask on
	s.ok("destroy", "web-2", "--yes")
	for _, m := range s.status().Machines {
		if m.Name == "web-2" {
			s.Errorf("web-2 is still there: %+v", m)
		}
	}
	r := s.lab("destroy", "--yes")
	if r.code != 0 {
		s.Fatal(r)
	}
	s.Logf("destroy took %s", r.took)
	s.gone = true
	s.nothingLeft()
	s.ok("destroy", "--yes") // destroying what is gone succeeds
	s.fails(1, []string{"no such lab"}, "status")
}
