// SPDX-License-Identifier: Apache-2.0

//go:build linux

package share

import (
	"bytes"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/labfile/lab/internal/guest/foldercache"
)

// cacheGuest is a guest on the second stream.
type cacheGuest struct {
	*testing.T
	out *foldercache.Writer
	in  *foldercache.Reader
	id  uint64
}

func dialCache(t *testing.T, folder Folder) *cacheGuest {
	t.Helper()
	host, guest := net.Pipe()
	var wg sync.WaitGroup
	wg.Go(func() { _ = ServeCache(host, folder) })
	t.Cleanup(func() { guest.Close(); wg.Wait() })
	return &cacheGuest{T: t, out: foldercache.NewWriter(guest), in: foldercache.NewReader(guest)}
}

// ask returns the answer; other messages of the host are passed over.
func (g *cacheGuest) ask(dir, from string) foldercache.Message {
	g.Helper()
	g.id++
	if err := g.out.Request(foldercache.Request{ID: g.id, Path: dir, From: from}); err != nil {
		g.Fatal(err)
	}
	for {
		m, err := g.in.Message()
		if err != nil {
			g.Fatal(err)
		}
		if m.ID == g.id {
			return m
		}
	}
}

func (g *cacheGuest) names(dir, from string) string {
	g.Helper()
	m := g.ask(dir, from)
	if m.Errno != 0 {
		return m.Errno.Error()
	}
	var names []string
	for _, f := range m.Files {
		name := f.Name
		if from != "" {
			name += "=" + string(f.Data)
		}
		names = append(names, name)
	}
	return strings.Join(names, " ")
}

func TestCacheServer(t *testing.T) {
	f := newFixture(t, false)
	for name, to := range map[string]string{"out": f.outside, "in": "sub", "up": ".."} {
		if err := os.Symlink(to, filepath.Join(f.dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	if err := syscall.Mkfifo(filepath.Join(f.dir, "pipe"), 0o600); err != nil {
		t.Fatal(err)
	}
	f.write(filepath.Join(f.dir, "large"), strings.Repeat("x", foldercache.SmallFile+1))
	f.write(filepath.Join(f.dir, "zero"), "")
	g := dialCache(t, Folder{Path: f.dir})
	for _, tc := range []struct{ dir, from, want string }{
		{"/", "", "file in large out pipe sub up zero"},
		{"/sub", "", "deep"},
		{"/../..", "", "file in large out pipe sub up zero"},
		{"/", "a", "file=text\n zero="},
		{"/", "g", "zero="},
		{"/sub", "../../outside/secret", "deep=deep\n"},
		{"/out", "", "permission denied"},
		{"/out", "secret", "permission denied"},
		{"/up", "", "permission denied"},
		{"/none", "", "no such file or directory"},
		{"/file", "", "not a directory"},
	} {
		got := g.names(tc.dir, tc.from)
		if tc.want == "permission denied" && got == "input/output error" { // os.Root has no number for it
			got = tc.want
		}
		if got != tc.want {
			t.Errorf("%q from %q: got %q, want %q", tc.dir, tc.from, got, tc.want)
		}
	}
	st, err := os.Stat(filepath.Join(f.dir, "file"))
	if err != nil {
		t.Fatal(err)
	}
	sys := st.Sys().(*syscall.Stat_t)
	if m := g.ask("/", ""); m.Files[0].Attr.Ino != sys.Ino || m.Files[0].Size != 5 || m.Files[0].Mode != sys.Mode || !m.Files[0].Attr.Mtime.Equal(st.ModTime()) {
		t.Errorf("got %+v", m.Files[0])
	}
}

func TestCacheServerTellsChanges(t *testing.T) {
	f := newFixture(t, false)
	g := dialCache(t, Folder{Path: f.dir})
	next := func(want string) {
		t.Helper()
		for {
			m, err := g.in.Message()
			if err != nil {
				t.Fatalf("waiting for %q: %v", want, err)
			}
			if got := string(m.Kind) + " " + m.Path + " " + m.Name; got == want {
				return
			}
		}
	}
	g.ask("/", "")
	g.ask("/sub", "")
	f.write(filepath.Join(f.dir, "file"), "longer\n")
	next("i / file")
	if err := os.Chmod(filepath.Join(f.dir, "sub", "deep"), 0o600); err != nil {
		t.Fatal(err)
	}
	next("i /sub deep")
	if err := os.Rename(filepath.Join(f.dir, "sub"), filepath.Join(f.dir, "moved")); err != nil {
		t.Fatal(err)
	}
	next("i / moved")
	if got := g.names("/moved", ""); got != "deep" {
		t.Errorf("moved has %q", got)
	}
	// Another folder of its name ends the stream: all that was said is of the one before.
	if err := os.Rename(f.dir, f.dir+"-old"); err != nil {
		t.Fatal(err)
	}
	for {
		if _, err := g.in.Message(); err != nil {
			break
		}
	}
}

func FuzzServeCache(f *testing.F) {
	var b bytes.Buffer
	w := foldercache.NewWriter(&b)
	_ = w.Request(foldercache.Request{ID: 1, Path: "/sub"})
	_ = w.Request(foldercache.Request{ID: 2, Path: "/../outside", From: "secret"})
	f.Add(b.Bytes())
	f.Fuzz(func(t *testing.T, b []byte) {
		top := t.TempDir()
		dir := filepath.Join(top, "shared")
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(top, "secret"), []byte(secret), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink("..", filepath.Join(dir, "up")); err != nil {
			t.Fatal(err)
		}
		var out bytes.Buffer
		_ = ServeCache(struct {
			io.Reader
			io.Writer
			io.Closer
		}{bytes.NewReader(b), &out, io.NopCloser(nil)}, Folder{Path: dir})
		if bytes.Contains(out.Bytes(), []byte(strings.TrimSpace(secret))) {
			t.Error("the guest got a secret")
		}
		in := foldercache.NewReader(&out)
		for {
			if _, err := in.Message(); err != nil {
				break
			}
		}
	})
}
