// SPDX-License-Identifier: Apache-2.0

package drift

import (
	"context"
	"io"
	"strings"
	"testing"
)

// textSide has one file.
type textSide string

func (s textSide) contents(_ context.Context, w io.Writer, _ string, _ *Meta, _ int64) (string, error) {
	_, err := io.WriteString(w, string(s))
	return "", err
}

func (textSide) accounts(context.Context, string) (map[uint32]string, error) { return nil, nil }

// Lab's own part of /etc/environment is no drift, whatever is in it; the rest of the file is.
func TestProxiesAreNoDrift(t *testing.T) {
	const path = "/etc/environment"
	block := func(v string) string {
		return "# begin: written by lab\nhttp_proxy=http://ada:s3cret@" + v + "\n# end: written by lab\n"
	}
	file := &Meta{Kind: KindFile, Mode: "0644"}
	modified := func(what ...string) Change { return Change{Op: Modified, Path: path, Old: file, New: file, What: what} }
	for _, c := range []struct {
		name     string
		change   Change
		old, now string
		want     bool
	}{
		{"other settings", modified(Content, MTime), "A=1\n" + block("a"), "A=1\n" + block("b"), true},
		{"new settings", modified(Content), "A=1\n", "A=1\n" + block("b"), true},
		{"taken back", modified(Content), "A=1\n" + block("a"), "A=1\n", true},
		{"a new file", Change{Op: Added, Path: path, New: file}, "", block("a"), true},
		{"a file that is gone", Change{Op: Deleted, Path: path, Old: file}, block("a"), "", true},
		{"a change beside it", modified(Content), "A=1\n" + block("a"), "A=2\n" + block("a"), false},
		{"no part of lab's", modified(MTime), "A=1\n", "A=1\n", false},
		{"another mode", modified(Content, Mode), block("a"), block("b"), false},
		{"a link", Change{Op: Replaced, Path: path, Old: file, New: &Meta{Kind: KindSymlink}}, block("a"), "", false},
		{"a new folder", Change{Op: Added, Path: path, New: &Meta{Kind: KindDir}}, "", "", false},
	} {
		if got := onlyProxies(t.Context(), textSide(c.old), textSide(c.now), c.change); got != c.want {
			t.Errorf("%s: hidden %v, want %v", c.name, got, c.want)
		}
	}
	text, err := Diff(t.Context(), textSide("A=1\n"+block("a")), textSide("A=2\n"+block("a")), modified(Content))
	if err != nil || strings.Contains(text, "s3cret") || !strings.Contains(text, "not shown") {
		t.Errorf("%q, %v", text, err)
	}
	lists := &comparison{ctx: t.Context(), o: Options{Proxies: true}}
	if !lists.onlyProxies(modified(MTime)) || lists.onlyProxies(Change{Op: Modified, Path: "/etc/other", Old: file, New: file}) {
		t.Error("of lists, the one file is to be hidden")
	}
}
