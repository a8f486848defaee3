// SPDX-License-Identifier: Apache-2.0

package cli_test

import (
	"encoding/xml"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// cases reads a JUnit report: "web/ready ok", "web/run false failed".
func (d *desk) cases(file string) []string {
	d.t.Helper()
	text, err := os.ReadFile(filepath.Join(d.folder, file))
	must(d.t, err)
	var suites struct {
		Suites []struct {
			Name  string `xml:"name,attr"`
			Cases []struct {
				Name    string    `xml:"name,attr"`
				Failure *struct{} `xml:"failure"`
			} `xml:"testcase"`
		} `xml:"testsuite"`
	}
	must(d.t, xml.Unmarshal(text, &suites))
	var all []string
	for _, s := range suites.Suites {
		for _, c := range s.Cases {
			word := " ok"
			if c.Failure != nil {
				word = " failed"
			}
			all = append(all, s.Name+"/"+c.Name+word)
		}
	}
	return all
}

// The report is there whatever failed, and tells of every machine.
func TestUpReports(t *testing.T) {
	d := newAnsweringDesk(t, answeringLab+"  n:\n    box: own\n    depends_on: [m]\n  o: {box: own}\nchecks: [{run: exit 1, on: m}, {run: exit 0}]\n")
	defer func() { _, _, _ = d.run("destroy", "--yes") }()
	wants := func(file string, want ...string) {
		t.Helper()
		if diff := cmp.Diff(want, d.cases(file)); diff != "" {
			t.Errorf("%s: %s", file, diff)
		}
	}
	if code, out, errOut := d.run("up", "--junit", "a.xml", "-q"); code != 1 || !strings.Contains(errOut, "m is not ready: 1 of 2 checks failed") {
		t.Fatalf("up: %d\n%s%s", code, out, errOut)
	}
	wants("a.xml", "m/ready ok", "m/run exit 1 failed", "m/run exit 0 ok", "n/ready failed", "n/run exit 0 failed", "o/ready ok", "o/run exit 0 ok")

	// "verify" goes on from there with what is up.
	code, out, _ := d.run("verify")
	for _, want := range []string{"failed   m  run exit 1\n", "ok       m  run exit 0\n", "failed   n  run exit 0\n            n is not up\n", "ok       o  run exit 0\n"} {
		if code != 2 || !strings.Contains(out, want) {
			t.Errorf("verify: %d, want 2 and %q\n%s", code, want, out)
		}
	}

	d.write("Labfile", strings.Replace(answeringLab, "  m:", "  o: {box: own}\n  m:", 1)+"checks: [{run: exit 0}]\n")
	d.ok("up", "--junit", "b.xml", "-q", "--yes")
	wants("b.xml", "o/ready ok", "o/run exit 0 ok", "m/ready ok", "m/run exit 0 ok")

	d.write("Labfile", strings.Replace(answeringLab, "  m:", "  o: {box: own}\n  m:", 1)+"checks: [{run: exit 3}]\n")
	if code, _, errOut := d.run("replace", "m", "--junit", "c.xml", "-q"); code != 1 {
		t.Errorf("replace: %d\n%s", code, errOut)
	}
	wants("c.xml", "m/ready failed", "m/run exit 3 failed")
	if code, _, errOut := d.run("up", "--junit", "no/such/folder.xml", "-q"); code != 3 || !strings.HasPrefix(errOut, "lab: error: there is no folder ") {
		t.Errorf("up: %d, %q", code, errOut)
	}
}
