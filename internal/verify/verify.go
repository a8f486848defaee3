// SPDX-License-Identifier: Apache-2.0

// Package verify finds out whether machines are as a Labfile's checks want them: it
// gathers facts over the lab's own ssh, with nothing installed in the machine, and
// compares them with what is wanted.
package verify

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/labfile/lab/internal/guest"
	"github.com/labfile/lab/internal/lab"
)

// Outcome is how a test ended.
type Outcome string

// The outcomes.
const (
	Passed  Outcome = "passed"
	Failed  Outcome = "failed"
	Skipped Outcome = "skipped" // by the Labfile: Result.Reason says why
)

// Mismatch is an attribute that is not as it should be.
type Mismatch struct {
	Attribute string `json:"attribute"`
	Wanted    string `json:"wanted"`
	Found     string `json:"found"`
}

func (m Mismatch) String() string {
	return fmt.Sprintf("%s: wanted %s, found %s", m.Attribute, m.Wanted, m.Found)
}

// Result is what came of one test on one machine.
type Result struct {
	Machine    lab.Name      `json:"machine"`
	Name       string        `json:"name"` // title
	Kind       lab.TestKind  `json:"kind"`
	Subject    string        `json:"subject"`
	Outcome    Outcome       `json:"outcome"`
	Mismatches []Mismatch    `json:"mismatches,omitempty"`
	Reason     string        `json:"reason,omitempty"` // why nothing could be compared, or why it was skipped
	Hint       string        `json:"hint,omitempty"`   // of the Labfile
	Attempts   int           `json:"attempts"`
	Took       time.Duration `json:"took"` // nanoseconds
}

// Why says in one line what is wrong; empty for what passed.
func (r Result) Why() string {
	var parts []string
	if r.Reason != "" {
		parts = append(parts, r.Reason)
	}
	for _, m := range r.Mismatches {
		parts = append(parts, m.String())
	}
	return strings.Join(parts, "; ")
}

// Report is the results of all tests, by machine and within it in the order of the
// Labfile.
type Report struct {
	Results []Result      `json:"results"`
	Took    time.Duration `json:"took"` // nanoseconds
}

// Count returns how many tests had the outcome.
func (r Report) Count(o Outcome) int {
	n := 0
	for _, result := range r.Results {
		if result.Outcome == o {
			n++
		}
	}
	return n
}

// FailedError says that a machine did not pass its tests.
type FailedError struct {
	Machine lab.Name
	Total   int      // tests that were carried out
	Failed  []Result // never empty
}

// maxTold is how many checks an error tells of.
const maxTold = 3

// Error tells in one line, which is kept as the reason why the machine is not ready.
func (e *FailedError) Error() string {
	var told []string
	for _, r := range e.Failed[:min(len(e.Failed), maxTold)] {
		told = append(told, r.Name+": "+shorten(r.Why()))
	}
	text := fmt.Sprintf("%d of %d checks failed: %s", len(e.Failed), e.Total, strings.Join(told, "; "))
	if more := len(e.Failed) - maxTold; more > 0 {
		text += fmt.Sprintf("; and %d more", more)
	}
	return text
}

// Hint is what the Labfile says to do about what failed.
func (e *FailedError) Hint() string {
	var hints []string
	for _, r := range e.Failed {
		if r.Hint != "" {
			hints = append(hints, r.Name+": "+r.Hint)
		}
	}
	return strings.Join(hints, "\n")
}

// Machine carries tests out on a machine and tells progress, which may be nil, each
// result, one call at a time. It returns all results; nothing to carry out is success.
//
// Errors: *FailedError if a test did not pass, or ctx's cause.
func Machine(ctx context.Context, t guest.Target, tests []lab.Test, progress func(Result)) ([]Result, error) {
	report, err := Run(ctx, []Target{{
		Machine: t.Machine, Tests: tests,
		Open: func(context.Context) (guest.Target, error) { return t, nil },
	}}, progress)
	if err != nil {
		return nil, err
	}
	failed := &FailedError{Machine: t.Machine, Total: len(report.Results) - report.Count(Skipped)}
	for _, r := range report.Results {
		if r.Outcome == Failed {
			failed.Failed = append(failed.Failed, r)
		}
	}
	if len(failed.Failed) > 0 {
		return report.Results, failed
	}
	return report.Results, nil
}

// Target is a machine and its tests.
type Target struct {
	Machine lab.Name
	Tests   []lab.Test
	// Open says how to get into the machine. Its error, such as that the machine
	// does not run, is the reason why every test fails.
	Open func(context.Context) (guest.Target, error)
}

// perMachine is how many tests are carried out at the same time on one machine: an
// ssh server allows ten sessions to a login unless it was told otherwise (OpenSSH,
// MaxSessions), and an emulated processor gains nothing from more.
const perMachine = 4

