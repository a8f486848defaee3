// SPDX-License-Identifier: Apache-2.0

package cli_test

import (
	"encoding/json"
	"strings"
	"testing"
)

const policedLab = `lab: shop
provider: memory
boxes: {base: ./disk.raw}
machines:
  free: {box: base, ready: [{console: lab test disk, timeout: 1m, interval: 10ms}]}
  told: {box: base, on_shell: warn, ready: [{console: lab test disk, timeout: 1m, interval: 10ms}]}
  once: {box: base, on_shell: taint, ready: [{console: lab test disk, timeout: 1m, interval: 10ms}]}
  shut: {box: base, on_shell: forbid, ready: [{console: lab test disk, timeout: 1m, interval: 10ms}]}
`

func TestPoliciesOfTheConsole(t *testing.T) {
	d := newDesk(t, policedLab)
	d.ok("up", "--quiet")
	defer d.ok("destroy", "--yes")
	for _, c := range []struct {
		machine string
		code    int
		says    string // "" for nothing but the console's own
	}{
		{"free", 0, ""},
		{"told", 0, "lab: told: this is recorded (on_shell: warn)"},
		{"once", 0, `lab: once is tainted now (on_shell: taint): the next "lab up" replaces it`},
		{"shut", 1, `lab: error: machine "shut": its Labfile forbids console (on_shell: forbid)`},
	} {
		code, out, errOut := d.run("console", c.machine)
		if code != c.code || !strings.Contains(errOut, c.says) || c.says == "" && errOut != "" {
			t.Errorf("%s: got %d, %q, %q", c.machine, code, out, errOut)
		}
		if c.code != 0 && (out != "" || !strings.Contains(errOut, "lab: hint: ")) {
			t.Errorf("%s: got %q, %q", c.machine, out, errOut)
		}
	}
	for _, command := range [][]string{{"exec", "shut", "--", "id"}, {"exec", "free", "shut", "--", "id"}, {"ssh", "shut"}, {"cp", "x", "shut:/x"}, {"ssh-proxy", "shut"}} {
		if code, out, errOut := d.run(command...); code != 1 || out != "" || !strings.Contains(errOut, "on_shell: forbid") {
			t.Errorf("%q: got %d, %q, %q", command, code, out, errOut)
		}
	}
	code, out, _ := d.run("plan")
	if code != 2 || !strings.Contains(out, "tainted: console by ") || strings.Count(out, "tainted") != 1 {
		t.Errorf("the plan: %d\n%s", code, out)
	}
	history := d.ok("history")
	for _, want := range []string{"free@1: console by ", "told@1: console by ", "once@1: tainted: console by "} {
		if !strings.Contains(history, want) {
			t.Errorf("the history lacks %q:\n%s", want, history)
		}
	}
	if strings.Contains(history, "shut@1: entered") {
		t.Errorf("what was refused was recorded as done:\n%s", history)
	}
}

func TestTaintUntaintAndBurn(t *testing.T) {
	d := newDesk(t, policedLab)
	d.ok("up", "--quiet")
	defer d.ok("destroy", "--yes")
	d.ok("taint", "free", "told", "--why", "tried something")
	if out := d.ok("status"); !strings.Contains(out, "free: tainted: tried something\ntold: tainted: tried something\n") {
		t.Errorf("the status:\n%s", out)
	}
	d.ok("untaint", "told")
	if code, out, _ := d.run("plan"); code != 2 || strings.Count(out, "tainted: tried something") != 1 {
		t.Errorf("the plan: %d\n%s", code, out)
	}
	d.ok("up", "--quiet")
	if code, out, _ := d.run("plan"); code != 0 {
		t.Errorf("the plan after up: %d\n%s", code, out)
	}
	if code, _, errOut := d.run("taint", "nope"); code != 3 || !strings.Contains(errOut, `there is no machine "nope"`) {
		t.Errorf("tainting what is not there: %d, %q", code, errOut)
	}
	d.ok("taint", "free")
	code, _, errOut := d.run("untaint", "free", "told")
	if want := "lab: not tainted any more: free\nlab: told was not tainted\n"; code != 0 || errOut != want {
		t.Errorf("untaint: %d, %q, want 0, %q", code, errOut, want)
	}
	if code, _, errOut := d.run("taint"); code != 3 {
		t.Errorf("tainting nothing: %d, %q", code, errOut)
	}

	if code, _, errOut := d.run("burn"); code != 3 || !strings.Contains(errOut, "lab: hint: add --yes") {
		t.Errorf("burn without a terminal: %d, %q", code, errOut)
	}
	if code, _, errOut := d.run("burn", "--yes", "--every", "-1s"); code != 3 {
		t.Errorf("a drill backwards in time: %d, %q", code, errOut)
	}
	var report struct {
		Rounds, Recovered int
		Burnt             []struct {
			Machine          string
			Generation, Next int
			Recovered        int64
		}
	}
	if err := json.Unmarshal([]byte(d.ok("burn", "free", "shut", "--yes", "--json")), &report); err != nil {
		t.Fatal(err)
	}
	if report.Rounds != 1 || report.Recovered != 2 || len(report.Burnt) != 2 || report.Burnt[0].Machine != "free" ||
		report.Burnt[0].Generation != 2 || report.Burnt[0].Next != 3 || report.Burnt[1].Next != 2 || report.Burnt[0].Recovered <= 0 {
		t.Errorf("got %+v", report)
	}
	if out := d.ok("burn", "--random", "1", "--yes", "told"); !strings.Contains(out, "told     1 -> 2") {
		t.Errorf("the report:\n%s", out)
	}
}
