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

// What never began is reported as well: the file of the run before would say that all is
// well.
func TestUpReportsRefusals(t *testing.T) {
	d := newAnsweringDesk(t, answeringLab+"  o: {box: own}\n")
	defer func() { _, _, _ = d.run("destroy", "--yes") }()
	good, err := os.ReadFile(filepath.Join(d.folder, "Labfile"))
	must(t, err)
	d.ok("up", "-q")
	for name, tc := range map[string]struct {
		labfile string
		args    []string
		want    []string
	}{
		"not asked":    {strings.Replace(string(good), "  o: {box: own}\n", "", 1), nil, []string{"m/ready failed"}},
		"no machine":   {string(good), []string{"none"}, []string{"m/ready failed", "o/ready failed"}},
		"no such box":  {string(good) + "  p: {box: ./none.raw}\n", nil, []string{"m/ready failed", "o/ready failed", "p/ready failed"}},
		"no Labfile":   {"machines: [", nil, []string{"lab/ready failed"}},
		"no such plan": {string(good), []string{"--plan", "none.json"}, []string{"lab/ready failed"}},
	} {
		d.write("Labfile", tc.labfile)
		d.write("a.xml", "<testsuites/>")
		code, _, errOut := d.run(append([]string{"up", "--junit", "a.xml", "-q"}, tc.args...)...)
		if code == 0 {
			t.Errorf("%s: it went well", name)
		}
		if diff := cmp.Diff(tc.want, d.cases("a.xml")); diff != "" {
			t.Errorf("%s: %s\n%s", name, diff, errOut)
		}
		text, err := os.ReadFile(filepath.Join(d.folder, "a.xml"))
		must(t, err)
		if !strings.Contains(string(text), "<failure message=\"") || strings.Contains(string(text), "message=\"\"") {
			t.Errorf("%s: the report does not say why:\n%s", name, text)
		}
	}
}