// Run carries the tests of all machines out, all machines at the same time, and
// tells progress, which may be nil, each result, one call at a time. A test that
// does not pass is a result; the error is ctx's cause.
func Run(ctx context.Context, targets []Target, progress func(Result)) (Report, error) {
	began := time.Now()
	var (
		mu  sync.Mutex
		wg  sync.WaitGroup
		all = make([][]Result, len(targets))
	)
	for i, t := range targets {
		all[i] = make([]Result, len(t.Tests))
		m := &machine{target: t}
		turn := make(chan struct{}, perMachine)
		var own sync.WaitGroup
		for j, test := range t.Tests {
			own.Add(1)
			go func() {
				defer own.Done()
				turn <- struct{}{}
				r := m.test(ctx, test)
				<-turn
				mu.Lock()
				defer mu.Unlock()
				all[i][j] = r
				if progress != nil && ctx.Err() == nil {
					progress(r)
				}
			}()
		}
		wg.Add(1)
		go func() {
			defer wg.Done()
			own.Wait()
			m.close()
		}()
	}
	wg.Wait()
	report := Report{Results: []Result{}, Took: time.Since(began)}
	for _, results := range all {
		report.Results = append(report.Results, results...)
	}
	if ctx.Err() != nil {
		return report, context.Cause(ctx)
	}
	return report, nil
}

// test carries one test out, again and again if it may.
func (m *machine) test(ctx context.Context, t lab.Test) Result {
	began := time.Now()
	r := Result{Machine: m.target.Machine, Name: t.String(), Kind: t.Kind, Subject: t.Subject, Hint: t.Hint}
	if t.Skip != "" {
		r.Outcome, r.Reason = Skipped, t.Skip
		return r
	}
	for r.Attempts <= t.Retries {
		if r.Attempts > 0 {
			select {
			case <-time.After(t.Interval):
			case <-ctx.Done():
			}
		}
		if ctx.Err() != nil {
			r.Outcome, r.Reason = Failed, context.Cause(ctx).Error()
			break
		}
		r.Attempts++
		r.Outcome, r.Reason, r.Mismatches = Passed, "", nil
		facts, err := m.gather(ctx, t)
		if err != nil {
			r.Outcome, r.Reason = Failed, err.Error()
			continue
		}
		if r.Mismatches, err = evaluate(t, facts); err != nil {
			r.Outcome, r.Reason = Failed, err.Error()
			break // the condition will be no better the next time
		}
		if len(r.Mismatches) == 0 {
			break
		}
		r.Outcome = Failed
	}
	r.Took = time.Since(began)
	return r
}

// Facts are the values that were found, by attribute.
type Facts map[string]Fact

// evaluate compares facts with what a test wants of them.
func evaluate(t lab.Test, facts Facts) ([]Mismatch, error) {
	var bad []Mismatch
	for _, w := range t.Want {
		fact, ok := facts[w.Attribute]
		if !ok {
			return nil, fmt.Errorf("a %s has no %q to be checked", t.Kind, w.Attribute)
		}
		ok, err := Match(fact, w.Match)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", w.Attribute, err)
		}
		if !ok {
			bad = append(bad, Mismatch{w.Attribute, w.Match.String(), fact.String()})
		}
	}
	return bad, nil
}

// machine is a target with the one login that its tests share.
type machine struct {
	target Target

	mu     sync.Mutex
	way    *guest.Target
	client *guest.Client
	failed error     // of the last login
	since  time.Time // when that was
}

// loginTime is how long a login may take: under emulation, with all of a lab's
// machines busy, it takes seconds.
const loginTime = time.Minute

// again is how long the failure of a login holds for other tests too.
const again = time.Second

// open returns how to get into the machine.
func (m *machine) open(ctx context.Context) (guest.Target, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.opened(ctx)
}

func (m *machine) opened(ctx context.Context) (guest.Target, error) {
	if m.way == nil {
		t, err := m.target.Open(ctx)
		if err != nil {
			return t, err
		}
		m.way = &t
	}
	return *m.way, nil
}

// login returns the machine's login, which is made if there is none.
func (m *machine) login(ctx context.Context) (*guest.Client, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.client != nil {
		return m.client, nil
	}
	if m.failed != nil && time.Since(m.since) < again {
		return nil, m.failed
	}
	ctx, cancel := context.WithTimeout(ctx, loginTime)
	defer cancel()
	t, err := m.opened(ctx)
	if err == nil {
		m.client, err = guest.Connect(ctx, t)
	}
	m.failed, m.since = err, time.Now()
	return m.client, err
}

// drop forgets a login that is dead.
func (m *machine) drop(c *guest.Client) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.client == c {
		m.client = nil
		c.Close()
	}
}

func (m *machine) close() {
	if m.client != nil {
		m.client.Close()
	}
}

// timedOut words the end of an attempt's time.
func timedOut(ctx context.Context, err error, limit time.Duration) error {
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return fmt.Errorf("no answer within %s", limit)
	}
	return err
}
