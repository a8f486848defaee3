// SPDX-License-Identifier: Apache-2.0

package ui

import (
	"bytes"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/labfile/lab/internal/engine"
)

// clock is a time that tests set.
type clock struct{ t time.Time }

func (c *clock) now() time.Time          { return c.t }
func (c *clock) advance(d time.Duration) { c.t = c.t.Add(d) }

func TestPlainProgress(t *testing.T) {
	c := &clock{noon}
	var b bytes.Buffer
	p := newPlain(&b, c.now, false)
	const mib = 1 << 20
	for _, e := range []engine.Event{
		{Box: "builtin/tiny", Stage: engine.StageBox, Text: "fetching", Done: 0, Total: 40 * mib},
		{Box: "builtin/tiny", Stage: engine.StageBox, Text: "fetching", Done: 1 * mib, Total: 40 * mib},
		{Box: "builtin/tiny", Stage: engine.StageBox, Text: "fetching", Done: 2 * mib, Total: 40 * mib},
		{Box: "builtin/tiny", Stage: engine.StageBox, Text: "fetching", Done: 3 * mib, Total: 40 * mib},
		{Box: "builtin/tiny", Stage: engine.StageBox, Text: "fetching", Done: 4 * mib, Total: 40 * mib},
		{Box: "builtin/tiny", Stage: engine.StageBox, Text: "fetching", Done: 20 * mib, Total: 40 * mib},
		{Machine: "web", Stage: engine.StageCreate, Text: "creating from builtin/tiny"},
		{Machine: "web", Stage: engine.StageBoot, Text: "booting"},
		{Machine: "web", Stage: engine.StageBootStep, Text: "boot step 1 of 1: shell ./join.sh"},
		{Machine: "web", Stage: engine.StageBootStep, Text: "joining\x1b[2J"},
		{Machine: "web", Stage: engine.StageBootStep, Text: "joining\x1b[2J"},
		{Machine: "web", Stage: engine.StageBootStep, Text: "ran boot step 1 of 1: shell ./join.sh", Took: time.Second},
		{Machine: "web", Stage: engine.StageCheck, Text: "waiting for port 80"},
		{Machine: "web", Stage: engine.StageCheck, Text: "waiting for port 80: refused"},
		{Machine: "web", Stage: engine.StageReady, Text: "10.64.1.10", Took: 4210 * time.Millisecond},
		{Machine: "db", Stage: engine.StageFailed, Err: errors.New("panic\x1b[2J")},
		{Machine: "api", Stage: engine.StageSkipped, Text: "not tried: what it depends on failed"},
		{Stage: engine.StageNote, Text: "pinned box base"},
	} {
		c.advance(time.Second)
		p.Event(e)
	}
	p.Close()
	want := `builtin/tiny: fetching 0% (0 B of 40.0 MiB)
builtin/tiny: fetching 50% (20.0 MiB of 40.0 MiB)
web: creating from builtin/tiny
web: booting
web: boot step 1 of 1: shell ./join.sh
web: joining\x1b[2J
web: ran boot step 1 of 1: shell ./join.sh (1.0s)
web: waiting for port 80
web: ready: 10.64.1.10 (4.2s)
db: failed: panic\x1b[2J
api: not tried: what it depends on failed
lab: pinned box base
`
	if diff := cmp.Diff(want, b.String()); diff != "" {
		t.Error(diff)
	}
}

// screen is a terminal of the size that it has at the moment: it understands
// what live progress writes, wraps long lines and scrolls.
type screen struct {
	columns, rows int
	lines         [][]rune // all lines ever, the last of which the cursor may be on
	row, col      int      // of the cursor, row counted in lines
}

func (s *screen) size() (int, int) { return s.columns, s.rows }

func (s *screen) Write(p []byte) (int, error) {
	text := []rune(string(p))
	for i := 0; i < len(text); i++ {
		switch r := text[i]; r {
		case '\n':
			s.row, s.col = s.row+1, 0
		case '\r':
			s.col = 0
		case 0x1b:
			j := i + 2
			n := 0
			for text[j] >= '0' && text[j] <= '9' || text[j] == ';' {
				n = 10*n + int(text[j]-'0')
				j++
			}
			switch text[j] {
			case 'A':
				// The cursor does not leave the screen.
				s.row = max(s.row-n, len(s.lines)-s.rows, 0)
			case 'J':
				s.at(s.row)
				s.lines = s.lines[:s.row+1]
				s.lines[s.row] = s.lines[s.row][:0]
			}
			i = j
		default:
			if s.col == s.columns {
				s.row, s.col = s.row+1, 0
			}
			line := s.at(s.row)
			*line = append((*line)[:s.col], r)
			s.col++
		}
		s.at(s.row)
	}
	return len(p), nil
}

func (s *screen) at(row int) *[]rune {
	for len(s.lines) <= row {
		s.lines = append(s.lines, nil)
	}
	return &s.lines[row]
}

