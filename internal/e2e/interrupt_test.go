// SPDX-License-Identifier: Apache-2.0

//go:build e2e

package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// one is a lab of a single small machine.
const one = `lab: one
machines:
  m:
    box: builtin/tiny
`

// moments are the times after a command's start at which it is interrupted:
// from before it has read the Labfile to when the guest boots.
var moments = []time.Duration{
	5 * time.Millisecond, 40 * time.Millisecond, 120 * time.Millisecond,
	350 * time.Millisecond, time.Second, 3 * time.Second,
}

// interrupted runs a command and sends it a signal after a while. The command
// may have been faster; then it must have succeeded.
func (s *site) interrupted(sig syscall.Signal, after time.Duration, args ...string) result {
	s.Helper()
	p := s.start(args...)
	timer := time.AfterFunc(after, func() { _ = p.Process.Signal(sig) })
	defer timer.Stop()
	r := p.end()
	want := 128 + int(sig)
	if r.code != want && r.code != 0 {
		s.Errorf("%s after %s: want exit %d: %s", sig, after, want, r)
	}
	return r
}

// atMostOne checks that what is there of the one machine is there once.
func (s *site) atMostOne() {
	s.Helper()
	machines, supervisors := 0, 0
	for _, p := range s.mine() {
		switch {
		case p.is("qemu-system"):
			machines++
		case p.is("lab"):
			supervisors++
		}
	}
	if machines > 1 || supervisors > 1 {
		s.Errorf("%d machines and %d supervisors: %v", machines, supervisors, s.mine())
	}
}

// settled checks that the lab is whole: one machine, ready, answering, and on disk
// no more than its generation and the two that are kept.
func (s *site) settled() {
	s.Helper()
	s.equal("state", s.machine("m").State, "ready")
	s.equal("exec", s.ok("exec", "m", "--", "hostname"), "m\n")
	s.atMostOne()
	dirs, err := os.ReadDir(filepath.Join(s.w.data(), "labs", string(s.id), "machines", "m"))
	if err != nil || len(dirs) < 1 || len(dirs) > 3 {
		s.Errorf("generations on disk: %v %v", dirs, err)
	}
}

// TestInterrupt presses Ctrl-C at several moments of up, rebuild and destroy.
func TestInterrupt(t *testing.T) {
	eachUser(t, func(t *testing.T, w *world) {
		s := w.site(t, one)
		for _, after := range moments {
			if r := s.interrupted(syscall.SIGINT, after, "up"); r.code == 130 {
				s.nothingLeft()
			} else {
				s.ok("destroy", "--yes")
			}
		}
		s.ok("up")
		s.settled()
		for _, after := range moments {
			s.interrupted(syscall.SIGINT, after, "rebuild", "m")
			s.atMostOne()
			if st := s.lab("status", "--json"); st.code != 0 && !strings.Contains(st.stderr, "no such lab") {
				t.Errorf("status after an interrupted rebuild: %s", st)
			}
		}
		s.ok("up")
		s.settled()
		for _, after := range []time.Duration{5 * time.Millisecond, 30 * time.Millisecond, 80 * time.Millisecond, 200 * time.Millisecond} {
			s.interrupted(syscall.SIGINT, after, "destroy", "--yes")
		}
		if r := s.lab("destroy", "--yes"); r.code != 0 && !strings.Contains(r.stderr, "no such lab") {
			t.Error(r)
		}
		s.nothingLeft()
	})
}

