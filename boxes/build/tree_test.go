// SPDX-License-Identifier: Apache-2.0

package build

import (
	"archive/tar"
	"bytes"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// tarOf makes a tar of headers; the content of a file is its name.
func tarOf(t *testing.T, headers ...tar.Header) *bytes.Buffer {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range headers {
		if h.Typeflag == tar.TypeReg {
			h.Size = int64(len(h.Name))
		}
		if h.ModTime.IsZero() {
			h.ModTime = time.Unix(epoch, 0)
		}
		h.Format = tar.FormatPAX
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if h.Typeflag == tar.TypeReg {
			if _, err := w.Write([]byte(h.Name)); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return &b
}

func everything(string) bool { return true }

func TestScript(t *testing.T) {
	tr := newTree(t.TempDir())
	err := tr.read(tarOf(t,
		tar.Header{Name: "./", Typeflag: tar.TypeDir, Mode: 0o755},
		tar.Header{Name: "./dev/null", Typeflag: tar.TypeChar, Mode: 0o666},
		tar.Header{Name: "./bin/su", Typeflag: tar.TypeReg, Mode: 0o4755, Gid: 7},
		tar.Header{Name: "./bin/ping", Typeflag: tar.TypeReg, Mode: 0o755, PAXRecords: map[string]string{"SCHILY.xattr.security.capability": "\x01a\"\\"}},
		tar.Header{Name: "./usr/b c", Typeflag: tar.TypeReg, Mode: 0o644, ModTime: time.Unix(42, 0)},
		tar.Header{Name: "./usr/a", Typeflag: tar.TypeLink, Linkname: "./usr/b c"},
		tar.Header{Name: "./usr/z", Typeflag: tar.TypeSymlink, Mode: 0o777, Linkname: "b c"},
		tar.Header{Name: "./tmp", Typeflag: tar.TypeDir, Mode: 0o1777, Uid: 3},
	), everything)
	if err != nil {
		t.Fatal(err)
	}
	if err := tr.finish(); err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	writeScript(&b, tr)
	want := `cd /.
mkdir tmp
cd /.
mkdir usr
cd /usr
mkdir bin
cd /usr
write 2 "b c"
cd /usr/bin
write 1 ping
write 0 su
cd /usr
symlink z "b c"
ln "/usr/b c" a
cd /.
sif / mode 040755
sif tmp mode 041777
sif tmp uid 3
sif usr mode 040755
cd /usr
sif "b c" mode 0100644
sif "b c" links_count 2
sif "b c" mtime @42
sif bin mode 040755
cd /usr/bin
sif ping mode 0100755
ea_set ping security.capability "\001a\042\134"
sif su mode 0104755
sif su gid 7
cd /usr
`
	if d := cmp.Diff(want, b.String()); d != "" {
		t.Errorf("script (-want +got):\n%s", d)
	}
	if got, err := tr.content("usr/a"); err != nil || string(got) != "./usr/b c" {
		t.Errorf("content through a hard link: %q, %v", got, err)
	}
}

func TestOverlay(t *testing.T) {
	below, above := newTree(t.TempDir()), newTree(t.TempDir())
	file := func(to *tree, p, content string) {
		t.Helper()
		if err := to.file(p, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	file(below, "usr/bin/old", "old")
	file(below, "usr/bin/both", "below")
	below.dir("usr/bin", 0o711)
	file(above, "usr/bin/both", "above")
	file(above, "usr/bin/new", "new")
	if err := below.overlay(above); err != nil {
		t.Fatal(err)
	}
	for p, want := range map[string]string{"usr/bin/old": "old", "usr/bin/both": "above", "usr/bin/new": "new"} {
		if got, err := below.content(p); err != nil || string(got) != want {
			t.Errorf("%s: %q, %v; want %q", p, got, err, want)
		}
	}
	if mode := below.nodes["usr/bin"].Mode; mode != 0o711 {
		t.Errorf("usr/bin has mode %o", mode)
	}
}

func TestReadRefuses(t *testing.T) {
	for name, h := range map[string]tar.Header{
		`bad path "../x" in the tar`:                   {Name: "../x", Typeflag: tar.TypeReg},
		`bad path "/x" in the tar`:                     {Name: "/x", Typeflag: tar.TypeReg},
		"bad path \"a\\nrm b\" in the tar":             {Name: "a\nrm b", Typeflag: tar.TypeReg},
		`disk has a type that boxes do not hold ('4')`: {Name: "disk", Typeflag: tar.TypeBlock},
	} {
		err := newTree(t.TempDir()).read(tarOf(t, h), everything)
		if err == nil || err.Error() != name {
			t.Errorf("got %v, want %s", err, name)
		}
	}
}

func TestFinishRefuses(t *testing.T) {
	tr := newTree(t.TempDir())
	tr.link("a", "b")
	tr.link("a/c", "d")
	if err := tr.finish(); err == nil || err.Error() != "a/c is not in a directory" {
		t.Errorf("got %v", err)
	}
	tr = newTree(t.TempDir())
	tr.add(&node{Path: "a", Type: tar.TypeLink, Target: "b"})
	if err := tr.finish(); err == nil || err.Error() != "a is a hard link to b, which is no file" {
		t.Errorf("got %v", err)
	}
}

func TestInstalled(t *testing.T) {
	a, b := newTree(t.TempDir()), newTree(t.TempDir())
	if err := a.file("var/lib/dpkg/status", []byte("Package: zlib\nStatus: install ok\nVersion: 1:2\n\nPackage: apt\nVersion: 3\nDescription: x\n Version: 9\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := b.file(manifestName, []byte("kmod=30\napt=3\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	got, err := installed(a, b)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff([]string{"apt=3", "kmod=30", "zlib=1:2"}, got); d != "" {
		t.Errorf("packages (-want +got):\n%s", d)
	}
	if b.nodes[manifestName] != nil {
		t.Error("the list is still in the tree")
	}
}

func TestWithoutAgent(t *testing.T) {
	got := withoutAgent([]byte("::sysinit:/a\n::respawn:/usr/sbin/lab-agent\n::respawn:/b\n"))
	if want := "::sysinit:/a\n::respawn:/b\n"; string(got) != want {
		t.Errorf("got %q, want %q", got, want)
	}
}