// narrow makes the terminal narrower, as terminals do it: long lines are wrapped.
func (s *screen) narrow(columns int) {
	var lines [][]rune
	for _, l := range s.lines[:len(s.lines)-1] {
		for len(l) > columns {
			lines = append(lines, l[:columns:columns])
			l = l[columns:]
		}
		lines = append(lines, l)
	}
	s.lines = append(lines, nil)
	s.row, s.col, s.columns = len(lines), 0, columns
}

func (s *screen) String() string {
	var b strings.Builder
	for _, l := range s.lines {
		b.WriteString(string(l) + "\n")
	}
	return strings.TrimRight(b.String(), "\n") + "\n"
}

func TestLiveProgress(t *testing.T) {
	c := &clock{noon}
	s := &screen{columns: 60, rows: 10}
	l := newLive(s, s.size, c.now, false)
	event := func(e engine.Event) {
		t.Helper()
		c.advance(time.Second)
		l.Event(e)
	}
	expect := func(want string) {
		t.Helper()
		if diff := cmp.Diff(want, s.String()); diff != "" {
			t.Error(diff)
		}
	}
	event(engine.Event{Box: "builtin/tiny", Stage: engine.StageBox, Text: "fetching", Done: 10 << 20, Total: 40 << 20})
	expect("builtin/tiny  fetching  [=====>              ]  25% ...  0s\n")
	event(engine.Event{Box: "builtin/tiny", Stage: engine.StageBox, Text: "ready", Took: time.Second})
	event(engine.Event{Machine: "db", Stage: engine.StageBoot, Text: "booting"})
	event(engine.Event{Machine: "web", Stage: engine.StageBoot, Text: "booting"})
	expect("builtin/tiny  ready  1.0s\ndb            booting  1s\nweb           booting  0s\n")
	event(engine.Event{Machine: "web", Stage: engine.StageCheck, Text: "waiting for port 80"})
	event(engine.Event{Machine: "db", Stage: engine.StageReady, Text: "10.64.1.10", Took: 3 * time.Second})
	expect("builtin/tiny  ready  1.0s\ndb            ready: 10.64.1.10  3.0s\nweb           waiting for port 80  2s\n")
	c.advance(time.Minute)
	l.refresh()
	expect("builtin/tiny  ready  1.0s\ndb            ready: 10.64.1.10  3.0s\nweb           waiting for port 80  1m02s\n")
	l.Close()
	l.Close()
	expect("builtin/tiny  ready  1.0s\ndb            ready: 10.64.1.10  3.0s\n")
	event(engine.Event{Machine: "late", Stage: engine.StageReady})
	expect("builtin/tiny  ready  1.0s\ndb            ready: 10.64.1.10  3.0s\n")
}

func TestLiveProgressSurvivesResizes(t *testing.T) {
	c := &clock{noon}
	s := &screen{columns: 70, rows: 12}
	l := newLive(s, s.size, c.now, false)
	for _, name := range []engine.Event{{Machine: "alpha"}, {Machine: "beta"}} {
		name.Stage, name.Text = engine.StageCheck, "waiting for exec \"curl -fsS http://db.lab.internal/\""
		l.Event(name)
	}
	s.narrow(20)
	l.refresh()
	want := "alpha  waiti...  0s\nbeta   waiti...  0s\n"
	if diff := cmp.Diff(want, s.String()); diff != "" {
		t.Error(diff)
	}
	l.Close()
	if got := s.String(); got != "\n" {
		t.Errorf("after Close the screen holds %q", got)
	}
}

func TestLiveProgressFitsTheHeight(t *testing.T) {
	c := &clock{noon}
	s := &screen{columns: 40, rows: 4}
	l := newLive(s, s.size, c.now, false)
	for _, n := range []engine.Event{{Machine: "a"}, {Machine: "b"}, {Machine: "c"}, {Machine: "d"}, {Machine: "e"}} {
		n.Stage, n.Text = engine.StageBoot, "booting"
		l.Event(n)
	}
	want := "a  booting  0s\nb  booting  0s\n... and 3 more\n"
	if diff := cmp.Diff(want, s.String()); diff != "" {
		t.Error(diff)
	}
	l.Event(engine.Event{Machine: "a", Stage: engine.StageFailed, Text: "it\x1b[2J broke"})
	want = "a  failed: it\\x1b[2J broke\nb  booting  0s\nc  booting  0s\n... and 2 more\n"
	if diff := cmp.Diff(want, s.String()); diff != "" {
		t.Error(diff)
	}
}

func TestProgressFits(t *testing.T) {
	u := &UI{Err: &bytes.Buffer{}}
	if _, ok := u.Progress().(*plainProgress); !ok {
		t.Error("without a terminal progress is not plain")
	}
	u.Size = func() (int, int) { return 80, 24 }
	p := u.Progress()
	if _, ok := p.(*live); !ok {
		t.Error("on a terminal progress is not live")
	}
	p.Close()
	u.Verbose = true
	if _, ok := u.Progress().(*plainProgress); !ok {
		t.Error("with a log, progress is not plain")
	}
	u.Quiet = true
	if _, ok := u.Progress().(silent); !ok {
		t.Error("quiet progress is not silent")
	}
}
