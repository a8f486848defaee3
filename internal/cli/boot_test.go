// SPDX-License-Identifier: Apache-2.0

package cli_test

import (
	"encoding/json"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// plainly is text without times and paths.
func (d *desk) plainly(text string) string {
	text = strings.ReplaceAll(text, d.folder, "DIR")
	return regexp.MustCompile(`\b[0-9.]+(ms|s)\b`).ReplaceAllString(text, "TIME")
}

func TestBootSteps(t *testing.T) {
	d := newAnsweringDesk(t, answeringLab+"    boot:\n      - shell: ./join.sh db\n      - shell: echo second\n")
	defer func() { _, _, _ = d.run("destroy", "--yes") }()
	if code, _, errOut := d.run("validate"); code != 3 || !strings.Contains(d.plainly(errOut), "Labfile:8:16: machines.m.boot[0].shell: there is no script DIR/join.sh; make it, or correct the path") {
		t.Errorf("validate: exit code %d\n%s", code, errOut)
	}
	d.write("join.sh", "echo joined; exit 0\n")
	code, _, errOut := d.run("up")
	want := []string{
		"m: boot step 1 of 2: shell ./join.sh", "m: joined", "m: ran boot step 1 of 2: shell ./join.sh (TIME)",
		"m: boot step 2 of 2: shell echo second", "m: second", "m: ran boot step 2 of 2: shell echo second (TIME)",
	}
	if !strings.Contains(d.plainly(errOut), strings.Join(want, "\n")) || code != 0 {
		t.Errorf("exit code %d, it says\n%s", code, errOut)
	}

	show := d.plainly(d.ok("show", "m"))
	if !regexp.MustCompile(`(?m)^  boot      shell ./join.sh\n            shell echo second\n            [0-9a-f]{12}  ran in TIME$`).MatchString(show) {
		t.Errorf("show says\n%s", show)
	}
	var shown struct {
		Spec struct {
			Boot []struct {
				Kind, Shell, Script, Step, File string
				Args                            []string
				Timeout                         int64
			}
		}
		Boot struct {
			Digest      string
			Steps, Took int64
		}
	}
	if err := json.Unmarshal([]byte(d.ok("show", "m", "--json")), &shown); err != nil {
		t.Fatal(err)
	}
	if b := shown.Spec.Boot; len(b) != 2 || b[0].Script != "./join.sh" || b[0].Args[0] != "db" || b[0].File == "" || b[1].Shell != "echo second" || b[1].Timeout != 600e9 {
		t.Errorf("the steps are %+v", b)
	}
	if b := shown.Boot; b.Digest == "" || b.Steps != 2 || b.Took < 0 {
		t.Errorf("of how they ran it says %+v", b)
	}
	if out := d.plainly(d.ok("history")); !strings.Contains(out, "m@1: ran 2 boot steps in TIME") {
		t.Errorf("history says\n%s", out)
	}

	d.write("join.sh", "echo other\n")
	code, out, _ := d.run("plan")
	if code != 2 || !strings.Contains(out, "boot changed: step 1: file ./join.sh") {
		t.Errorf("plan: exit code %d\n%s", code, out)
	}
}

// TestFailedBootStep is what a user sees of one.
func TestFailedBootStep(t *testing.T) {
	d := newAnsweringDesk(t, answeringLab+"    boot:\n      - shell: echo fine\n      - shell: echo no such peer; exit 7\n  o: {box: own, depends_on: [m]}\n")
	defer func() { _, _, _ = d.run("destroy", "--yes") }()
	code, out, errOut := d.run("-q", "up")
	want := `lab: error: 1 machine failed
  m: DIR/Labfile:9:9: boot step 2 of 2 (shell echo no such peer; exit 7): exit code 7
    | no such peer
  not tried, because of what failed: o
lab: hint: "lab ssh m" logs in, to look at what the step left
lab: hint: "lab logs m" shows what the machine printed, "lab console m" opens its console; the next "lab up" goes on from here
`
	if diff := cmp.Diff(want, d.plainly(errOut)); diff != "" || code != 1 || out != "" {
		t.Errorf("exit code %d, %q\n%s", code, out, diff)
	}
	if code, out, errOut := d.run("plan"); code != 2 || !strings.Contains(strings.Join(strings.Fields(out), " "), "generation 1 never became ready:") {
		t.Errorf("plan: exit code %d\n%s%s", code, out, errOut)
	}
	var status struct {
		Machines []struct{ State, Reason string }
	}
	if err := json.Unmarshal([]byte(d.ok("status", "--json")), &status); err != nil || len(status.Machines) != 1 || status.Machines[0].State != "failed" ||
		!strings.Contains(status.Machines[0].Reason, "boot step 2 of 2") {
		t.Errorf("the state is %+v, %v", status, err)
	}
}

// TestLoginHint is told once, and only where a login may follow it.
func TestLoginHint(t *testing.T) {
	for _, tt := range []struct {
		policy string
		times  int
	}{{"allow", 1}, {"forbid", 0}} {
		t.Run(tt.policy, func(t *testing.T) {
			d := newAnsweringDesk(t, answeringLab+"    on_shell: "+tt.policy+"\n    boot: [{shell: exit 7}]\n  o: {box: own, on_shell: "+tt.policy+", boot: [{shell: exit 7}]}\n")
			defer func() { _, _, _ = d.run("destroy", "--yes") }()
			code, _, errOut := d.run("-q", "up")
			if n := strings.Count(errOut, "logs in, to look at what the step left"); code != 1 || !strings.Contains(errOut, "2 machines failed") || n != tt.times {
				t.Errorf("exit code %d, the hint is there %d times\n%s", code, n, errOut)
			}
		})
	}
}
