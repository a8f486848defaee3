// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/labfile/lab/internal/guest/filestream"
)

// hostileStream is what a hostile guest may send.
func hostileStream(t testing.TB, entries ...filestream.Entry) []byte {
	t.Helper()
	var b bytes.Buffer
	e := filestream.NewEncoder(&b)
	for _, x := range entries {
		if err := e.Entry(x); err != nil {
			t.Fatal(err)
		}
		if x.Kind == filestream.File {
			if err := errors.Join(e.Chunk(0, []byte("gotcha")), e.Close(0)); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := e.End(filestream.Outcome{}); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// The kinds of entries that a guest sends, in short.
func file(name string) filestream.Entry { return filestream.Entry{Kind: filestream.File, Name: name} }

func dir(name string) filestream.Entry {
	return filestream.Entry{Kind: filestream.Dir, Name: name, Mode: 0o755}
}

func link(name, to string) filestream.Entry {
	return filestream.Entry{Kind: filestream.Link, Name: name, To: to}
}
func announce(n int64) filestream.Entry { return filestream.Entry{Kind: filestream.Count, Size: n} }

var up = filestream.Entry{Kind: filestream.Up}

// field is a folder with a target, and beside it what must stay as it is.
type field struct{ dir, target, victim, secret string }

func newField(t testing.TB) field {
	t.Helper()
	d := t.TempDir()
	f := field{d, filepath.Join(d, "target"), filepath.Join(d, "victim"), filepath.Join(d, "victim", "secret")}
	for _, d := range []string{f.target, f.victim} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(f.secret, []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	return f
}

// receive is one "lab cp" of sources from a guest that sends stream.
func (f field) receive(t testing.TB, stream []byte, sources ...string) error {
	t.Helper()
	d, err := newDestination(t.Context(), sources, f.target, CopyOptions{})
	if err != nil {
		t.Fatal(err)
	}
	_, err = d.receive(filestream.NewDecoder(bytes.NewReader(stream)))
	return err
}

// untouched reports what was written outside the target.
func (f field) untouched(t testing.TB) {
	t.Helper()
	for d, want := range map[string]int{f.dir: 2, f.victim: 1} {
		if left, err := os.ReadDir(d); err != nil || len(left) != want {
			t.Errorf("written outside the target: %v, %v", left, err)
		}
	}
	got, err := os.ReadFile(f.secret)
	fi, serr := os.Lstat(f.secret)
	if err != nil || serr != nil || string(got) != "mine" || fi.Mode() != 0o600 {
		t.Errorf("a file outside the target has %q now, %v: %v, %v", got, fi, err, serr)
	}
	if fi, err := os.Lstat(f.victim); err != nil || fi.Mode() != fs.ModeDir|0o755 {
		t.Errorf("the folder outside the target: %v, %v", fi, err)
	}
}

func TestHostileTarget(t *testing.T) {
	both := []string{"dir/.", "b"}
	for name, tc := range map[string]struct {
		sources []string
		entries []filestream.Entry
		want    error
	}{
		"file through a link":          {both, []filestream.Entry{announce(2), dir("."), link("b", "../victim/secret"), up, file("b")}, filestream.ErrLeadsOut},
		"file through a dangling link": {both, []filestream.Entry{announce(2), dir("."), link("b", "../victim/new"), up, file("b")}, filestream.ErrLeadsOut},
		"folder through a link":        {both, []filestream.Entry{announce(2), dir("."), link("b", "../victim"), up, dir("b"), file("secret"), up}, filestream.ErrLeadsOut},
		"folder in place of a link":    {both, []filestream.Entry{announce(2), dir("."), link("b", "../new"), up, dir("b"), up}, filestream.ErrLeadsOut},
		"a name of the guest's":        {[]string{"dir/.", "x*"}, []filestream.Entry{announce(2), dir("."), link("x1", "../victim/secret"), up, file("x1")}, filestream.ErrLeadsOut},
		"beside the folder":            {[]string{"x*"}, []filestream.Entry{announce(1), dir("x"), link("l", ".."), dir("l"), file("y"), up, up}, filestream.ErrLeadsOut},
		"beside the named folder":      {[]string{"b"}, []filestream.Entry{announce(1), dir("b"), link("l", ".."), dir("l"), file("y"), up, up}, filestream.ErrLeadsOut},
		"dot file for a pattern":       {[]string{"*"}, []filestream.Entry{announce(1), file(".bashrc")}, ErrUnsafeName},
		"dot folder for a pattern":     {[]string{"logs/*"}, []filestream.Entry{announce(1), dir(".ssh"), file("authorized_keys"), up}, ErrUnsafeName},
		"dot file in brackets":         {[]string{"[.]*"}, []filestream.Entry{announce(1), file(".bashrc")}, ErrUnsafeName},
		"dot file that was asked for":  {[]string{".b*"}, []filestream.Entry{announce(1), file(".bashrc")}, nil},
		"more than announced":          {[]string{"x*"}, []filestream.Entry{announce(1), file("x1"), file("x2")}, filestream.ErrMalformed},
		"more than named":              {[]string{"b"}, []filestream.Entry{announce(9), file("b"), file("b")}, filestream.ErrMalformed},
		"more, not announced":          {[]string{"x*"}, []filestream.Entry{file("x1"), file("x2")}, filestream.ErrMalformed},
		"announced late":               {[]string{"x*"}, []filestream.Entry{file("x1"), announce(2), file("x2")}, filestream.ErrMalformed},
		"announced twice":              {[]string{"x*"}, []filestream.Entry{announce(1), announce(2), file("x1"), file("x2")}, filestream.ErrMalformed},
		"as it should be":              {[]string{"dir/.", "b", "x*"}, []filestream.Entry{announce(4), dir("."), file("y"), up, file("b"), file("x1"), dir("x2"), up}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			f := newField(t)
			if err := f.receive(t, hostileStream(t, tc.entries...), tc.sources...); !errors.Is(err, tc.want) {
				t.Errorf("got %v, want %v", err, tc.want)
			}
			f.untouched(t)
			for _, name := range []string{"y", "b/l/y"} {
				if _, err := os.Lstat(filepath.Join(f.target, name)); err == nil && tc.want != nil {
					t.Errorf("%s was written", name)
				}
			}
		})
	}
}

// A link that one copy left in a folder is not followed out of it by the next, but one
// that the user names as the target is.
func TestHostileLinkOfAnEarlierCopy(t *testing.T) {
	for _, to := range []string{"../victim/secret", "../victim/new", "../victim", "/"} {
		f := newField(t)
		if err := f.receive(t, hostileStream(t, announce(1), dir("."), link("b", to), up), "dir/."); err != nil {
			t.Fatal(err)
		}
		for _, stream := range [][]byte{hostileStream(t, announce(1), file("b")), hostileStream(t, announce(1), dir("b"), file("secret"), up)} {
			if err := f.receive(t, stream, "b"); !errors.Is(err, filestream.ErrLeadsOut) {
				t.Errorf("a link to %s: got %v, want ErrLeadsOut", to, err)
			}
		}
		f.untouched(t)
	}
	f := newField(t)
	if err := os.Symlink("../victim/secret", filepath.Join(f.target, "out")); err != nil {
		t.Fatal(err)
	}
	f.target = filepath.Join(f.target, "out")
	if err := f.receive(t, hostileStream(t, announce(1), file("b")), "b"); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(f.secret); err != nil || string(got) != "gotcha" {
		t.Errorf("a link that the user names leads to %q, %v", got, err)
	}
}

// FuzzDestination reads what a guest sends from pairs of bytes, so that most inputs are
// well formed: the kind of an entry and its name, then where a link leads.
func FuzzDestination(f *testing.F) {
	names := []string{".", "b", "x", "x1", "l", ".bashrc", "..", "secret", "new"}
	links := []string{"../victim", "../victim/secret", "../victim/new", "..", "b", "x", "../../victim", "/", "."}
	f.Add([]byte{1, 0, 2, 10, 3, 0, 0, 1})      // "." with a link b to the secret, then b
	f.Add([]byte{1, 0, 2, 1, 3, 0, 1, 1, 0, 7}) // likewise, and b is a folder
	f.Add([]byte{1, 2, 2, 40, 1, 4, 0, 7})      // a link in x
	f.Add([]byte{1, 1, 3, 0, 1, 0, 2, 64, 3, 0, 0, 3})
	f.Fuzz(func(t *testing.T, b []byte) {
		entries := []filestream.Entry{announce(9)}
		for ; len(b) >= 2; b = b[2:] {
			name := names[int(b[1])%len(names)]
			switch b[0] % 4 {
			case 0:
				entries = append(entries, file(name))
			case 1:
				entries = append(entries, dir(name))
			case 2:
				entries = append(entries, link(name, links[int(b[1])/len(names)%len(links)]))
			case 3:
				entries = append(entries, up)
			}
		}
		w := newField(t)
		_ = w.receive(t, hostileStream(t, entries...), ".", "b", "x*")
		w.untouched(t)
		// Again, over the links that were left.
		_ = w.receive(t, hostileStream(t, entries...), ".", "b", "x*")
		w.untouched(t)
	})
}
