// SPDX-License-Identifier: Apache-2.0

package ui

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"unicode/utf8"

	"golang.org/x/term"
)

// UI is where a command speaks: answers on Out, progress and errors on Err.
type UI struct {
	Out, Err io.Writer
	Size     func() (columns, rows int) // of the terminal that Err is; nil if it is none
	Width    int                        // columns of Out; 0 if it is no terminal, unless COLUMNS says how many
	ErrWidth int                        // likewise of Err
	ColorOut bool
	ColorErr bool
	Quiet    bool // no progress, no notes
	Verbose  bool // progress as plain lines, so that it goes with a log

	raw atomic.Bool // see SetRaw
}

// New looks at the streams: live progress and colours are for terminals only,
// and colours only where NO_COLOR (no-color.org) is not set and TERM is not
// "dumb".
func New(out, err io.Writer, getenv func(string) string) *UI {
	dumb := getenv("TERM") == "dumb"
	color := getenv("NO_COLOR") == "" && !dumb
	u := &UI{Out: out, Err: err}
	if f, ok := terminal(err); ok && !dumb {
		u.Size = func() (int, int) {
			w, h, err := term.GetSize(int(f.Fd()))
			if err != nil {
				return 80, 24
			}
			return w, h
		}
		u.ColorErr = color
	}
	if _, ok := terminal(out); ok {
		u.ColorOut = color
	}
	u.Width, u.ErrWidth = columns(out, getenv), columns(err, getenv)
	return u
}

// OutPage is what answers are printed on, ErrPage what is told beside them.
func (u *UI) OutPage() Page { return Page{u.ColorOut, u.Width} }

// ErrPage is described at OutPage.
func (u *UI) ErrPage() Page { return Page{u.ColorErr, u.ErrWidth} }

// columns is the width of what w is, or 0 if it has none: lines in a file or a pipe are
// for programs, which look for words in them.
func columns(w io.Writer, getenv func(string) string) int {
	if f, ok := terminal(w); ok {
		if n, _, err := term.GetSize(int(f.Fd())); err == nil && n > 0 {
			return n
		}
	}
	n, err := strconv.Atoi(getenv("COLUMNS"))
	if err != nil || n <= 0 {
		return 0
	}
	return n
}

func terminal(w io.Writer) (*os.File, bool) {
	f, ok := w.(*os.File)
	return f, ok && term.IsTerminal(int(f.Fd()))
}

// SetRaw says whether the terminal is raw: a newline alone does not begin a line there.
func (u *UI) SetRaw(raw bool) { u.raw.Store(raw) }

// Note says something on Err that is no error: one line, and while the terminal is raw
// a line of its own.
func (u *UI) Note(format string, a ...any) {
	if u.Quiet {
		return
	}
	line := "lab: " + Clean(fmt.Sprintf(format, a...))
	if u.raw.Load() {
		line = "\r\n" + line + "\r"
	}
	fmt.Fprintln(u.Err, line)
}

// Error prints what went wrong and the next steps.
func (u *UI) Error(text string, hints ...string) {
	head := Red.paint("error:", u.ColorErr)
	fmt.Fprintf(u.Err, "lab: %s %s\n", head, indent(CleanLines(text)))
	for _, h := range hints {
		fmt.Fprintf(u.Err, "lab: %s %s\n", Yellow.paint("hint:", u.ColorErr), indent(CleanLines(h)))
	}
}

// indent sets the lines after the first off from those that begin with "lab:".
func indent(s string) string {
	return strings.ReplaceAll(strings.TrimRight(s, "\n"), "\n", "\n  ")
}

// JSON writes v, indented, with a final newline.
func JSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	return e.Encode(v)
}

// Prefixer gives each of several outputs its lines' prefix and keeps lines
// whole when they are written at the same time.
type Prefixer struct {
	mu    sync.Mutex
	width int
}

// NewPrefixer returns a Prefixer for the given names.
func NewPrefixer(names []string) *Prefixer {
	p := &Prefixer{}
	for _, n := range names {
		p.width = max(p.width, width(n))
	}
	return p
}

// Writer returns a writer that passes whole lines on to w, each behind name. Whatever
// could move the cursor is written as an escape, as by Clean, but for tabs: one guest
// must not be able to write lines in the name of another. Close writes a last line that
// has no newline.
func (p *Prefixer) Writer(w io.Writer, name string) io.WriteCloser {
	return &prefixed{p: p, w: w, prefix: pad(name, p.width) + " | "}
}

// maxLine bounds what is kept of a line that does not end.
const maxLine = 64 << 10

type prefixed struct {
	p      *Prefixer
	w      io.Writer
	prefix string
	rest   []byte
}

func (p *prefixed) Write(b []byte) (int, error) {
	n := len(b)
	for len(b) > 0 {
		i := bytes.IndexByte(b, '\n')
		if i < 0 {
			p.rest = append(p.rest, b...)
			b = nil
			if len(p.rest) < maxLine {
				break
			}
		} else {
			p.rest = append(p.rest, b[:i]...)
			b = b[i+1:]
		}
		if err := p.line(); err != nil {
			return 0, err
		}
	}
	return n, nil
}

func (p *prefixed) line() error {
	p.p.mu.Lock()
	defer p.p.mu.Unlock()
	line := bytes.TrimSuffix(p.rest, []byte{'\r'})
	var left []byte // of a character that was cut in two because the line is too long
	if len(p.rest) >= maxLine {
		line, left = cutRune(line)
	}
	cells := strings.Split(string(line), "\t")
	for i, c := range cells {
		cells[i] = Clean(c)
	}
	out := p.prefix + strings.Join(cells, "\t") + "\n"
	p.rest = append(p.rest[:0], left...)
	_, err := io.WriteString(p.w, out)
	return err
}

// cutRune splits off the beginning of a character that is not complete.
func cutRune(b []byte) (whole, rest []byte) {
	for i := len(b) - 1; i >= 0 && i >= len(b)-utf8.UTFMax; i-- {
		if utf8.RuneStart(b[i]) {
			if !utf8.FullRune(b[i:]) {
				return b[:i], bytes.Clone(b[i:])
			}
			break
		}
	}
	return b, nil
}

// Close flushes.
func (p *prefixed) Close() error {
	if len(p.rest) == 0 {
		return nil
	}
	return p.line()
}
