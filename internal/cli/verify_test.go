// SPDX-License-Identifier: Apache-2.0

package cli_test

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/labfile/lab/internal/engine"
	"github.com/labfile/lab/internal/ui"
)

// Machines in memory let nobody in, so that what can be seen here is everything but
// a check that passes; internal/e2e has those.
func TestVerifyCommand(t *testing.T) {
	d := newDesk(t, shop)
	defer func() { _, _, _ = d.run("destroy", "--yes") }()

	// There is no lab yet.
	code, out, errOut := d.run("verify")
	if code != 1 || out != "" || !strings.HasPrefix(errOut, "lab: error: ") || !strings.Contains(errOut, "lab up") {
		t.Errorf("without a lab: %d, %q, %q", code, out, errOut)
	}

	// There are no checks.
	d.ok("up", "-q")
	code, out, errOut = d.run("verify")
	if code != 0 || steady(out) != "0 checks: 0 passed TIME\n" || !strings.Contains(errOut, "no checks in the Labfile") {
		t.Errorf("without checks: %d, %q, %q", code, out, errOut)
	}

	d.write("Labfile", shop+"checks:\n  - {on: web, port: 80, skip: no ports in memory}\n  - {on: web, run: \"false\", skip: neither}\n")
	code, out, errOut = d.run("verify")
	want := `skipped  web  port tcp:80
              no ports in memory
skipped  web  run false
              neither

2 checks: 0 passed, 2 skipped TIME
`
	if code != 0 || steady(out) != want || errOut != "" {
		t.Errorf("of what is skipped: %d, %q, want\n%s\n%s", code, errOut, want, steady(out))
	}

	// A machine that is down passes nothing.
	d.ok("stop", "web", "--grace", "1s")
	d.write("Labfile", shop+"checks:\n  - {on: web, port: 80, hint: start it}\n  - {on: db, port: 80, skip: x}\n")
	code, out, errOut = d.run("verify", "web", "--json")
	var report ui.VerifyJSON
	if err := json.Unmarshal([]byte(out), &report); err != nil {
		t.Fatalf("%v: %s%s", err, out, errOut)
	}
	if code != 2 || report.Failed != 1 || len(report.Results) != 1 || !strings.Contains(report.Results[0].Reason, `web is stopped`) || report.Results[0].Hint != "start it" {
		t.Errorf("of a machine that is down: %d, %+v", code, report)
	}
	code, out, _ = d.run("verify", "--format", "tap", "-o", "report.tap")
	tap, err := os.ReadFile(filepath.Join(d.folder, "report.tap"))
	if err != nil || code != 2 || !strings.Contains(out, "2 checks: 0 passed, 1 failed, 1 skipped") ||
		!strings.HasPrefix(string(tap), "TAP version 14\n1..2\nok 1 - db: port tcp:80 # SKIP x\n") {
		t.Errorf("to a file: %d, %v\n%s\n%s", code, err, out, tap)
	}

	// Nor does one that is only in the Labfile; without that, what was recorded counts.
	d.ok("destroy", "web", "--yes")
	if code, out, _ = d.run("verify", "web"); code != 2 || !strings.Contains(out, "              web is not up\n") {
		t.Errorf("of a machine that is not there: %d\n%s", code, out)
	}
	var status engine.Status
	if err := json.Unmarshal([]byte(d.ok("status", "--json")), &status); err != nil {
		t.Fatal(err)
	}
	if code, out, _ = d.run("verify", "--lab", string(status.ID)); code != 0 || steady(out) != "0 checks: 0 passed TIME\n" {
		t.Errorf("without the Labfile: %d\n%s", code, out)
	}

	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"verify", "--format", "yaml"}, "lab: error: there is no format \"yaml\"\nlab: hint: the formats are human, json, tap, junit\n"},
		{[]string{"verify", "--json", "--format", "tap"}, "lab: error: --json and --format tap exclude each other\nlab: hint: leave one of them out\n"},
		{[]string{"verify", "wbe"}, "lab: error: there is no machine \"wbe\"\nlab: hint: did you mean \"web\"?\n"},
	} {
		if code, _, errOut := d.run(c.args...); code != 3 || errOut != c.want {
			t.Errorf("%s: %d, %q, want 3, %q", strings.Join(c.args, " "), code, errOut, c.want)
		}
	}
}
