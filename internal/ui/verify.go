// SPDX-License-Identifier: Apache-2.0

package ui

import (
	"encoding/json"
	"encoding/xml"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/verify"
)

// Verify prints a report for people.
func Verify(w io.Writer, r verify.Report, color bool) error {
	var b strings.Builder
	var failed []verify.Result
	wide := 0
	for _, result := range r.Results {
		wide = max(wide, width(string(result.Machine)))
	}
	for _, result := range r.Results {
		word, c := "ok", Green
		switch result.Outcome {
		case verify.Failed:
			word, c = "failed", Red
			failed = append(failed, result)
		case verify.Skipped:
			word, c = "skipped", Yellow
		}
		fmt.Fprintf(&b, "%s  %s  %s\n", c.paint(pad(word, len("skipped")), color), pad(string(result.Machine), wide), Clean(result.Name))
		indent := strings.Repeat(" ", len("skipped")+2+wide+2)
		for _, line := range reasons(result) {
			fmt.Fprintf(&b, "%s%s\n", indent, Clean(line))
		}
		if result.Outcome == verify.Failed && result.Hint != "" {
			fmt.Fprintf(&b, "%s%s %s\n", indent, Yellow.paint("hint:", color), Clean(result.Hint))
		}
	}
	if len(r.Results) > 0 {
		b.WriteByte('\n')
	}
	parts := []string{fmt.Sprintf("%d passed", r.Count(verify.Passed))}
	if len(failed) > 0 {
		parts = append(parts, fmt.Sprintf("%d failed", len(failed)))
	}
	if n := r.Count(verify.Skipped); n > 0 {
		parts = append(parts, fmt.Sprintf("%d skipped", n))
	}
	fmt.Fprintf(&b, "%s: %s (%s)\n", Count(len(r.Results), "check"), strings.Join(parts, ", "), Duration(r.Took))
	_, err := io.WriteString(w, b.String())
	return err
}

// reasons are the lines that say what is wrong, or why a check was skipped.
func reasons(r verify.Result) []string {
	var lines []string
	if r.Reason != "" {
		lines = append(lines, r.Reason)
	}
	for _, m := range r.Mismatches {
		lines = append(lines, m.String())
	}
	if r.Outcome == verify.Failed && r.Attempts > 1 {
		lines = append(lines, fmt.Sprintf("%d attempts", r.Attempts))
	}
	return lines
}

// VerifyJSON is the schema of "lab verify --json".
type VerifyJSON struct {
	Lab     lab.ID `json:"lab"`
	Passed  int    `json:"passed"`
	Failed  int    `json:"failed"`
	Skipped int    `json:"skipped"`
	verify.Report
}

// NewVerifyJSON makes a report one for programs.
func NewVerifyJSON(id lab.ID, r verify.Report) VerifyJSON {
	return VerifyJSON{
		Lab: id, Passed: r.Count(verify.Passed), Failed: r.Count(verify.Failed), Skipped: r.Count(verify.Skipped), Report: r,
	}
}

