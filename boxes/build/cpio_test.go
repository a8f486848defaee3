// SPDX-License-Identifier: Apache-2.0

package build

import (
	"bytes"
	"errors"
	"fmt"
	"strconv"
	"testing"
)

// uncpio reads an archive as the kernel does: each entry as name, mode and content.
func uncpio(t *testing.T, b []byte) []string {
	t.Helper()
	var out []string
	round := func(n int) int { return (n + 3) &^ 3 }
	for off := 0; ; {
		if string(b[off:off+6]) != "070701" {
			t.Fatalf("no magic at %d", off)
		}
		field := func(i int) int {
			n, err := strconv.ParseUint(string(b[off+6+8*i:off+14+8*i]), 16, 32)
			if err != nil {
				t.Fatal(err)
			}
			return int(n)
		}
		mode, size, nameSize := field(1), field(6), field(11)
		name := string(b[off+110 : off+110+nameSize-1])
		start := round(off + 110 + nameSize)
		if name == "TRAILER!!!" {
			if start != len(b) {
				t.Fatalf("%d bytes after the end", len(b)-start)
			}
			return out
		}
		line := fmt.Sprintf("%s %o", name, mode)
		if size > 0 {
			line += " " + string(b[start:start+size])
		}
		out = append(out, line)
		off = round(start + size)
	}
}

func TestCPIO(t *testing.T) {
	var b bytes.Buffer
	c := &cpioWriter{w: &b}
	c.file("a", 0o644, []byte("hello"))
	c.link("l", "a")
	if err := c.close(); err != nil {
		t.Fatal(err)
	}
	want := "070701" + "00000001" + "000081A4" + "00000000" + "00000000" + "00000001" + "65920080" + "00000005" +
		"00000000" + "00000000" + "00000000" + "00000000" + "00000002" + "00000000" + "a\x00" + "hello\x00\x00\x00"
	if got := b.String()[:len(want)]; got != want {
		t.Errorf("got\n%q, want\n%q", got, want)
	}
	if got := uncpio(t, b.Bytes()); len(got) != 2 || got[1] != "l 120777 a" {
		t.Errorf("got %q", got)
	}
}

type fullDisk struct{}

var errFull = errors.New("full")

func (fullDisk) Write([]byte) (int, error) { return 0, errFull }

func TestCPIOKeepsTheFirstError(t *testing.T) {
	c := &cpioWriter{w: fullDisk{}}
	c.file("a", 0o644, nil)
	if err := c.close(); !errors.Is(err, errFull) {
		t.Errorf("got %v, want %v", err, errFull)
	}
}
