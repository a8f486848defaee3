// SPDX-License-Identifier: Apache-2.0

//go:build e2e

package e2e

import (
	"encoding/json"
	"encoding/xml"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// checkedMachines are a small machine and one like those of the real world.
const checkedMachines = `lab: checked
machines:
  tiny: {box: builtin/tiny, ready: [{port: 22}]} # the agent is there before it
  deb: {box: builtin/debian-12, ready: [ssh]}
`

// passing are checks of every kind that both boxes pass.
const passing = `
  - {run: "echo out; echo err >&2; exit 3", exit-status: 3, stdout: [out, "!err"], stderr: err}
  - {on: tiny, run: "ping -c 1 -W 3 deb >/dev/null || true", hint: "…"}
  - {port: 22, listening: true, ip: {or: ["::", 0.0.0.0]}}
  - {port: udp:99, listening: false}
  - {on: tiny, http: "http://www.example.com/", headers: ["/(?i)^content-type: text/html/"]}
  - {file: /etc/passwd, mode: 0644, owner: root, group: root, filetype: file, size: {gt: 20}, contents: ["/^root:/", "!nobodyatall"]}
  - {file: /etc/nothing, exists: false}
  - {file: /etc/passwd/x, exists: false}
  - {file: /dev/null, filetype: character-device, sha256: e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855}
  - {file: /proc/mounts, filetype: symlink, linked-to: self/mounts}
  - {on: deb, package: openssh-server, versions: [{have-prefix: "1:"}]}
  - {on: deb, package: not-there, installed: false}
  - {on: deb, service: lab-agent, enabled: true, running: true}
  - {on: tiny, service: dropbear, running: true}
  - {process: lab-agent, count: {ge: 1}}
  - {process: not-there, running: false, count: 0}
  - {user: root, uid: 0, gid: 0, home: /root, groups: {consist-of: [root]}}
  - {user: not-there, exists: false}
  - {dns: tiny, addrs: {have-len: 1}}
  - {dns: nowhere.lab.internal, resolvable: false}
`

// failing are checks of every kind that no box passes, each with what must be said
// of it, on tiny.
var failing = []struct{ check, why string }{
	{`{run: "echo out; exit 3", stdout: {equal: x}, hint: look closer}`, `exit-status: wanted "0", found "3"; stdout: wanted equal "x", found "out\n"`},
	{`{run: "sleep 60", timeout: 1s, retries: 1, interval: 10ms}`, "no answer within 1s"},
	{`{port: 81}`, `listening: wanted "true", found "false"`},
	{`{http: "http://localhost:81/"}`, "connection refused"},
	{`{file: /etc/passwd, mode: 0600, owner: lab}`, `mode: wanted "0600", found "0644"; owner: wanted "lab", found "root"`},
	{`{file: /etc/nothing, mode: 0644}`, `mode: wanted "0644", found nothing`},
	{`{on: tiny, package: musl}`, "no package manager of the machine is known"},
	{`{on: deb, package: not-there}`, `installed: wanted "true", found "false"`},
	{`{service: not-there, enabled: true, running: true}`, `enabled: wanted "true", found "false"; running: wanted "true", found "false"`},
	{`{process: not-there}`, `running: wanted "true", found "false"`},
	{`{user: not-there}`, `exists: wanted "true", found "false"`},
	{`{user: root, groups: [wheelies]}`, `groups: wanted ["wheelies"], found ["root"]`},
	{`{dns: nowhere.lab.internal}`, `resolvable: wanted "true", found "false"`},
}

type verifyReport struct {
	Passed, Failed, Skipped int
	Results                 []struct {
		Machine, Name, Outcome, Reason, Hint string
		Attempts                             int
		Mismatches                           []struct{ Attribute, Wanted, Found string }
	}
}

func (s *site) verify(code int, args ...string) verifyReport {
	s.Helper()
	r := s.lab(append([]string{"verify", "--json"}, args...)...)
	var report verifyReport
	if r.code != code || json.Unmarshal([]byte(r.stdout), &report) != nil {
		s.Fatalf("want exit %d: %s", code, r)
	}
	s.Logf("lab verify took %s", r.took)
	return report
}

// TestVerify carries out checks of every kind on real machines: those that hold,
// and those that do not.
func TestVerify(t *testing.T) {
	s := ordinary(t).debian(t).site(t, checkedMachines+"checks:"+passing)

	// Without a lab there is nothing to check.
	s.fails(1, []string{"lab: error: "}, "verify")

	// The machines are born, so they passed.
	s.ok("up")
	report := s.verify(0)
	for _, r := range report.Results {
		if r.Outcome != "passed" {
			t.Errorf("%s: %+v", r.Machine, r)
		}
	}
	if want := 14*2 + 3 + 3; report.Failed != 0 || report.Passed != want {
		t.Errorf("%d passed and %d failed, want %d and none", report.Passed, report.Failed, want)
	}

	// Checks that changed are taken over where the machine stands.
	text := checkedMachines + "checks:\n"
	for _, f := range failing {
		text += "  - " + f.check + "\n"
	}
	text += "  - {run: exit 1, skip: not today}\n"
	s.write("Labfile", text)
	r := s.lab("plan")
	if r.code != 2 || strings.Count(r.stdout, "~ checks changed") != 2 || !strings.Contains(r.stdout, "2 to change in place") {
		t.Errorf("the plan for other checks: %s", r)
	}
	s.ok("up", "--yes")
	s.equal("generation of tiny", fmt.Sprint(s.machine("tiny").Generation), "1")

	report = s.verify(2)
	if report.Passed != 0 || report.Skipped != 2 {
		t.Errorf("%d passed, %d skipped; want 0 and 2: %+v", report.Passed, report.Skipped, report.Results)
	}
	why := map[string][]string{}
	for _, r := range report.Results {
		text := r.Reason
		for i, m := range r.Mismatches {
			if i > 0 {
				text += "; "
			}
			text += m.Attribute + ": wanted " + m.Wanted + ", found " + m.Found
		}
		why[r.Machine] = append(why[r.Machine], text)
		if r.Name == "run sleep 60" && r.Attempts != 2 {
			t.Errorf("%s tried %d times", r.Name, r.Attempts)
		}
	}
	for _, f := range failing {
		machines := []string{"tiny", "deb"}
		for _, m := range []string{"tiny", "deb"} {
			if strings.HasPrefix(f.check, "{on: "+m) {
				machines = []string{m}
			}
		}
		if strings.HasPrefix(f.check, "{run: \"sleep") {
			continue // looked at above; which words it ends with is the same on all
		}
		for _, m := range machines {
			if !strings.Contains(strings.Join(why[m], "\n"), f.why) {
				t.Errorf("%s: nothing says %s:\n%s", m, f.why, strings.Join(why[m], "\n"))
			}
		}
	}

	// The forms of the report.
	r = s.lab("verify", "tiny", "--format", "junit", "--output", "report.xml")
	if r.code != 2 || !strings.Contains(r.stdout, "hint: look closer") {
		t.Errorf("to a file: %s", r)
	}
	b, err := os.ReadFile(filepath.Join(s.dir, "report.xml"))
	if err != nil {
		t.Fatal(err)
	}
	var suites struct {
		Tests    int `xml:"tests,attr"`
		Failures int `xml:"failures,attr"`
	}
	if err := xml.Unmarshal(b, &suites); err != nil || suites.Failures != len(why["tiny"])-1 || suites.Tests != len(why["tiny"]) {
		t.Errorf("%v, %+v:\n%s", err, suites, b)
	}
	r = s.lab("verify", "tiny", "--format", "tap")
	if r.code != 2 || !strings.HasPrefix(r.stdout, "TAP version 14\n1..") || !strings.Contains(r.stdout, "\nnot ok 1 - tiny: run echo out; exit 3\n") {
		t.Errorf("as TAP: %s", r)
	}
	s.fails(3, []string{`there is no machine "tny"`, `did you mean "tiny"?`}, "verify", "tny")
	s.fails(3, []string{`there is no format "yaml"`}, "verify", "--format", "yaml")

	// A machine that is down passes none, and says why.
	s.ok("stop", "tiny")
	report = s.verify(2, "tiny")
	if first := report.Results[0]; report.Passed != 0 || !strings.Contains(first.Reason, `tiny is stopped`) {
		t.Errorf("of a machine that is stopped: %+v", first)
	}
}
