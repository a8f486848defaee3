// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"regexp"
	"strings"
	"sync"
	"time"

	"github.com/labfile/lab/internal/lab"
)

// Log is a log of a machine from its beginning. Read returns io.EOF at the present
// end, and may return more when called again.
type Log = io.ReadCloser

// NotReadyError says that a machine did not meet a check in the time it was given.
type NotReadyError struct {
	Check lab.Check
	After time.Duration
	Last  error // what went wrong at the last attempt; never nil
}

func (e *NotReadyError) Error() string {
	return fmt.Sprintf("check %s failed for %s: %v", e.Check, e.After, e.Last)
}

func (e *NotReadyError) Unwrap() error { return e.Last }

// attemptTime bounds one attempt at a check. A single hung connection must not use
// up all of a check's time.
const attemptTime = 30 * time.Second

// WaitReady carries out checks, one after the other, until each has passed once.
// Each has its own timeout and is attempted again after its interval; progress is
// told when a check begins, with a nil error, and after each attempt that failed
// with another error than the one before. console opens the machine's console log.
//
// Errors: *NotReadyError for a check that did not pass in its time, ctx's cause.
func WaitReady(ctx context.Context, t Target, checks []lab.Check, console func() (Log, error), progress func(lab.Check, error)) error {
	if progress == nil {
		progress = func(lab.Check, error) {}
	}
	for _, c := range checks {
		if err := waitCheck(ctx, t, c, console, progress); err != nil {
			return err
		}
	}
	return nil
}

func waitCheck(ctx context.Context, t Target, c lab.Check, console func() (Log, error), progress func(lab.Check, error)) error {
	attempt, err := attempts(t, c, console)
	if err != nil {
		return err
	}
	defer attempt.close()
	progress(c, nil)
	limited, cancel := context.WithTimeout(ctx, c.Timeout)
	defer cancel()
	last := errors.New("it was not even tried")
	told := ""
	for {
		one, cancel := context.WithTimeout(limited, attemptTime)
		err := attempt.try(one)
		cancel()
		if err == nil {
			return nil
		}
		// What was cut off by the end of the time says less than what was before.
		if deadline, _ := limited.Deadline(); time.Now().Before(deadline) && limited.Err() == nil {
			last = err
			if err.Error() != told {
				told = err.Error()
				progress(c, err)
			}
		} else if told == "" {
			last = err
		}
		timer := time.NewTimer(c.Interval)
		select {
		case <-timer.C:
			continue
		case <-limited.Done():
		}
		timer.Stop()
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		return &NotReadyError{Check: c, After: c.Timeout, Last: last}
	}
}

// attempt is a check that can be tried again and again.
type attempt struct {
	try   func(context.Context) error
	close func()
}

func attempts(t Target, c lab.Check, console func() (Log, error)) (attempt, error) {
	a := attempt{close: func() {}}
	switch c.Kind {
	case lab.CheckSSH:
		a.try = func(ctx context.Context) error { return tryLogin(ctx, t) }
	case lab.CheckPort:
		a.try = func(ctx context.Context) error {
			conn, err := dialPort(ctx, t, c.Port)
			if err == nil {
				conn.Close()
			}
			return err
		}
	case lab.CheckHTTP:
		a.try = func(ctx context.Context) error { return tryHTTP(ctx, t, c) }
	case lab.CheckExec:
		e := &execCheck{target: t, command: c.Command}
		a.try, a.close = e.try, e.close
	case lab.CheckConsole:
		re, err := regexp.Compile(c.Pattern)
		if err != nil {
			return a, fmt.Errorf("reading check %q: %w", c, err)
		}
		s := &consoleCheck{open: console, re: re}
		a.try, a.close = s.try, s.close
	default:
		return a, fmt.Errorf("unknown kind of check: %q", c.Kind)
	}
	return a, nil
}

// tryLogin logs in to the guest's own ssh server.
func tryLogin(ctx context.Context, t Target) error {
	conn, err := dialPort(ctx, t, sshPort)
	if err != nil {
		return err
	}
	c, err := login(ctx, conn, t)
	if err != nil {
		return err
	}
	return c.Close()
}

