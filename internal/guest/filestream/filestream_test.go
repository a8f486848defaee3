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
