// SPDX-License-Identifier: Apache-2.0

package guest_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/iotest"
	"time"

	"github.com/labfile/lab/internal/guest"
	"github.com/labfile/lab/internal/guest/filestream"
)

// What is no ordinary file is written to, whether it was named or a link leads to it,
// and stays what it is; inside a folder it is refused.
func TestCopyToPipe(t *testing.T) { bothWays(t, testCopyToPipe) }

func testCopyToPipe(t *testing.T, b *box) {
	c := b.connect(t)
	dir := t.TempDir()
	if err := os.MkdirAll(filepath.Join(b.home, "tree"), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, f := range []string{"pipe", "tree/pipe"} {
		if err := os.WriteFile(filepath.Join(b.home, f), []byte("x"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	pipe, inside, link := filepath.Join(dir, "pipe"), filepath.Join(dir, "tree/pipe"), filepath.Join(dir, "link")
	if err := os.Mkdir(filepath.Join(dir, "tree"), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{pipe, inside} {
		if err := syscall.Mkfifo(p, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink(pipe, link); err != nil {
		t.Fatal(err)
	}
	for _, dst := range []string{pipe, link, dir} {
		got := make(chan string)
		go func() {
			b, err := os.ReadFile(pipe)
			got <- fmt.Sprint(string(b), err)
		}()
		if err := c.Download(testContext(t), []string{"pipe"}, dst, guest.CopyOptions{}); err != nil {
			t.Fatalf("Download to %q: %v", dst, err)
		}
		if got := <-got; got != "x<nil>" {
			t.Errorf("%s: the pipe got %s", dst, got)
		}
	}
	err := c.Download(testContext(t), []string{"tree"}, dir, guest.CopyOptions{})
	if err == nil || !strings.Contains(err.Error(), "not an ordinary file") {
		t.Errorf("a pipe inside a folder: %v", err)
	}
	for p, kind := range map[string]fs.FileMode{pipe: fs.ModeNamedPipe, inside: fs.ModeNamedPipe, link: fs.ModeSymlink} {
		if fi, err := os.Lstat(p); err != nil || fi.Mode().Type() != kind {
			t.Errorf("%s: %v, %v", p, fi, err)
		}
	}
	// Nobody reads it: waiting for that ends with the command.
	ctx, cancel := context.WithCancelCause(testContext(t))
	cause := errors.New("changed my mind")
	cancel(cause)
	if err := c.Download(ctx, []string{"pipe"}, pipe, guest.CopyOptions{}); !errors.Is(err, cause) {
		t.Errorf("a pipe without a reader: %v", err)
	}
}

// A file that is open is written to where its user is: nothing of it is lost.
func TestCopyToOpenFile(t *testing.T) { bothWays(t, testCopyToOpenFile) }

func testCopyToOpenFile(t *testing.T, b *box) {
	c := b.connect(t)
	dir := t.TempDir()
	log := filepath.Join(dir, "log")
	if err := errors.Join(os.WriteFile(filepath.Join(b.home, "f"), []byte("new\n"), 0o600), os.WriteFile(log, []byte("yesterday\n"), 0o644)); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(log, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	link := filepath.Join(dir, "stdout")
	if err := os.Symlink(fmt.Sprintf("/proc/self/fd/%d", f.Fd()), link); err != nil {
		t.Fatal(err)
	}
	for _, dst := range []string{link, fmt.Sprintf("/dev/fd/%d", f.Fd())} {
		if err := c.Download(testContext(t), []string{"f"}, dst, guest.CopyOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := f.WriteString("after\n"); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(log); err != nil || string(got) != "yesterday\nnew\nnew\nafter\n" {
		t.Errorf("the log has %q, %v", got, err)
	}
	if fi, err := os.Lstat(link); err != nil || fi.Mode().Type() != fs.ModeSymlink {
		t.Errorf("the link: %v, %v", fi, err)
	}
}

func TestCopyStdio(t *testing.T) { bothWays(t, testCopyStdio) }

func testCopyStdio(t *testing.T, b *box) {
	c := b.connect(t)
	ctx := testContext(t)
	if err := c.Upload(ctx, []string{"-"}, "f", guest.CopyOptions{Stdin: strings.NewReader("typed")}); err != nil {
		t.Fatal(err)
	}
	var out strings.Builder
	if err := c.Download(ctx, []string{"f"}, "-", guest.CopyOptions{Stdout: &out}); err != nil || out.String() != "typed" {
		t.Errorf("got %q, %v", &out, err)
	}
	fi, err := os.Stat(filepath.Join(b.home, "f"))
	if err != nil || fi.Mode().Perm()&0o600 != 0o600 {
		t.Errorf("%v, %v", fi, err)
	}
	for what, tc := range map[string]struct {
		err  error
		want string
	}{
		"into a folder": {c.Upload(ctx, []string{"-"}, ".", guest.CopyOptions{Stdin: strings.NewReader("")}), ". is a folder on web"},
		"folder":        {c.Download(ctx, []string{b.home}, "-", guest.CopyOptions{Stdout: &out}), "a folder cannot go to standard output: name a file, or use \"lab exec MACHINE -- tar c FOLDER\""},
		"two":           {c.Download(ctx, []string{"f", "f"}, "-", guest.CopyOptions{Stdout: &out}), "only one file can go to standard output"},
		"no name":       {c.Upload(ctx, []string{"-"}, "x/", guest.CopyOptions{Stdin: strings.NewReader("")}), "standard input needs the name of a file on the machine"},
	} {
		if tc.err == nil || tc.err.Error() != tc.want {
			t.Errorf("%s: got %v, want %s", what, tc.err, tc.want)
		}
	}
}

// A path that ends in a dot means what is in a folder, as for cp and scp.
func TestCopyContents(t *testing.T) { bothWays(t, testCopyContents) }

func testCopyContents(t *testing.T, b *box) {
	c := b.connect(t)
	ctx := testContext(t)
	src, back := filepath.Join(t.TempDir(), "tree"), t.TempDir()
	makeTree(t, src)
	want := listing(t, src)
	there := filepath.Join(b.home, "there")
	if err := os.Mkdir(there, 0o700); err != nil {
		t.Fatal(err)
	}
	writable(t, there, filepath.Join(b.home, "new"), back, filepath.Join(back, "new"))
	body := func(s string) string { _, rest, _ := strings.Cut(s, "\n"); return rest } // without the folder itself
	for _, to := range []string{"there", "new"} {
		if err := c.Upload(ctx, []string{src + "/."}, to, guest.CopyOptions{}); err != nil {
			t.Fatal(err)
		}
		if got := listing(t, filepath.Join(b.home, to)); body(got) != body(want) {
			t.Errorf("%s:\n%s\nwant\n%s", to, got, want)
		}
	}
	if fi, err := os.Stat(there); err != nil || fi.Mode().Perm() != 0o700 {
		t.Errorf("the folder that was there: %v, %v", fi, err)
	}
	if got := listing(t, filepath.Join(b.home, "new")); got != want {
		t.Errorf("a new folder:\n%s\nwant\n%s", got, want)
	}
	for _, to := range []string{back, back + "/new/"} {
		if err := c.Download(ctx, []string{"new/."}, to, guest.CopyOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	if got := listing(t, filepath.Join(back, "new")); got != want {
		t.Errorf("downloaded\n%s\nwant\n%s", got, want)
	}
	if _, err := os.Stat(filepath.Join(back, "plain")); err != nil {
		t.Error(err)
	}
}

func TestCopyPattern(t *testing.T) { bothWays(t, testCopyPattern) }

func testCopyPattern(t *testing.T, b *box) {
	c := b.connect(t)
	ctx := testContext(t)
	dir := t.TempDir()
	logs := filepath.Join(b.home, "logs")
	if err := os.Mkdir(logs, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, f := range []string{"a.log", "b.log", ".c.log", "d.txt", "[x].log"} {
		if err := os.WriteFile(filepath.Join(logs, f), []byte(f), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	// A link of the user's that leads out is not followed for a name that the guest chose.
	victim := filepath.Join(t.TempDir(), "victim")
	if err := os.Symlink(victim, filepath.Join(dir, "b.log")); err != nil {
		t.Fatal(err)
	}
	if err := c.Download(ctx, []string{"logs/*.log"}, dir, guest.CopyOptions{}); !errors.Is(err, filestream.ErrLeadsOut) {
		t.Errorf("a link that leads out: %v", err)
	}
	if err := os.Remove(filepath.Join(dir, "b.log")); err != nil {
		t.Fatal(err)
	}
	if err := c.Download(ctx, []string{"logs/*.log"}, dir, guest.CopyOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := c.Download(ctx, []string{"logs/[x].log"}, dir+"/exact", guest.CopyOptions{}); err != nil {
		t.Fatal(err)
	}
	got, err := filepath.Glob(dir + "/*")
	want := []string{dir + "/[x].log", dir + "/a.log", dir + "/b.log", dir + "/exact"}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("got %q, %v", got, err)
	}
	for what, tc := range map[string]struct {
		err  error
		want string
	}{
		"no match":  {c.Download(ctx, []string{"logs/*.no"}, dir, guest.CopyOptions{}), "web has no file that matches logs/*.no"},
		"no folder": {c.Download(ctx, []string{"logs/*.log"}, dir+"/no", guest.CopyOptions{}), "there is no folder " + dir + "/no"},
	} {
		if tc.err == nil || tc.err.Error() != tc.want {
			t.Errorf("%s: got %v, want %s", what, tc.err, tc.want)
		}
	}
}

// Holes arrive as holes, and times to the nanosecond, by the stream.
func TestCopySparse(t *testing.T) {
	b := newBox(t)
	c := b.connect(t)
	dir := t.TempDir()
	src := filepath.Join(dir, "src")
	f, err := os.Create(src)
	if err != nil {
		t.Fatal(err)
	}
	_, werr := f.WriteAt([]byte("middle"), 512<<20)
	when := time.Unix(1e9, 123456789)
	if err := errors.Join(werr, f.Truncate(1<<30), f.Close(), os.Chtimes(src, when, when)); err != nil {
		t.Fatal(err)
	}
	ctx := testContext(t)
	if err := errors.Join(c.Upload(ctx, []string{src}, "f", guest.CopyOptions{}), c.Download(ctx, []string{"f"}, dir+"/back", guest.CopyOptions{})); err != nil {
		t.Fatal(err)
	}
	fi, err := os.Stat(dir + "/back")
	if err != nil || fi.Size() != 1<<30 || !fi.ModTime().Equal(when) || fi.Sys().(*syscall.Stat_t).Blocks > 2048 {
		t.Errorf("%v, %v", fi, err)
	}
	g, err := os.Open(dir + "/back")
	if err != nil {
		t.Fatal(err)
	}
	defer g.Close()
	got := make([]byte, 8)
	if _, err := g.ReadAt(got, 512<<20-1); err != nil || string(got) != "\x00middle\x00" {
		t.Errorf("%q, %v", got, err)
	}
}

// An error of the source is ours, one of the target the guest's.
func TestUploadBlame(t *testing.T) {
	b := newBox(t)
	b.agent.Files = nil
	c := b.connect(t)
	broken := errors.New("broken pipe of ours")
	err := c.Upload(testContext(t), []string{"-"}, "f", guest.CopyOptions{Stdin: iotest.ErrReader(broken)})
	var there *filestream.Failure
	if !errors.Is(err, broken) || errors.As(err, &there) {
		t.Errorf("a source that breaks: %v", err)
	}
	err = c.Upload(testContext(t), []string{"-"}, "/dev/full", guest.CopyOptions{Stdin: strings.NewReader("x")})
	if !errors.As(err, &there) || !strings.Contains(err.Error(), "web: /dev/full: ") {
		t.Errorf("a target that is full: %v", err)
	}
}

func TestSkippedError(t *testing.T) {
	for want, e := range map[string]*guest.SkippedError{
		"not copied, being no ordinary files: a, b":                                {Paths: []string{"a", "b"}},
		"not copied, removed meanwhile: c":                                         {Vanished: []string{"c"}},
		"not copied, being no ordinary files: a; not copied, removed meanwhile: c": {Paths: []string{"a"}, Vanished: []string{"c"}},
	} {
		if got := e.Error(); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}

func TestUploadVanishing(t *testing.T) { bothWays(t, testUploadVanishing) }

func testUploadVanishing(t *testing.T, b *box) {
	c := b.connect(t)
	src := t.TempDir()
	for _, f := range []string{"a", "b", "d/e", "z"} {
		f = filepath.Join(src, f)
		if err := errors.Join(os.MkdirAll(filepath.Dir(f), 0o755), os.WriteFile(f, []byte("x"), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	err := c.Upload(testContext(t), []string{src}, "copy", guest.CopyOptions{Progress: func(path string, _, _ int64) {
		if path == src+"/a" { // the list of names is read by now
			if err := errors.Join(os.RemoveAll(src+"/b"), os.RemoveAll(src+"/d")); err != nil {
				t.Error(err)
			}
		}
	}})
	var skipped *guest.SkippedError
	if !errors.As(err, &skipped) || !slices.Equal(skipped.Vanished, []string{src + "/b", src + "/d"}) {
		t.Errorf("got %v, want b and d removed meanwhile", err)
	}
	if got, err := filepath.Glob(b.home + "/copy/*"); err != nil || !slices.Equal(got, []string{b.home + "/copy/a", b.home + "/copy/z"}) {
		t.Errorf("arrived: %q, %v", got, err)
	}
}
