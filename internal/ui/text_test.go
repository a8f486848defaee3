// SPDX-License-Identifier: Apache-2.0

package ui

import (
	"strings"
	"testing"
	"time"

	"github.com/labfile/lab/internal/lab"
)

func TestClean(t *testing.T) {
	for in, want := range map[string]string{
		"plain text":         "plain text",
		"ünïcödé 日本":         "ünïcödé 日本",
		"\x1b[31mred\x1b[0m": `\x1b[31mred\x1b[0m`,
		"two\nlines\r":       `two\nlines\r`,
		"a\tb":               "a b",
		"\x00\x07\x7f":       `\x00\x07\x7f`,
		"\u009b31m":          `\u009b31m`, // the C1 form of ESC [
		"\u202egnp.exe":      `\u202egnp.exe`,
		"bad\xffutf8":        `bad\xffutf8`,
		"\ufffd":             "\ufffd",
		"zero\u200bwidth":    `zero\u200bwidth`,
	} {
		if got := Clean(in); got != want {
			t.Errorf("Clean(%q) = %q, want %q", in, got, want)
		}
	}
	if got, want := CleanLines("a\r\nb\x1b\n"), "a\nb\\x1b\n"; got != want {
		t.Errorf("CleanLines = %q, want %q", got, want)
	}
}

func FuzzClean(f *testing.F) {
	f.Add("a\x1b]0;title\x07\xff\u202e")
	f.Fuzz(func(t *testing.T, s string) {
		got := Clean(s)
		if strings.ContainsFunc(got, harmful) {
			t.Errorf("Clean(%q) = %q is not clean", s, got)
		}
		if Clean(got) != got {
			t.Errorf("Clean is not idempotent on %q", s)
		}
	})
}

func TestSize(t *testing.T) {
	for in, want := range map[int64]string{
		-1: "0 B", 0: "0 B", 1023: "1023 B", 1024: "1.0 KiB", 1536: "1.5 KiB", 1<<20 - 1: "1.0 MiB",
		117 << 20: "117.0 MiB", 1 << 30: "1.0 GiB", 1 << 62: "4.0 EiB",
	} {
		if got := Size(in); got != want {
			t.Errorf("Size(%d) = %q, want %q", in, got, want)
		}
	}
}

func TestDuration(t *testing.T) {
	for in, want := range map[time.Duration]string{
		-time.Second: "0.0s", 0: "0.0s", 410 * time.Millisecond: "0.4s", 59900 * time.Millisecond: "59.9s",
		59990 * time.Millisecond: "1m00s", 125 * time.Second: "2m05s", time.Hour - time.Millisecond: "1h00m",
		3*time.Hour + 12*time.Minute: "3h12m", 122 * time.Hour: "5d02h",
	} {
		if got := Duration(in); got != want {
			t.Errorf("Duration(%v) = %q, want %q", in, got, want)
		}
	}
}

func TestNames(t *testing.T) {
	for want, in := range map[string][]lab.Name{
		"": nil, "db": {"db"}, "db and web": {"db", "web"}, "a, b and c": {"a", "b", "c"},
	} {
		if got := Names(in); got != want {
			t.Errorf("Names(%q) = %q, want %q", in, got, want)
		}
	}
}

func TestTable(t *testing.T) {
	var tab Table
	tab.Row("NAME", "EMPTY", "STATE", "NOTE")
	tab.Row("web-1", "", "ready", "")
	tab.Paint(2, Green)
	tab.Row("db", "", "failed", "a\x1bb")
	var b strings.Builder
	if err := tab.Print(&b, Page{}); err != nil {
		t.Fatal(err)
	}
	want := "NAME   STATE   NOTE\nweb-1  ready\ndb     failed  a\\x1bb\n"
	if b.String() != want {
		t.Errorf("got\n%q, want\n%q", b.String(), want)
	}
	b.Reset()
	if err := tab.Print(&b, Page{Color: true}); err != nil {
		t.Fatal(err)
	}
	want = "NAME   STATE   NOTE\nweb-1  \x1b[32mready\x1b[0m\ndb     failed  a\\x1bb\n"
	if b.String() != want {
		t.Errorf("in colour got\n%q, want\n%q", b.String(), want)
	}
}
