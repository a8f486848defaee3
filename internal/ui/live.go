// SPDX-License-Identifier: Apache-2.0

package ui

import (
	"fmt"
	"io"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/labfile/lab/internal/engine"
)

// redrawEvery is how often elapsed times are refreshed.
const redrawEvery = 250 * time.Millisecond

// live keeps one line per machine or box that something goes on with at the
// bottom of a terminal and redraws them in place; a line that is final scrolls
// up and stays.
type live struct {
	mu     sync.Mutex
	w      io.Writer
	size   func() (columns, rows int)
	now    func() time.Time
	color  bool
	wide   int    // of the longest subject so far
	rows   []*row // what goes on, in the order of appearance
	drawn  []int  // widths of the lines that stand on the terminal
	closed bool
	stop   chan struct{}
	ended  sync.WaitGroup
}

// row is one thing that goes on.
type row struct {
	subject     string
	text        string
	done, total int64
	began       time.Time
}

func newLive(w io.Writer, size func() (int, int), now func() time.Time, color bool) *live {
	return &live{w: w, size: size, now: now, color: color, stop: make(chan struct{})}
}

// tick redraws regularly until Close.
func (l *live) tick(every time.Duration) {
	l.ended.Add(1)
	go func() {
		defer l.ended.Done()
		t := time.NewTicker(every)
		defer t.Stop()
		for {
			select {
			case <-l.stop:
				return
			case <-t.C:
				l.refresh()
			}
		}
	}()
}

func (l *live) refresh() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.closed && len(l.rows) > 0 {
		l.draw("")
	}
}

// Event implements Progress.
func (l *live) Event(e engine.Event) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return
	}
	name := subject(e)
	l.wide = max(l.wide, min(width(name), 30))
	text, c := describe(e)
	if ends(e) {
		l.drop(name)
		line := pad(name, l.wide) + "  " + c.paint(text, l.color)
		if e.Took > 0 {
			line += Dim.paint("  "+Duration(e.Took), l.color)
		}
		l.draw(line + "\n")
		return
	}
	r := l.row(name)
	r.text, r.done, r.total = text, e.Done, e.Total
	l.draw("")
}

func (l *live) row(name string) *row {
	for _, r := range l.rows {
		if r.subject == name {
			return r
		}
	}
	r := &row{subject: name, began: l.now()}
	l.rows = append(l.rows, r)
	return r
}

func (l *live) drop(name string) {
	for i, r := range l.rows {
		if r.subject == name {
			l.rows = append(l.rows[:i:i], l.rows[i+1:]...)
			return
		}
	}
}

// Close implements Progress. Lines of what still goes on are removed: what the
// command says next tells how it ended.
func (l *live) Close() {
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		return
	}
	l.rows = nil
	l.draw("")
	l.closed = true
	close(l.stop)
	l.mu.Unlock()
	l.ended.Wait()
}

// draw replaces the lines that stand on the terminal: lasting text first, then
// the live lines. It is one write, so that nothing flickers.
func (l *live) draw(lasting string) {
	columns, height := l.size()
	columns, height = max(columns, 10), max(height, 2)
	var b strings.Builder
	b.WriteString(erase(l.drawn, columns))
	b.WriteString(lasting)
	l.drawn = l.drawn[:0]
	show := l.rows
	if room := height - 1; len(show) > room {
		show = show[:room-1]
	}
	for _, r := range show {
		line := l.line(r, columns-1) // the last column would wrap on some terminals
		l.drawn = append(l.drawn, width(line))
		b.WriteString(line + "\n")
	}
	if more := len(l.rows) - len(show); more > 0 {
		line := cut(fmt.Sprintf("... and %d more", more), columns-1)
		l.drawn = append(l.drawn, width(line))
		b.WriteString(line + "\n")
	}
	_, _ = io.WriteString(l.w, b.String()) // a terminal that is gone ends the command by a signal
}

// erase returns what removes lines of the given widths. A terminal made narrower
// since has wrapped them, so each may take several rows now.
func erase(drawn []int, columns int) string {
	rows := 0
	for _, w := range drawn {
		rows += max(1, (w+columns-1)/columns)
	}
	if rows == 0 {
		return ""
	}
	return fmt.Sprintf("\x1b[%dA\r\x1b[J", rows)
}

// line renders a row in at most room columns. The time is the last to be cut: it
// shows that something still goes on.
func (l *live) line(r *row, room int) string {
	s := pad(r.subject, l.wide) + "  " + r.text
	if r.total > 0 {
		s += "  " + bar(r.done, r.total)
	}
	end := "  " + elapsed(l.now().Sub(r.began))
	return cut(cut(s, room-width(end))+end, room)
}

// barWidth is how many columns a bar takes between its brackets.
const barWidth = 20

// bar draws how much of something is done.
func bar(done, total int64) string {
	done = min(max(done, 0), total)
	full := int(float64(barWidth) * float64(done) / float64(total))
	inner := strings.Repeat("=", full)
	if full < barWidth {
		inner += ">"
	}
	return fmt.Sprintf("[%s] %3d%%  %s of %s", pad(inner, barWidth), percent(done, total), amount(done, total), amount(total, total))
}

// percent is how much of total is done.
func percent(done, total int64) int {
	return int(100 * float64(min(max(done, 0), total)) / float64(total))
}

// amount renders a part of total: bytes, or steps if they are few.
func amount(n, total int64) string {
	if total < fewSteps {
		return strconv.FormatInt(n, 10)
	}
	return Size(n)
}

// fewSteps is what tells steps from bytes: nothing that is counted in bytes and
// worth a bar is as small.
const fewSteps = 16 << 10
