// SPDX-License-Identifier: Apache-2.0

package bake

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/labfile/lab/internal/lab"
)

var accounts = Accounts{
	Passwd: "root:x:0:0:root:/root:/bin/sh\nwww:x:33:34::/srv:/bin/false\n",
	Group:  "root:x:0:\nwww:x:34:\nstaff:x:50:www\n",
}

// archive returns the members of a step's archive, one line each.
func archive(t *testing.T, dir string, p lab.Provision, there map[string]bool) ([]string, error) {
	t.Helper()
	layers, err := NewKeys(dir).Layers(box, []lab.Provision{p})
	if err != nil {
		t.Fatal(err)
	}
	tree, err := NewTree(dir, p, layers[0])
	if err != nil {
		return nil, err
	}
	var b bytes.Buffer
	if err := tree.Write(&b, accounts, there); err != nil {
		return nil, err
	}
	var got []string
	r := tar.NewReader(&b)
	for {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return got, nil
		}
		if err != nil {
			t.Fatal(err)
		}
		content, _ := io.ReadAll(r)
		line := fmt.Sprintf("%c %04o %d:%d %s", h.Typeflag, h.Mode, h.Uid, h.Gid, h.Name)
		if h.Linkname != "" {
			line += " -> " + h.Linkname
		}
		if len(content) > 0 {
			line += " " + string(content)
		}
		got = append(got, line)
	}
}

func TestArchive(t *testing.T) {
	dir := t.TempDir()
	put(t, dir, map[string]string{"web/run": "R", "web/sub/b": "B", "web/link": "-> sub/b", "conf": "C"})
	if err := os.Chmod(filepath.Join(dir, "web/run"), 0o750); err != nil {
		t.Fatal(err)
	}
	text := "hello\n"
	for _, tt := range []struct {
		name  string
		step  lab.Provision
		there []string
		want  []string
	}{
		{"content", lab.Provision{Content: &text, To: "/etc/motd"}, []string{"/etc"}, []string{"0 0644 0:0 etc/motd hello\n"}},
		{"a file", lab.Provision{From: "conf", To: "/etc/app/app.conf", Owner: "www", Mode: "0640"}, []string{"/etc"}, []string{"5 0755 0:0 etc/app/", "0 0640 33:34 etc/app/app.conf C"}},
		{"a file into a folder", lab.Provision{From: "conf", To: "/etc/"}, []string{"/etc"}, []string{"0 0644 0:0 etc/conf C"}},
		{
			"a folder",
			lab.Provision{From: "web/", To: "/srv/web", Owner: "www:staff"},
			[]string{"/srv"},
			[]string{"5 0755 33:50 srv/web/", "5 0755 33:50 srv/web/sub/", "2 0777 33:50 srv/web/link -> sub/b", "0 0750 33:50 srv/web/run R", "0 0644 33:50 srv/web/sub/b B"},
		},
		{
			"a folder over one that is there",
			lab.Provision{From: "web", To: "/srv/", Owner: "7:8", Mode: "0640"},
			[]string{"/srv", "/srv/web"},
			[]string{"5 0750 7:8 srv/web/sub/", "2 0777 7:8 srv/web/link -> sub/b", "0 0640 7:8 srv/web/run R", "0 0640 7:8 srv/web/sub/b B"},
		},
		{"onto the root", lab.Provision{From: "web/sub", To: "/"}, nil, []string{"5 0755 0:0 sub/", "0 0644 0:0 sub/b B"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			tt.step.Kind = lab.ProvisionFile
			there := map[string]bool{}
			for _, d := range tt.there {
				there[d] = true
			}
			got, err := archive(t, dir, tt.step, there)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestArchiveRefuses(t *testing.T) {
	dir := t.TempDir()
	put(t, dir, map[string]string{"conf": "C"})
	text := "x"
	for _, tt := range []struct {
		step lab.Provision
		want string
	}{
		{lab.Provision{From: "conf", To: "/x", Owner: "nobody"}, `the image has no user "nobody": an earlier step must make it`},
		{lab.Provision{From: "conf", To: "/x", Owner: "www:nobody"}, `the image has no group "nobody"`},
		{lab.Provision{From: "conf", To: "/x", Mode: "rw"}, `"rw" is not an octal mode`},
		{lab.Provision{From: "conf", To: "x"}, `"x" is not an absolute path`},
		{lab.Provision{Content: &text, To: "/etc/"}, `"/etc/" is a folder`},
	} {
		tt.step.Kind = lab.ProvisionFile
		if _, err := archive(t, dir, tt.step, nil); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("got error %v, want %q", err, tt.want)
		}
	}
}

// A file that changed since the key was made must not get into the layer.
func TestArchiveNoticesChanges(t *testing.T) {
	for name, content := range map[string]string{"other content": "zz", "shorter": "z"} {
		dir := t.TempDir()
		put(t, dir, map[string]string{"web/a": "aa", "web/b": "bb"})
		p := lab.Provision{Kind: lab.ProvisionFile, From: "web", To: "/web"}
		layers, err := NewKeys(dir).Layers(box, []lab.Provision{p})
		if err != nil {
			t.Fatal(err)
		}
		tree, err := NewTree(dir, p, layers[0])
		if err != nil {
			t.Fatal(err)
		}
		put(t, dir, map[string]string{"web/a": content})
		if err := tree.Write(io.Discard, accounts, nil); !errors.Is(err, errChanged) {
			t.Errorf("%s: got error %v", name, err)
		}
	}
}
