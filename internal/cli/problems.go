// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"
	"slices"
	"strings"
)

// problem is what went wrong, in one or more lines, and the next steps.
type problem struct {
	text  string
	hints []string
}

// fail prints err and returns the exit code. Of several errors that were joined each
// has its own next steps; those that have the same are told together.
func (a *app) fail(ctx context.Context, err error) (code int) {
	code, all := a.problems(ctx, err)
	for _, p := range all {
		a.ui.Error(p.text, p.hints...)
	}
	return code
}

// problems is explain for an error that may be several.
func (a *app) problems(ctx context.Context, err error) (code int, all []problem) {
	code, text, hints := a.explain(ctx, err)
	parts := split(err)
	if ctx.Err() != nil || len(parts) < 2 {
		if text != "" {
			all = append(all, problem{text, hints})
		}
		return code, all
	}
	for _, part := range parts {
		_, text, hints := a.explain(ctx, part)
		i := slices.IndexFunc(all, func(p problem) bool { return slices.Equal(p.hints, hints) })
		switch {
		case text == "" || slices.ContainsFunc(all, func(p problem) bool { return p.text == text }):
		case i >= 0:
			all[i].text += "\n" + text
		default:
			all = append(all, problem{text, hints})
		}
	}
	return code, all
}

// split returns the errors that err joins, by errors.Join or in its way, however deep. What
// was written before them is written before each. An error that joins none is returned alone.
func split(err error) []error {
	switch e := err.(type) { //nolint:errorlint // what it is itself, not what it wraps
	case hinter: // its next step is about the whole
	case interface{ Unwrap() []error }:
		var parts []error
		var texts []string
		for _, part := range e.Unwrap() {
			parts = append(parts, split(part)...)
			texts = append(texts, part.Error())
		}
		if len(texts) > 1 && err.Error() == strings.Join(texts, "\n") {
			return parts
		}
	case interface{ Unwrap() error }:
		inner := e.Unwrap()
		if inner == nil {
			break
		}
		before, found := strings.CutSuffix(err.Error(), inner.Error())
		if parts := split(inner); found && len(parts) > 1 {
			for i := range parts {
				parts[i] = &prefixed{before, parts[i]}
			}
			return parts
		}
	}
	return []error{err}
}

// prefixed is an error with words before it.
type prefixed struct {
	before string
	error
}

func (e *prefixed) Error() string { return e.before + e.error.Error() }
func (e *prefixed) Unwrap() error { return e.error }

// allHints returns the next steps of all that an error joins.
func (a *app) allHints(ctx context.Context, err error) (code int, hints []string) {
	code, all := a.problems(ctx, err)
	for _, p := range all {
		for _, h := range p.hints {
			if !slices.Contains(hints, h) {
				hints = append(hints, h)
			}
		}
	}
	return code, hints
}
