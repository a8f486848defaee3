// SPDX-License-Identifier: Apache-2.0

package ui

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
)

func TestError(t *testing.T) {
	var b bytes.Buffer
	u := &UI{Err: &b}
	u.Error("first\nsecond \x1b[2J\n", "do this")
	want := "lab: error: first\n  second \\x1b[2J\nlab: hint: do this\n"
	if b.String() != want {
		t.Errorf("got %q, want %q", b.String(), want)
	}
	b.Reset()
	u.ColorErr = true
	u.Error("x")
	if want := "lab: \x1b[31merror:\x1b[0m x\n"; b.String() != want {
		t.Errorf("in colour got %q, want %q", b.String(), want)
	}
}

func TestNote(t *testing.T) {
	var b bytes.Buffer
	u := &UI{Err: &b}
	u.Note("it is %d", 1)
	u.Quiet = true
	u.Note("it is %d", 2)
	u.Quiet = false
	u.SetRaw(true)
	u.Note("it is %d", 3)
	u.SetRaw(false)
	u.Note("it is %d", 4)
	if want := "lab: it is 1\n\r\nlab: it is 3\r\nlab: it is 4\n"; b.String() != want {
		t.Errorf("got %q, want %q", b.String(), want)
	}
}

func TestNewIsPlainWithoutTerminal(t *testing.T) {
	u := New(&bytes.Buffer{}, &bytes.Buffer{}, func(string) string { return "" })
	if u.Size != nil || u.ColorOut || u.ColorErr {
		t.Errorf("a buffer was taken for a terminal: %+v", u)
	}
}

func TestPrefixer(t *testing.T) {
	var b bytes.Buffer
	p := NewPrefixer([]string{"db", "web-1"})
	w := p.Writer(&b, "db")
	for _, s := range []string{"one\ntw", "o\n", "\n", "three"} {
		if n, err := w.Write([]byte(s)); n != len(s) || err != nil {
			t.Fatalf("Write(%q) = %d, %v", s, n, err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	want := "db    | one\ndb    | two\ndb    | \ndb    | three\n"
	if b.String() != want {
		t.Errorf("got %q, want %q", b.String(), want)
	}
}

// What one machine prints cannot look like a line of another, however it is cut.
func TestPrefixerCleans(t *testing.T) {
	const evil = "a\tb\x1b[2J\x1b]0;owned\x07\r\x1b[1Aweb | forged\x9b2J\u202etxt\u009b\b\r\n\x1b[3"
	want := `db | a` + "\t" + `b\x1b[2J\x1b]0;owned\x07\r\x1b[1Aweb | forged\x9b2J\u202etxt\u009b\x08` + "\ndb | " + `\x1b[3` + "\n"
	for n := 1; n <= len(evil); n++ {
		var b bytes.Buffer
		w := NewPrefixer([]string{"db"}).Writer(&b, "db")
		for part := range slices.Chunk([]byte(evil), n) {
			if _, err := w.Write(part); err != nil {
				t.Fatal(err)
			}
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		if b.String() != want {
			t.Fatalf("in parts of %d: got %q, want %q", n, b.String(), want)
		}
	}
	// A line that is too long is not cut inside a character.
	var b bytes.Buffer
	w := NewPrefixer([]string{"db"}).Writer(&b, "db")
	if _, err := w.Write([]byte(strings.Repeat("x", maxLine-1) + "é\n")[:maxLine]); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write([]byte("é\n")[1:]); err != nil {
		t.Fatal(err)
	}
	if !strings.HasSuffix(b.String(), "x\ndb | é\n") {
		t.Errorf("got %q", b.String()[maxLine-5:])
	}
}

func TestPrefixerKeepsLinesWhole(t *testing.T) {
	var b bytes.Buffer
	names := []string{"a", "b", "c"}
	p := NewPrefixer(names)
	var wg sync.WaitGroup
	for _, n := range names {
		wg.Add(1)
		go func() {
			defer wg.Done()
			w := p.Writer(&b, n)
			for i := range 200 {
				fmt.Fprintf(w, "%s%d\n", strings.Repeat(n, 20), i)
			}
		}()
	}
	wg.Wait()
	seen := 0
	for line := range strings.Lines(b.String()) {
		n := line[:1]
		if !strings.HasPrefix(line, n+" | "+strings.Repeat(n, 20)) {
			t.Fatalf("torn line %q", line)
		}
		seen++
	}
	if seen != 600 {
		t.Errorf("saw %d lines, want 600", seen)
	}
}

func TestPrefixerBoundsALine(t *testing.T) {
	var b bytes.Buffer
	w := NewPrefixer([]string{"a"}).Writer(&b, "a")
	if _, err := w.Write(bytes.Repeat([]byte("x"), maxLine)); err != nil {
		t.Fatal(err)
	}
	if got, want := b.Len(), len("a | ")+maxLine+1; got != want {
		t.Errorf("passed on %d bytes, want %d", got, want)
	}
}