// TestKilled ends lab itself with SIGKILL at several moments; the next command
// goes on from there.
func TestKilled(t *testing.T) {
	eachUser(t, func(t *testing.T, w *world) {
		s := w.site(t, one)
		for i, after := range moments {
			s.interrupted(syscall.SIGKILL, after, "up")
			s.atMostOne()
			if i%2 == 0 { // half of the times, the next command tidies up
				if r := s.lab("destroy", "--yes"); r.code != 0 && !strings.Contains(r.stderr, "no such lab") {
					t.Error(r)
				}
				s.nothingLeft()
				continue
			}
			s.ok("up") // the other half, it goes on
			s.settled()
			s.ok("destroy", "--yes")
			s.nothingLeft()
		}
		s.ok("up")
		for _, after := range moments {
			s.interrupted(syscall.SIGKILL, after, "rebuild", "m")
			s.atMostOne()
			s.ok("status")
		}
		s.ok("up")
		s.settled()
		for _, after := range []time.Duration{5 * time.Millisecond, 30 * time.Millisecond, 80 * time.Millisecond, 200 * time.Millisecond} {
			s.interrupted(syscall.SIGKILL, after, "destroy", "--yes")
		}
		if r := s.lab("destroy", "--yes"); r.code != 0 && !strings.Contains(r.stderr, "no such lab") {
			t.Error(r)
		}
		s.nothingLeft()
	})
}

// TestLost takes away what lab wrote, or what the user wrote.
func TestLost(t *testing.T) {
	eachUser(t, func(t *testing.T, w *world) {
		s := w.site(t, one)
		ledger := filepath.Join(w.data(), "labs", string(s.id), "ledger.jsonl")
		remove := func(path string) {
			t.Helper()
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
		}

		s.ok("up")
		text, err := os.ReadFile(ledger)
		if err != nil {
			t.Fatal(err)
		}
		// A torn last line is dropped.
		tear := func(b []byte) {
			t.Helper()
			if err := os.WriteFile(ledger, b, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		tear(append(text[:len(text):len(text)], `{"seq":99,"ti`...))
		s.equal("state with a torn ledger", s.machine("m").State, "ready")
		s.ok("up")

		// A damaged one is named; destroy works all the same.
		tear([]byte(strings.Replace(string(text), `"seq":2`, `"seq":7`, 1)))
		s.fails(1, []string{"lab: error: ", "ledger", "lab: hint: "}, "status")
		s.ok("destroy", "--yes")
		s.nothingLeft()

		s.ok("up")
		remove(ledger)
		s.lab("status") // says what it can, and does not crash
		s.ok("destroy", "--yes")
		s.nothingLeft()

		// The runtime directory goes with the last logout; the machine is shut down in order.
		s.ok("up")
		s.ok("exec", "m", "--", "echo kept > /root/kept")
		if err := os.RemoveAll(filepath.Join(w.runtime(), string(s.id))); err != nil {
			t.Fatal(err)
		}
		s.equal("state without sockets", s.machine("m").State, "unreachable")
		s.fails(1, []string{`machine "m" runs, but cannot be reached`, "lab stop m && lab start m"}, "exec", "m", "--", "true")
		s.ok("up")
		s.equal("what was written", s.ok("exec", "m", "--", "cat /root/kept"), "kept\n")

		remove(filepath.Join(s.dir, "Labfile"))
		s.equal("list", fmt.Sprint(strings.Contains(s.ok("list"), string(s.id))), "true")
		s.ok("exec", "m", "--", "true")
		s.ok("destroy", "--yes")
		s.gone = true
		s.nothingLeft()
	})
}

// TestNeverReady keeps a machine that does not become ready, and names the log
// to read.
func TestNeverReady(t *testing.T) {
	eachUser(t, func(t *testing.T, w *world) {
		s := w.site(t, one+"    ready: [{port: 4711, timeout: 3s}]\n")
		s.fails(1, []string{"lab: error: ", "m", "port 4711", "3s", "lab: hint: ", "lab logs m"}, "up")
		m := s.machine("m")
		s.equal("state", m.State, "failed")
		if m.PID == 0 {
			t.Errorf("the machine was not kept: %+v", m)
		}
		s.ok("exec", "m", "--", "hostname") // it can be looked at
		s.write("Labfile", one)
		s.ok("up")
		s.equal("state", s.machine("m").State, "ready")
		s.ok("destroy", "--yes")
		s.nothingLeft()

		// One that dies on the way fails at once, not after its deadline.
		s.write("Labfile", one+"    ready: [{exec: poweroff, timeout: 10m}, {port: 4711, timeout: 10m}]\n")
		r := s.fails(1, []string{"it shut itself down"}, "up")
		if r.took > 3*time.Minute {
			t.Errorf("it took %s to see that the machine was off", r.took)
		}
	})
}
