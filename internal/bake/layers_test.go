// SPDX-License-Identifier: Apache-2.0

package bake

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/labfile/lab/internal/lab"
)

const box = "sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"

// put writes files below dir: a name that ends in "/" is a folder, and "-> x" as
// the content makes a link.
func put(t *testing.T, dir string, files map[string]string) {
	t.Helper()
	for name, content := range files {
		p := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		var err error
		switch to, link := strings.CutPrefix(content, "-> "); {
		case strings.HasSuffix(name, "/"):
			err = os.MkdirAll(p, 0o755)
		case link:
			err = os.Symlink(to, p)
		default:
			err = os.WriteFile(p, []byte(content), 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

func shell(s string) lab.Provision { return lab.Provision{Kind: lab.ProvisionShell, Shell: s} }

func TestLayersFollowWhatShapesThem(t *testing.T) {
	steps := []lab.Provision{
		shell("apk add nginx"),
		{Kind: lab.ProvisionFile, From: "web/", To: "/srv/web"},
		{Kind: lab.ProvisionShell, Script: "web/install.sh"},
	}
	for _, tt := range []struct {
		name   string
		change func(t *testing.T, dir string, steps []lab.Provision) string // may return another box
		first  int                                                          // the first layer with another key; 3 if none
	}{
		{"nothing", func(*testing.T, string, []lab.Provision) string { return box }, 3},
		{"the place in the Labfile", func(_ *testing.T, _ string, s []lab.Provision) string { s[0].Place = "Labfile:9:9"; return box }, 3},
		{"the box", func(*testing.T, string, []lab.Provision) string { return "sha256:bb" }, 0},
		{"the first step", func(_ *testing.T, _ string, s []lab.Provision) string { s[0].Shell += " "; return box }, 0},
		{"a mode asked for", func(_ *testing.T, _ string, s []lab.Provision) string { s[1].Mode = "0600"; return box }, 1},
		{"an argument", func(_ *testing.T, _ string, s []lab.Provision) string { s[2].Args = []string{"x"}; return box }, 2},
		{"a file", func(t *testing.T, dir string, _ []lab.Provision) string {
			put(t, dir, map[string]string{"web/sub/b": "other"})
			return box
		}, 1},
		{"a new file", func(t *testing.T, dir string, _ []lab.Provision) string {
			put(t, dir, map[string]string{"web/c": ""})
			return box
		}, 1},
		{"an empty folder", func(t *testing.T, dir string, _ []lab.Provision) string {
			put(t, dir, map[string]string{"web/d/": ""})
			return box
		}, 1},
		{"a file's mode", func(t *testing.T, dir string, _ []lab.Provision) string {
			if err := os.Chmod(filepath.Join(dir, "web/sub/b"), 0o755); err != nil {
				t.Fatal(err)
			}
			return box
		}, 1},
		{"where a link leads", func(t *testing.T, dir string, _ []lab.Provision) string {
			if err := os.Remove(filepath.Join(dir, "web/link")); err != nil {
				t.Fatal(err)
			}
			put(t, dir, map[string]string{"web/link": "-> elsewhere"})
			return box
		}, 1},
		{"a file that no step uses", func(t *testing.T, dir string, _ []lab.Provision) string {
			put(t, dir, map[string]string{"other": "x"})
			return box
		}, 3},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			put(t, dir, map[string]string{"web/install.sh": "#!/bin/sh\n", "web/sub/b": "b", "web/link": "-> sub/b"})
			before, err := NewKeys(dir).Layers(box, steps)
			if err != nil {
				t.Fatal(err)
			}
			changed := append([]lab.Provision(nil), steps...)
			from := tt.change(t, dir, changed)
			after, err := NewKeys(dir).Layers(from, changed)
			if err != nil {
				t.Fatal(err)
			}
			for i := range before {
				if (before[i].Key == after[i].Key) != (i < tt.first) {
					t.Errorf("layer %d: %s and then %s", i, before[i].Key, after[i].Key)
				}
			}
		})
	}
}

func TestLayersSayWhichFiles(t *testing.T) {
	dir := t.TempDir()
	put(t, dir, map[string]string{"web/install.sh": "#!/bin/sh\n", "web/sub/b": "b", "web/link": "-> sub/b"})
	layers, err := NewKeys(dir).Layers(box, []lab.Provision{
		{Kind: lab.ProvisionFile, From: "web/", To: "/srv/web"}, {Kind: lab.ProvisionShell, Script: "./web/install.sh"},
	})
	if err != nil {
		t.Fatal(err)
	}
	var got [][]string
	for _, l := range layers {
		var names []string
		for _, n := range []string{"web", "web/install.sh", "web/link", "web/sub", "web/sub/b"} {
			if l.Files[n] != "" {
				names = append(names, n)
			}
		}
		if len(names) != len(l.Files) {
			t.Errorf("files are %v", l.Files)
		}
		got = append(got, names)
	}
	if diff := cmp.Diff([][]string{{"web", "web/install.sh", "web/link", "web/sub", "web/sub/b"}, {"web/install.sh"}}, got); diff != "" {
		t.Error(diff)
	}
	if layers[0].Files["web/install.sh"] != layers[1].Files["web/install.sh"] {
		t.Error("the same file has two digests")
	}
}

// The key of a layer is where it is found by every later lab: a change here must
// come with another keyVersion.
func TestKeysAreStable(t *testing.T) {
	layers, err := NewKeys(t.TempDir()).Layers(box, []lab.Provision{shell("true")})
	if err != nil {
		t.Fatal(err)
	}
	const want = "sha256:f9a058026460a2a6096e7da12d70a5bf307f545c1e5f53797c550d333d9d84b4"
	if layers[0].Key != want {
		t.Errorf("key is %s, want %s", layers[0].Key, want)
	}
}

func TestLayersRefuse(t *testing.T) {
	dir := t.TempDir()
	put(t, dir, map[string]string{"web/x": "x", "bad/a\nb": "x"})
	for _, tt := range []struct {
		step lab.Provision
		want string
	}{
		{lab.Provision{Kind: lab.ProvisionFile, From: "nowhere", To: "/x", Place: "Labfile:3:5"}, "Labfile:3:5: provision step \"file nowhere -> /x\": stat "},
		{lab.Provision{Kind: lab.ProvisionShell, Script: "web"}, "web is not a file"},
		{lab.Provision{Kind: lab.ProvisionFile, From: "bad", To: "/x"}, "has a line break"},
		{lab.Provision{Kind: lab.ProvisionFile, From: "/dev/null", To: "/x"}, "/dev/null is neither a file nor a folder"},
	} {
		_, err := NewKeys(dir).Layers(box, []lab.Provision{tt.step})
		var se *InputError
		if !errors.As(err, &se) || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("got error %v, want %q", err, tt.want)
		}
	}
}