// TAP prints a report as the Test Anything Protocol, version 14 (testanything.org).
// Diagnostics are YAML, whose texts are written as JSON has them.
func TAP(w io.Writer, r verify.Report) error {
	var b strings.Builder
	b.WriteString("TAP version 14\n")
	if len(r.Results) == 0 {
		b.WriteString("1..0 # SKIP there are no checks\n")
		_, err := io.WriteString(w, b.String())
		return err
	}
	fmt.Fprintf(&b, "1..%d\n", len(r.Results))
	for i, result := range r.Results {
		word := "ok"
		if result.Outcome == verify.Failed {
			word = "not ok"
		}
		fmt.Fprintf(&b, "%s %d - %s", word, i+1, tapText(string(result.Machine)+": "+result.Name))
		if result.Outcome == verify.Skipped {
			b.WriteString(" # SKIP " + tapText(result.Reason))
		}
		b.WriteByte('\n')
		b.WriteString("  ---\n")
		fmt.Fprintf(&b, "  duration_ms: %s\n", strconv.FormatFloat(float64(result.Took)/float64(time.Millisecond), 'f', 3, 64))
		if result.Outcome == verify.Failed {
			if result.Reason != "" {
				fmt.Fprintf(&b, "  message: %s\n", quoted(result.Reason))
			}
			if len(result.Mismatches) > 0 {
				b.WriteString("  mismatches:\n")
			}
			for _, m := range result.Mismatches {
				fmt.Fprintf(&b, "    - attribute: %s\n      wanted: %s\n      found: %s\n", quoted(m.Attribute), quoted(m.Wanted), quoted(m.Found))
			}
			if result.Hint != "" {
				fmt.Fprintf(&b, "  hint: %s\n", quoted(result.Hint))
			}
			fmt.Fprintf(&b, "  attempts: %d\n", result.Attempts)
		}
		b.WriteString("  ...\n")
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// tapText is text in a line of TAP, in which # begins a directive.
func tapText(s string) string {
	return strings.NewReplacer(`\`, `\\`, "#", `\#`).Replace(Clean(s))
}

// quoted is text as JSON has it, which is YAML, too.
func quoted(s string) string {
	q, err := json.Marshal(CleanLines(s))
	if err != nil {
		return `""` // no string fails
	}
	return string(q)
}

// The form of JUnit reports that CI servers read
// (https://github.com/testmoapp/junitxml).
type (
	junitSuites struct {
		XMLName  xml.Name     `xml:"testsuites"`
		Name     string       `xml:"name,attr"`
		Tests    int          `xml:"tests,attr"`
		Failures int          `xml:"failures,attr"`
		Skipped  int          `xml:"skipped,attr"`
		Time     string       `xml:"time,attr"` // seconds
		Suites   []junitSuite `xml:"testsuite"`
	}
	junitSuite struct {
		Name     string      `xml:"name,attr"`
		Tests    int         `xml:"tests,attr"`
		Failures int         `xml:"failures,attr"`
		Skipped  int         `xml:"skipped,attr"`
		Time     string      `xml:"time,attr"` // seconds, of its checks together
		Cases    []junitCase `xml:"testcase"`
	}
	junitCase struct {
		Class   string     `xml:"classname,attr"`
		Name    string     `xml:"name,attr"`
		Time    string     `xml:"time,attr"` // seconds
		Failure *junitNote `xml:"failure"`
		Skipped *junitNote `xml:"skipped"`
	}
	junitNote struct {
		Message string `xml:"message,attr"`
		Text    string `xml:",chardata"`
	}
)

// JUnit prints a report as JUnit's XML, a suite per machine.
func JUnit(w io.Writer, id lab.ID, r verify.Report) error {
	all := junitSuites{
		Name: string(id), Tests: len(r.Results), Failures: r.Count(verify.Failed),
		Skipped: r.Count(verify.Skipped), Time: seconds(r.Took),
	}
	for rest := r.Results; len(rest) > 0; {
		n := 0
		for n < len(rest) && rest[n].Machine == rest[0].Machine {
			n++
		}
		all.Suites = append(all.Suites, junitSuiteOf(id, verify.Report{Results: rest[:n]}))
		rest = rest[n:]
	}
	text, err := xml.MarshalIndent(all, "", "  ")
	if err != nil {
		return fmt.Errorf("writing the report as XML: %w", err)
	}
	_, err = io.WriteString(w, xml.Header+string(text)+"\n")
	return err
}

func junitSuiteOf(id lab.ID, r verify.Report) junitSuite {
	suite := junitSuite{
		Name: string(r.Results[0].Machine), Tests: len(r.Results),
		Failures: r.Count(verify.Failed), Skipped: r.Count(verify.Skipped),
	}
	var took time.Duration
	for _, result := range r.Results {
		took += result.Took
		c := junitCase{Class: string(id) + "." + suite.Name, Name: Clean(result.Name), Time: seconds(result.Took)}
		switch result.Outcome {
		case verify.Failed:
			lines := reasons(result)
			if result.Hint != "" {
				lines = append(lines, "hint: "+result.Hint)
			}
			c.Failure = &junitNote{Message: Clean(result.Why()), Text: CleanLines(strings.Join(lines, "\n"))}
		case verify.Skipped:
			c.Skipped = &junitNote{Message: Clean(result.Reason)}
		}
		suite.Cases = append(suite.Cases, c)
	}
	suite.Time = seconds(took)
	return suite
}

func seconds(d time.Duration) string { return strconv.FormatFloat(d.Seconds(), 'f', 3, 64) }
