// SPDX-License-Identifier: Apache-2.0

//go:build e2e

package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// served is a Labfile of machines whose own web server must answer.
func served(lab, machine string) string {
	return "lab: " + lab + `
machines:
  web:
    box: builtin/tiny
    ready: [{http: {port: 80, path: /, timeout: 1m}}]
` + machine
}

const blueGreen = `    ports: ["0:80"]
    replace: {strategy: blue-green, drain: 2s}
`

// exists lists the generations of a machine that are on disk.
func (s *site) exists(machine string) string {
	s.Helper()
	dirs, err := os.ReadDir(filepath.Join(s.machines(), machine))
	if err != nil {
		s.Fatal(err)
	}
	var names []string
	for _, d := range dirs {
		names = append(names, d.Name())
	}
	return strings.Join(names, " ")
}

// machines counts the machines of the lab that run.
func (s *site) running() int {
	s.Helper()
	n := 0
	for _, p := range s.mine() {
		if p.is("qemu-system") {
			n++
		}
	}
	return n
}

// TestBlueGreen replaces a machine under load, refuses a broken one, and presses
// Ctrl-C and worse in between; no request through the forwarded port is lost.
func TestBlueGreen(t *testing.T) {
	eachUser(t, func(t *testing.T, w *world) {
		s := w.site(t, served("bg", blueGreen))
		s.ok("up")
		h := newHammer("/", s.machine("web").Ports[0].Host)
		defer h.stop()
		s.ok("replace", "web")
		s.equal("generation", fmt.Sprint(s.machine("web").Generation), "2")
		s.equal("on disk", s.exists("web"), "1 2")
		s.equal("running", fmt.Sprint(s.running()), "1")

		good, err := os.ReadFile(filepath.Join(s.dir, "Labfile"))
		if err != nil {
			t.Fatal(err)
		}
		s.write("Labfile", string(good)+`    memory: 160MiB
checks:
  - {on: web, run: "test -e /no/such/file", retries: 0}
`)
		r := s.fails(1, []string{"generation 3 did not take over", "generation 2 stays", "logs web@3"}, "up", "--yes")
		if !strings.Contains(r.stderr, "1 of 1 checks failed") {
			t.Errorf("the reason is not told: %s", r)
		}
		s.equal("generation", fmt.Sprint(s.machine("web").Generation), "2")
		s.equal("running", fmt.Sprint(s.running()), "1")
		if log := s.ok("logs", "web@3"); !strings.Contains(log, "activate this console") {
			t.Errorf("the log of what failed is %q", log)
		}
		s.write("Labfile", string(good))
		s.equal("plan", fmt.Sprint(s.lab("plan").code), "0")

		for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGKILL} {
			for _, after := range []time.Duration{time.Second, 3500 * time.Millisecond} {
				s.interrupted(sig, after, "replace", "web")
				s.ok("up", "--yes")
				s.equal("state", s.machine("web").State, "ready")
				s.equal("running", fmt.Sprint(s.running()), "1")
			}
		}
		answered, failed, first := h.stop()
		if failed > 0 || answered < 10 {
			t.Errorf("%d requests failed, %d were answered: %v", failed, answered, first)
		}
		t.Logf("%d requests answered", answered)
	})
}

// TestRolling replaces two replicas one after the other, and a broken one not at all.
func TestRolling(t *testing.T) {
	s := ordinary(t).site(t, served("roll", `    count: 2
    ports: ["0:80"]
    replace: {strategy: rolling, drain: 1s}
`))
	s.ok("up")
	h := newHammer("/", s.machine("web-1").Ports[0].Host, s.machine("web-2").Ports[0].Host)
	defer h.stop()
	s.ok("replace", "web")
	for _, name := range []string{"web-1", "web-2"} {
		s.equal("generation of "+name, fmt.Sprint(s.machine(name).Generation), "2")
	}
	labfile, err := os.ReadFile(filepath.Join(s.dir, "Labfile"))
	if err != nil {
		t.Fatal(err)
	}
	s.write("Labfile", strings.Replace(string(labfile), "path: /, timeout: 1m}}]", "path: /missing, timeout: 2s}}]\n    memory: 160MiB", 1))
	s.fails(1, []string{"web-1", "not tried", "web-2"}, "up", "--yes")
	for _, name := range []string{"web-1", "web-2"} {
		s.equal("generation of "+name, fmt.Sprint(s.machine(name).Generation), "2")
		s.equal("state of "+name, s.machine(name).State, "ready")
	}
	if answered, failed, first := h.stop(); failed > 0 || answered < 10 {
		t.Errorf("%d requests failed, %d were answered: %v", failed, answered, first)
	}
}

// TestStopFirstFailureGoesBack breaks a machine that is replaced by stop-first: the
// generation before it is started again, with what it had on its disk.
func TestStopFirstFailureGoesBack(t *testing.T) {
	s := ordinary(t).site(t, served("back", ""))
	s.ok("up")
	s.ok("exec", "web", "--", "echo mine > /root/file")
	labfile, err := os.ReadFile(filepath.Join(s.dir, "Labfile"))
	if err != nil {
		t.Fatal(err)
	}
	s.write("Labfile", strings.Replace(string(labfile), "path: /, timeout: 1m}}]", "path: /missing, timeout: 2s}}]\n    memory: 160MiB", 1))
	s.fails(1, []string{"generation 2 did not take over", "generation 1 stays"}, "up", "--yes")
	s.equal("state", s.machine("web").State, "ready")
	s.equal("file", s.ok("exec", "web", "--", "cat /root/file"), "mine\n")
	s.equal("on disk", s.exists("web"), "1 2")
	var all []struct {
		Generation int    `json:"generation"`
		Phase      string `json:"phase"`
	}
	if err := json.Unmarshal([]byte(s.ok("history", "--json", "web")), &all); err == nil {
		t.Logf("history: %+v", all)
	}
}
