// SPDX-License-Identifier: Apache-2.0

package labfile

import (
	"errors"
	"regexp"
	"regexp/syntax"
	"strings"
	"time"

	"github.com/labfile/lab/internal/lab"
)

// How long and how often a check is tried unless the Labfile says it. Under
// emulation a machine takes its time.
const (
	defaultTimeout  = 3 * time.Minute
	defaultInterval = 250 * time.Millisecond
)

// maxPattern is the length in bytes of the longest console pattern: a long one can
// compile to very much.
const maxPattern = 1000

// check returns the readiness check that an item of ready stands for; false if
// there was a problem with it, which has been noted.
func (c *converter) check(e *check) (lab.Check, bool) {
	type kind struct {
		kind   lab.CheckKind
		at     place
		timing *timing
	}
	var kinds []kind
	for _, k := range []kind{
		{lab.CheckSSH, e.SSH.place, &e.SSH.timing},
		{lab.CheckPort, e.Port.place, &e.Port.timing},
		{lab.CheckHTTP, e.HTTP.place, &e.HTTP.timing},
		{lab.CheckExec, e.Exec.place, &e.Exec.timing},
		{lab.CheckConsole, e.Console.place, &e.Console.timing},
	} {
		if k.at.set() {
			kinds = append(kinds, k)
		}
	}
	switch {
	case len(kinds) == 0:
		// An item that could not be read has been reported where it stands.
		if e.Timeout.set() || e.Interval.set() {
			c.add(e.place, "says how long to wait, but not for what; add one of ssh, port, http, exec, console")
		}
		return lab.Check{}, false
	case len(kinds) > 1:
		c.add(e.place, "is two checks in one: %s and %s; begin each with a dash of its own", kinds[0].kind, kinds[1].kind)
		return lab.Check{}, false
	}
	out := lab.Check{Kind: kinds[0].kind, Timeout: defaultTimeout, Interval: defaultInterval}
	at := c.timing(&out, &e.timing, kinds[0].timing)
	if out.Interval > out.Timeout {
		c.add(at, "the interval of %s is longer than the timeout of %s", out.Interval, out.Timeout)
	}
	switch out.Kind {
	case lab.CheckPort:
		out.Port = uint16(e.Port.Port.value)
	case lab.CheckHTTP:
		out.Port, out.Path, out.Status = uint16(e.HTTP.Port.value), "/", e.HTTP.Status.value
		if p := e.HTTP.Path; p.set() {
			out.Path = p.value
			if !strings.HasPrefix(out.Path, "/") || strings.ContainsAny(out.Path, " \t\r\n#") {
				c.add(p.place, "%q is not the path of a request; it begins with / and has no spaces", shorten(out.Path))
			}
		}
	case lab.CheckExec:
		out.Command = e.Exec.Run.value
	case lab.CheckConsole:
		m := e.Console.Match
		out.Pattern = m.value
		if len(m.value) > maxPattern {
			c.add(m.place, "the regular expression is longer than %d bytes", maxPattern)
		} else if _, err := regexp.Compile(m.value); err != nil {
			var bad *syntax.Error
			if errors.As(err, &bad) {
				c.add(m.place, "not a regular expression: %s: %q", bad.Code, shorten(bad.Expr))
			} else {
				c.add(m.place, "not a regular expression: %v", err)
			}
		}
	}
	return out, true
}

// timing sets when out is tried, from beside the kind or from inside of it, and
// returns the place to blame for what does not fit.
func (c *converter) timing(out *lab.Check, beside, inside *timing) place {
	var at place
	for _, v := range []struct {
		to             *time.Duration
		beside, inside *duration
	}{
		{&out.Timeout, &beside.Timeout, &inside.Timeout},
		{&out.Interval, &beside.Interval, &inside.Interval},
	} {
		from := v.inside
		if v.beside.set() {
			if v.inside.set() {
				c.add(v.beside.place, "is given twice; the other one is on line %d", v.inside.line)
			}
			from = v.beside
		}
		if from.set() {
			*v.to, at = from.value, from.place
		}
	}
	return at
}
