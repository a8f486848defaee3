// SPDX-License-Identifier: Apache-2.0

package filestream

import (
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// stream is what a hostile system may send.
func stream(t testing.TB, entries ...Entry) []byte {
	t.Helper()
	var b bytes.Buffer
	e := NewEncoder(&b)
	for _, x := range entries {
		if err := e.Entry(x); err != nil {
			t.Fatal(err)
		}
		if x.Kind == File {
			if err := errors.Join(e.Chunk(0, []byte("gotcha")), e.Close(0)); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := e.End(Outcome{}); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// receive receives into a new folder "target", beside which "victim" is.
func receive(t testing.TB, b []byte) (dir string, err error) {
	t.Helper()
	dir = t.TempDir()
	for _, d := range []string{"victim", "target"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	root, err := os.OpenRoot(filepath.Join(dir, "target"))
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	r := &Receiver{Decoder: NewDecoder(bytes.NewReader(b)), Atomic: true, Where: func(e Entry) (Place, error) {
		at := Place{Tree: root, Name: e.Name}
		if e.Kind == Dir {
			if err := root.Mkdir(e.Name, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
				return at, err
			}
		}
		return at, nil
	}}
	_, err = r.Receive(context.Background())
	return dir, err
}

// untouched reports what was written outside the target.
func untouched(t testing.TB, dir string) {
	t.Helper()
	for d, want := range map[string]int{".": 2, "victim": 0} {
		if left, err := os.ReadDir(filepath.Join(dir, d)); err != nil || len(left) != want {
			t.Errorf("written outside the target: %v, %v", left, err)
		}
	}
}

func TestHostileStream(t *testing.T) {
	evil := Entry{Kind: Dir, Name: "evil", Mode: 0o755}
	up := Entry{Kind: Up}
	deep := make([]Entry, 2*MaxDepth)
	for i := range deep {
		deep[i] = evil
	}
	for name, tc := range map[string]struct {
		entries []Entry
		want    error // nil: harmless
	}{
		"parent":                {[]Entry{evil, {Kind: File, Name: "../victim/x"}}, ErrUnsafeName},
		"absolute":              {[]Entry{evil, {Kind: File, Name: "/tmp/x"}}, ErrUnsafeName},
		"dots":                  {[]Entry{evil, {Kind: Dir, Name: ".."}, {Kind: File, Name: "x"}}, ErrUnsafeName},
		"dot":                   {[]Entry{evil, {Kind: Dir, Name: "."}}, ErrUnsafeName},
		"nothing":               {[]Entry{evil, {Kind: File}}, ErrUnsafeName},
		"nul":                   {[]Entry{evil, {Kind: File, Name: "a\x00b"}}, ErrUnsafeName},
		"named so":              {[]Entry{{Kind: File, Name: "a/b"}}, ErrUnsafeName},
		"up and up":             {[]Entry{evil, up, up}, ErrMalformed},
		"without end":           {deep, ErrMalformed},
		"file through a link":   {[]Entry{evil, {Kind: Link, Name: "x", To: "../../victim/x"}, {Kind: File, Name: "x"}, up}, ErrLeadsOut},
		"folder through a link": {[]Entry{evil, {Kind: Link, Name: "x", To: "../../victim"}, {Kind: Dir, Name: "x"}, {Kind: File, Name: "y"}, up, up}, ErrLeadsOut},
		"absolute link":         {[]Entry{evil, {Kind: Link, Name: "x", To: "/"}, {Kind: Dir, Name: "x"}, {Kind: File, Name: "y"}, up, up}, ErrLeadsOut},
		"link in the link":      {[]Entry{evil, {Kind: Link, Name: "x", To: "../../victim"}, {Kind: Link, Name: "x", To: "/etc"}, up}, nil},
		"set-uid":               {[]Entry{evil, {Kind: File, Name: "x", Mode: fs.ModeSetuid | 0o755}, up}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			dir, err := receive(t, stream(t, tc.entries...))
			if !errors.Is(err, tc.want) {
				t.Errorf("got %v, want %v", err, tc.want)
			}
			untouched(t, dir)
			if fi, err := os.Stat(dir + "/target/evil/x"); err == nil && fi.Mode()&fs.ModeSetuid != 0 {
				t.Error("the set-uid bit was copied")
			}
		})
	}
}

// What is cut off leaves no half a file, and is an error wherever it is cut.
func TestCutOff(t *testing.T) {
	whole := stream(t, Entry{Kind: Dir, Name: "d", Mode: 0o755, Time: time.Unix(1, 0)}, Entry{Kind: File, Name: "f", Mode: 0o600}, Entry{Kind: Up})
	for n := range whole {
		dir, err := receive(t, whole[:n])
		if !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Fatalf("cut at %d: %v", n, err)
		}
		if b, err := os.ReadFile(dir + "/target/d/f"); err == nil && string(b) != "gotcha" {
			t.Errorf("cut at %d: left %q", n, b)
		}
		if parts, err := filepath.Glob(dir + "/target/d/.lab-part-*"); err != nil || len(parts) > 0 {
			t.Errorf("cut at %d: left %q, %v", n, parts, err)
		}
	}
}

func FuzzReceive(f *testing.F) {
	f.Add(stream(f, Entry{Kind: Dir, Name: "d", Mode: 0o755}, Entry{Kind: Link, Name: "l", To: "../victim"}, Entry{Kind: File, Name: "f", Mode: 0o600}, Entry{Kind: Up}))
	f.Add(stream(f, Entry{Kind: Dir, Name: "d"}, Entry{Kind: Dir, Name: ".."}, Entry{Kind: File, Name: "l"}))
	f.Fuzz(func(t *testing.T, b []byte) {
		dir, _ := receive(t, b)
		untouched(t, dir)
	})
}

func TestName(t *testing.T) {
	for path, want := range map[string]string{
		"a": "a", "a/": "a", "/x/a//": "a", ".": ".", "..": ".", "a/.": ".", "a/./": ".", "a/..": ".", "/": ".", "//": ".", "": ".",
	} {
		if got := Name(path); got != want {
			t.Errorf("Name(%q) = %q, want %q", path, got, want)
		}
	}
}

func TestVisible(t *testing.T) {
	got, err := Visible("/a/*/*", []string{"/a/b/c", "/a/.b/c", "/a/b/.c"})
	if err != nil || strings.Join(got, " ") != "/a/b/c" {
		t.Errorf("got %q, %v", got, err)
	}
	got, err = Visible(".*", []string{".c"})
	if err != nil || len(got) != 1 {
		t.Errorf("got %q, %v", got, err)
	}
	if _, err := Visible("*", []string{".c"}); err == nil || err.Error() != "there is no file or folder *" {
		t.Errorf("got %v", err)
	}
}

// recorder is a folder that records what is set in it.
type recorder struct {
	Plain
	set *[]string
}

func (r recorder) Chmod(name string, mode fs.FileMode) error {
	*r.set = append(*r.set, "mode of "+name)
	return r.Plain.Chmod(name, mode)
}

func (r recorder) Chtimes(name string, atime, mtime time.Time) error {
	*r.set = append(*r.set, "time of "+name)
	return r.Plain.Chtimes(name, atime, mtime)
}

// A folder that nobody may search has its time set before its mode.
func TestFolderTimeBeforeMode(t *testing.T) {
	dir := t.TempDir()
	t.Cleanup(func() { _ = os.Chmod(dir, 0o700) })
	when := time.Unix(1, 0)
	var set []string
	b := stream(t, Entry{Kind: Dir, Name: "d", Mode: 0o444, Time: when}, Entry{Kind: Up})
	r := &Receiver{Decoder: NewDecoder(bytes.NewReader(b)), Where: func(Entry) (Place, error) {
		return Place{Tree: recorder{Plain(dir), &set}, Name: "."}, nil
	}}
	if _, err := r.Receive(t.Context()); err != nil {
		t.Fatal(err)
	}
	if want := "time of .,mode of ."; strings.Join(set, ",") != want {
		t.Errorf("set %q, want %q", set, want)
	}
	if fi, err := os.Stat(dir); err != nil || fi.Mode().Perm() != 0o444 || !fi.ModTime().Equal(when) {
		t.Errorf("got %v, %v", fi, err)
	}
}

// What a link leads to gets the time too.
func TestTimeThroughLink(t *testing.T) {
	dir := t.TempDir()
	if err := errors.Join(os.WriteFile(dir+"/real", nil, 0o600), os.Symlink("real", dir+"/link")); err != nil {
		t.Fatal(err)
	}
	when := time.Unix(1, 0)
	b := stream(t, Entry{Kind: File, Name: "link", Mode: 0o640, Time: when})
	r := &Receiver{Decoder: NewDecoder(bytes.NewReader(b)), Atomic: true, Where: func(e Entry) (Place, error) {
		return Place{Tree: Plain(dir), Name: e.Name}, nil
	}}
	if _, err := r.Receive(t.Context()); err != nil {
		t.Fatal(err)
	}
	if fi, err := os.Lstat(dir + "/real"); err != nil || fi.Mode() != 0o640 || !fi.ModTime().Equal(when) {
		t.Errorf("got %v, %v", fi, err)
	}
	if fi, err := os.Lstat(dir + "/link"); err != nil || fi.Mode().Type() != fs.ModeSymlink {
		t.Errorf("the link: %v, %v", fi, err)
	}
}

// What is removed while its folder is sent is told, and the rest is sent.
func TestSendVanishing(t *testing.T) {
	dir := t.TempDir()
	for _, f := range []string{"a", "b", "d/e", "z"} {
		if err := errors.Join(os.MkdirAll(filepath.Dir(filepath.Join(dir, f)), 0o755), os.WriteFile(filepath.Join(dir, f), []byte("x"), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	var b bytes.Buffer
	s := &Sender{Encoder: NewEncoder(&b)}
	s.Progress = func(path string, _, _ int64) { // the list of names is read by now
		if path == filepath.Join(dir, "a") {
			if err := errors.Join(os.RemoveAll(dir+"/b"), os.RemoveAll(dir+"/d")); err != nil {
				t.Error(err)
			}
		}
	}
	if err := errors.Join(s.Send(t.Context(), dir), s.End(Outcome{Vanished: s.Vanished})); err != nil {
		t.Fatal(err)
	}
	if want := []string{dir + "/b", dir + "/d"}; !slices.Equal(s.Vanished, want) {
		t.Errorf("vanished %q, want %q", s.Vanished, want)
	}
	to := t.TempDir()
	r := &Receiver{Decoder: NewDecoder(&b), Where: func(Entry) (Place, error) { return Place{Tree: Plain(to), Name: "."}, nil }}
	o, err := r.Receive(t.Context())
	if err != nil || len(o.Vanished) != 2 {
		t.Errorf("got %+v, %v", o, err)
	}
	if got, err := filepath.Glob(to + "/*"); err != nil || !slices.Equal(got, []string{to + "/a", to + "/z"}) {
		t.Errorf("arrived: %q, %v", got, err)
	}
	if err := s.Send(t.Context(), dir+"/b"); err == nil {
		t.Error("what was named and does not exist is no error")
	}
}