// The most that is read of an answer over HTTP.
const maxBody = 64 << 10

func tryHTTP(ctx context.Context, t Target, c lab.Check) error {
	transport := &http.Transport{
		// Whatever name stands in a URL, the machine is the only place to go.
		DialContext:            func(ctx context.Context, _, _ string) (net.Conn, error) { return dialPort(ctx, t, c.Port) },
		DisableKeepAlives:      true,
		MaxResponseHeaderBytes: maxBody,
	}
	defer transport.CloseIdleConnections()
	client := &http.Client{
		Transport: transport,
		// A redirect is an answer: it may lead anywhere.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, fmt.Sprintf("http://%s:%d%s", t.Machine, c.Port, c.Path), nil)
	if err != nil {
		return err
	}
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	_, _ = io.Copy(io.Discard, io.LimitReader(resp.Body, maxBody))
	if c.Status == 0 && resp.StatusCode >= 200 && resp.StatusCode < 400 || resp.StatusCode == c.Status {
		return nil
	}
	want := "a status from 200 to 399"
	if c.Status != 0 {
		want = fmt.Sprintf("status %d", c.Status)
	}
	return fmt.Errorf("got status %d, want %s", resp.StatusCode, want)
}

// execCheck keeps its login between attempts.
type execCheck struct {
	target  Target
	command string
	client  *Client
}

func (e *execCheck) close() {
	if e.client != nil {
		e.client.Close()
		e.client = nil
	}
}

func (e *execCheck) try(ctx context.Context) error {
	if e.client == nil {
		c, err := Connect(ctx, e.target)
		if err != nil {
			return err
		}
		e.client = c
	}
	out := &tail{}
	err := e.client.Run(ctx, Command{Shell: e.command, Stdout: out, Stderr: out})
	if err == nil {
		return nil
	}
	var exit *ExitError
	if !errors.As(err, &exit) {
		e.close()
		return err
	}
	// The code is the check's, not that of a command which the user ran: it is told,
	// and not wrapped, so that nothing above takes it for one to pass on.
	if text := out.String(); text != "" {
		return errors.New(exit.Error() + ": " + text)
	}
	return errors.New(exit.Error())
}

// tail keeps the end of a command's output: that is where errors stand.
type tail struct {
	mu  sync.Mutex
	buf []byte
}

const tailLen = 500

func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.buf = append(t.buf, p[max(0, len(p)-tailLen):]...)
	t.buf = t.buf[max(0, len(t.buf)-tailLen):]
	return len(p), nil
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return strings.TrimSpace(strings.ToValidUTF8(string(t.buf), "?"))
}

// consoleCheck looks for a pattern in what the console has printed since the
// machine's start. It keeps the last windowLen bytes: a match longer than that is
// not found.
type consoleCheck struct {
	open func() (Log, error)
	re   *regexp.Regexp
	log  Log
	seen []byte
}

const windowLen = 64 << 10

func (s *consoleCheck) close() {
	if s.log != nil {
		s.log.Close()
		s.log = nil
	}
}

func (s *consoleCheck) try(ctx context.Context) error {
	if s.log == nil {
		log, err := s.open()
		if err != nil {
			return fmt.Errorf("opening the console log: %w", err)
		}
		s.log = log
	}
	buf := make([]byte, 32<<10)
	for ctx.Err() == nil {
		n, err := s.log.Read(buf)
		// The window slides by halves, so that no match across a seam is missed.
		if len(s.seen)+n > 2*windowLen {
			s.seen = append(s.seen[:0], s.seen[len(s.seen)-windowLen:]...)
		}
		s.seen = append(s.seen, buf[:n]...)
		if n > 0 && s.re.Match(s.seen) {
			return nil
		}
		if err == io.EOF || n == 0 && err == nil {
			return errors.New("the console has not printed it")
		}
		if err != nil {
			s.close()
			return fmt.Errorf("reading the console log: %w", err)
		}
	}
	return context.Cause(ctx)
}
