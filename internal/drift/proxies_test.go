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
		{"another mode beside the same part", modified(Mode), block("a"), block("a"), false},
		{"another owner", modified(Content, Owner), block("a"), block("b"), false},
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
	if (&comparison{ctx: t.Context()}).onlyProxies(modified(Content)) {
		t.Error("of lists of a lab without proxies, the file is to be shown")
	}
	if lists.onlyProxies(modified(Content, Mode)) || lists.onlyProxies(Change{Op: Replaced, Path: path, Old: file, New: file}) {
		t.Error("of lists, another mode or kind of the file is to be shown")
	}
	if !lists.onlyProxies(modified(MTime)) || lists.onlyProxies(Change{Op: Modified, Path: "/etc/other", Old: file, New: file}) {
		t.Error("of lists, the one file is to be hidden")
	}
}

// No file that may hold the settings of proxies is shown.
func TestFilesWithProxiesAreSecret(t *testing.T) {
	file := &Meta{Kind: KindFile, Mode: "0644"}
	const block = "# begin: written by lab\nhttp_proxy=http://ada:s3cret@p:1\n# end: written by lab\n"
	for path, text := range map[string]string{
		"/etc/environment":         block,
		"/etc/environment.lab-new": "A=1\n" + block,
		"/root/copy":               "A=1\n" + block,
		"/var/lib/cloud/instances/shop-1/user-data.txt":       "http://ada:s3cret@p:1",
		"/var/lib/cloud/instances/shop-1/cloud-config.txt":    "http://ada:s3cret@p:1",
		"/var/lib/cloud/instances/shop-1/boothooks/lab-proxy": "http://ada:s3cret@p:1",
		"/var/lib/cloud/instance/scripts/part-001":            "http://ada:s3cret@p:1",
		"/var/lib/cloud/seed/nocloud/user-data":               "http://ada:s3cret@p:1",
	} {
		change := Change{Op: Modified, Path: path, Old: file, New: file, What: []string{Content}}
		for _, sides := range [][2]textSide{{"", textSide(text)}, {textSide(text), ""}} {
			got, err := Diff(t.Context(), sides[0], sides[1], change)
			if err != nil || strings.Contains(got, "s3cret") || !strings.Contains(got, "has secrets") {
				t.Errorf("%s: %v\n%s", path, err, got)
			}
		}
	}
	got, err := Diff(t.Context(), textSide("A=1\n"), textSide("A=2\n"), Change{Op: Modified, Path: "/etc/environment", Old: file, New: file, What: []string{Content}})
	if err != nil || !strings.Contains(got, "+A=2") {
		t.Errorf("without lab's part: %v\n%s", err, got)
	}
}

// What lab itself writes for services is hidden, also if a kill cuts it short; a file
// beside it is not.
func TestIgnoredFilesOfProxies(t *testing.T) {
	ignore, err := ParseIgnore(Defaults())
	if err != nil {
		t.Fatal(err)
	}
	const generators = "/etc/systemd/system-environment-generators"
	for path, want := range map[string]bool{
		"/etc/environment":                        false,
		"/etc/environment.lab-new":                true,
		"/etc/environment.bak":                    false,
		"/srv/etc/environment.lab-new":            false,
		generators + "/90-lab-proxy":              true,
		generators + "/90-lab-proxy.lab-new":      true,
		generators + "/91-own":                    false,
		"/srv/90-lab-proxy":                       false,
		"/etc/systemd/system-generators/90-other": false,
	} {
		if got := ignore.Match(path, false); got != want {
			t.Errorf("%s: hidden %v, want %v", path, got, want)
		}
	}
	if !ignore.Match(generators, true) {
		t.Errorf("%s is not hidden", generators)
	}
}
