// SPDX-License-Identifier: Apache-2.0

package ui

import (
	"fmt"
	"io"
	"strings"
	"sync"
	"time"

	"github.com/labfile/lab/internal/engine"
)

// Progress shows events as they come. Its methods may be called by several
// goroutines. Close must be called before anything else is printed.
type Progress interface {
	Event(engine.Event)
	Close()
}

// Progress returns what fits the UI: nothing when quiet, live lines on a
// terminal, plain lines elsewhere.
func (u *UI) Progress() Progress {
	switch {
	case u.Quiet:
		return silent{}
	case u.Size != nil && !u.Verbose:
		l := newLive(u.Err, u.Size, time.Now, u.ColorErr)
		l.tick(redrawEvery)
		return l
	}
	return newPlain(u.Err, time.Now, u.ColorErr)
}

type silent struct{}

func (silent) Event(engine.Event) {}
func (silent) Close()             {}

// subject is what an event is about: a machine, a box, or the lab itself.
func subject(e engine.Event) string {
	switch {
	case e.Machine != "":
		return string(e.Machine)
	case e.Box != "":
		return Clean(e.Box)
	}
	return "lab"
}

// ends reports whether the event is the last one of what went on with its
// subject, so that its line can stand for good.
func ends(e engine.Event) bool {
	switch e.Stage {
	case engine.StageReady, engine.StageKept, engine.StageChanged, engine.StageStopped, engine.StageDestroyed,
		engine.StageFailed, engine.StageSkipped, engine.StageUndone, engine.StageSupervisor, engine.StageNote:
		return true
	case engine.StageBox, engine.StageBake, engine.StageBootStep:
		return e.Took > 0 || e.Err != nil
	}
	return false
}

// describe says in words and a colour what happened.
func describe(e engine.Event) (string, Color) {
	text := Clean(e.Text)
	if text == "" && e.Err != nil {
		text = Clean(e.Err.Error())
	}
	switch e.Stage {
	case engine.StageReady:
		return join("ready", text), Green
	case engine.StageKept:
		return join("unchanged", text), Plain
	case engine.StageChanged:
		return join("changed", text), Yellow
	case engine.StageFailed:
		return join("failed", text), Red
	case engine.StageSkipped, engine.StageUndone:
		return orWord(text, string(e.Stage)), Yellow
	case engine.StageCheck:
		return join("waiting for", text), Plain
	}
	if e.Err != nil {
		return orWord(text, string(e.Stage)), Red
	}
	return orWord(text, string(e.Stage)), Plain
}

func orWord(text, word string) string {
	if text == "" {
		return word
	}
	return text
}

// join puts word before text, unless text says it already.
func join(word, text string) string {
	if text == "" || strings.HasPrefix(text, word) {
		return orWord(text, word)
	}
	if word == "waiting for" {
		return word + " " + text
	}
	return word + ": " + text
}

// plainProgress writes one line per event, but nothing twice in a row. What
// repeats, the bytes of a download and the attempts of a check, is told now and
// then, so that a log stays short.
type plainProgress struct {
	mu    sync.Mutex
	w     io.Writer
	now   func() time.Time
	color bool
	last  map[string]told // by subject
}

// told is the last line about a subject.
type told struct {
	stage engine.Stage
	text  string
	at    time.Time
}

// How often what repeats is told.
const (
	bytesEvery = 5 * time.Second
	checkEvery = 30 * time.Second
)

func newPlain(w io.Writer, now func() time.Time, color bool) *plainProgress {
	return &plainProgress{w: w, now: now, color: color, last: map[string]told{}}
}

// Event implements Progress.
func (p *plainProgress) Event(e engine.Event) {
	p.mu.Lock()
	defer p.mu.Unlock()
	text, c := describe(e)
	now := told{stage: e.Stage, text: text, at: p.now()}
	if last, ok := p.last[subject(e)]; ok && !ends(e) && last.stage == e.Stage {
		every := checkEvery
		if e.Total > 0 {
			every = bytesEvery
		}
		repeats := last.text == text || e.Stage == engine.StageCheck
		if repeats && (e.Total <= 0 && e.Stage != engine.StageCheck || now.at.Sub(last.at) < every) {
			return
		}
	}
	p.last[subject(e)] = now
	if e.Total > 0 && !ends(e) {
		text += fmt.Sprintf(" %d%% (%s of %s)", percent(e.Done, e.Total), amount(e.Done, e.Total), amount(e.Total, e.Total))
	}
	if e.Took > 0 {
		text += " (" + Duration(e.Took) + ")"
	}
	fmt.Fprintf(p.w, "%s: %s\n", subject(e), c.paint(text, p.color))
}

// Close implements Progress.
func (p *plainProgress) Close() {}
