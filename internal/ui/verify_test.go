// SPDX-License-Identifier: Apache-2.0

package ui

import (
	"bytes"
	"encoding/xml"
	"io"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/verify"
)

// checked is a report with every outcome, and text that means to do harm.
func checked() verify.Report {
	return verify.Report{Took: 2500 * time.Millisecond, Results: []verify.Result{
		{Machine: "db", Name: "port tcp:5432", Kind: lab.TestPort, Subject: "tcp:5432", Outcome: verify.Passed, Attempts: 1, Took: 40 * time.Millisecond},
		{
			Machine: "db", Name: "motd # SKIP", Kind: lab.TestFile, Subject: "/etc/motd", Outcome: verify.Failed, Attempts: 3, Took: 1500 * time.Millisecond, Hint: "put it back",
			Mismatches: []verify.Mismatch{
				{Attribute: "mode", Wanted: `"0644"`, Found: `"0600"`},
				{Attribute: "contents", Wanted: `["<b>"]`, Found: "\x1b[2J]]>"},
			},
		},
		{Machine: "web-1", Name: "run false", Kind: lab.TestRun, Subject: "false", Outcome: verify.Skipped, Reason: "not today"},
		{Machine: "web-1", Name: "run true", Kind: lab.TestRun, Subject: "true", Outcome: verify.Failed, Reason: "machine \"web-1\" is stopped", Attempts: 1},
	}}
}

func TestVerify(t *testing.T) {
	for _, c := range []struct {
		name  string
		print func(io.Writer) error
		want  string
	}{
		{"human", func(w io.Writer) error { return Verify(w, checked(), false) }, `ok       db     port tcp:5432
failed   db     motd # SKIP
                mode: wanted "0644", found "0600"
                contents: wanted ["<b>"], found \x1b[2J]]>
                3 attempts
                hint: put it back
skipped  web-1  run false
                not today
failed   web-1  run true
                machine "web-1" is stopped

4 checks: 1 passed, 2 failed, 1 skipped (2.5s)
`},
		{"nothing", func(w io.Writer) error { return Verify(w, verify.Report{}, false) }, "0 checks: 0 passed (0.0s)\n"},
		{"tap", func(w io.Writer) error { return TAP(w, checked()) }, `TAP version 14
1..4
ok 1 - db: port tcp:5432
  ---
  duration_ms: 40.000
  ...
not ok 2 - db: motd \# SKIP
  ---
  duration_ms: 1500.000
  mismatches:
    - attribute: "mode"
      wanted: "\"0644\""
      found: "\"0600\""
    - attribute: "contents"
      wanted: "[\"\u003cb\u003e\"]"
      found: "\\x1b[2J]]\u003e"
  hint: "put it back"
  attempts: 3
  ...
ok 3 - web-1: run false # SKIP not today
  ---
  duration_ms: 0.000
  ...
not ok 4 - web-1: run true
  ---
  duration_ms: 0.000
  message: "machine \"web-1\" is stopped"
  attempts: 1
  ...
`},
		{"tap of nothing", func(w io.Writer) error { return TAP(w, verify.Report{}) }, "TAP version 14\n1..0 # SKIP there are no checks\n"},
		{"junit", func(w io.Writer) error { return JUnit(w, "shop-1f3a9c2b", checked()) }, `<?xml version="1.0" encoding="UTF-8"?>
<testsuites name="shop-1f3a9c2b" tests="4" failures="2" skipped="1" time="2.500">
  <testsuite name="db" tests="2" failures="1" skipped="0" time="1.540">
    <testcase classname="shop-1f3a9c2b.db" name="port tcp:5432" time="0.040"></testcase>
    <testcase classname="shop-1f3a9c2b.db" name="motd # SKIP" time="1.500">
      <failure message="mode: wanted &#34;0644&#34;, found &#34;0600&#34;; contents: wanted [&#34;&lt;b&gt;&#34;], found \x1b[2J]]&gt;">mode: wanted &#34;0644&#34;, found &#34;0600&#34;&#xA;contents: wanted [&#34;&lt;b&gt;&#34;], found \x1b[2J]]&gt;&#xA;3 attempts&#xA;hint: put it back</failure>
    </testcase>
  </testsuite>
  <testsuite name="web-1" tests="2" failures="1" skipped="1" time="0.000">
    <testcase classname="shop-1f3a9c2b.web-1" name="run false" time="0.000">
      <skipped message="not today"></skipped>
    </testcase>
    <testcase classname="shop-1f3a9c2b.web-1" name="run true" time="0.000">
      <failure message="machine &#34;web-1&#34; is stopped">machine &#34;web-1&#34; is stopped</failure>
    </testcase>
  </testsuite>
</testsuites>
`},
		{"json", func(w io.Writer) error {
			r := checked()
			r.Results = r.Results[3:]
			return JSON(w, NewVerifyJSON("shop-1f3a9c2b", r))
		}, `{
  "lab": "shop-1f3a9c2b",
  "passed": 0,
  "failed": 1,
  "skipped": 0,
  "results": [
    {
      "machine": "web-1",
      "name": "run true",
      "kind": "run",
      "subject": "true",
      "outcome": "failed",
      "reason": "machine \"web-1\" is stopped",
      "attempts": 1,
      "took": 0
    }
  ],
  "took": 2500000000
}
`},
	} {
		var b bytes.Buffer
		if err := c.print(&b); err != nil {
			t.Fatalf("%s: %v", c.name, err)
		}
		if diff := cmp.Diff(c.want, b.String()); diff != "" {
			t.Errorf("%s (-want +got):\n%s", c.name, diff)
		}
	}
}

// What a guest prints must not break the XML, or be in control of a terminal.
func TestJUnitIsXMLWhateverTheGuestSays(t *testing.T) {
	r := checked()
	r.Results[1].Mismatches[0].Found = "\x00\xff</failure>\u202e\ufffe"
	var b bytes.Buffer
	if err := JUnit(&b, "shop-1f3a9c2b", r); err != nil {
		t.Fatal(err)
	}
	var back junitSuites
	if err := xml.Unmarshal(b.Bytes(), &back); err != nil {
		t.Fatalf("%v\n%s", err, b.String())
	}
	if want := `mode: wanted "0644", found \x00\xff</failure>\u202e` + "\ufffd"; !bytes.HasPrefix([]byte(back.Suites[0].Cases[1].Failure.Text), []byte(want)) {
		t.Errorf("got %q, want it to begin with %q", back.Suites[0].Cases[1].Failure.Text, want)
	}
}
