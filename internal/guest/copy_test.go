// SPDX-License-Identifier: Apache-2.0

package guest_test

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/pkg/sftp"
	"golang.org/x/crypto/ssh"

	"github.com/labfile/lab/internal/guest"
	"github.com/labfile/lab/internal/guest/filestream"
)

// listing describes what is below dir, a line each.
func listing(t *testing.T, dir string) string {
	t.Helper()
	var lines []string
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		fi, err := d.Info()
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		line := fmt.Sprintf("%s %s", fi.Mode(), rel)
		switch {
		case fi.Mode().IsRegular():
			b, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			line += fmt.Sprintf(" %q %s", b, fi.ModTime().UTC().Format(time.RFC3339))
		case fi.IsDir():
			line += " " + fi.ModTime().UTC().Format(time.RFC3339)
		default:
			to, err := os.Readlink(path)
			if err != nil {
				return err
			}
			line += " -> " + to
		}
		lines = append(lines, line)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return strings.Join(lines, "\n")
}

// makeTree makes a folder with one of everything in it.
func makeTree(t *testing.T, dir string) {
	t.Helper()
	past := time.Date(2001, 2, 3, 4, 5, 6, 0, time.UTC)
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(os.MkdirAll(filepath.Join(dir, "deep/er"), 0o755))
	for name, mode := range map[string]fs.FileMode{"plain": 0o644, "program": 0o755, "secret": 0o600, "deep/er/with 'space'": 0o640, "empty": 0o644} {
		text := name
		if name == "empty" {
			text = ""
		}
		p := filepath.Join(dir, name)
		must(os.WriteFile(p, []byte(text), mode))
		must(os.Chmod(p, mode))
		must(os.Chtimes(p, past, past))
	}
	must(os.Symlink("plain", filepath.Join(dir, "link")))
	must(os.Symlink("/no/such", filepath.Join(dir, "deep/dangling")))
	must(os.Chmod(filepath.Join(dir, "deep/er"), 0o555))
	for _, d := range []string{"deep/er", "deep", "."} {
		must(os.Chtimes(filepath.Join(dir, d), past, past))
	}
	t.Cleanup(func() {
		_ = filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				_ = os.Chmod(p, 0o755)
			}
			return nil
		})
	})
}

// writable makes the folders of a copy removable at the end of the test.
func writable(t *testing.T, dirs ...string) {
	t.Cleanup(func() {
		for _, d := range dirs {
			_ = os.Chmod(filepath.Join(d, "deep/er"), 0o755)
		}
	})
}

// bothWays runs a test with an agent that takes a stream of files, and with one of an
// earlier lab, which knows sftp only.
func bothWays(t *testing.T, test func(t *testing.T, b *box)) {
	t.Run("stream", func(t *testing.T) { test(t, newBox(t)) })
	t.Run("sftp", func(t *testing.T) {
		b := newBox(t)
		b.agent.Files = nil
		test(t, b)
	})
}

func TestCopyTree(t *testing.T) { bothWays(t, testCopyTree) }

func testCopyTree(t *testing.T, b *box) {
	c := b.connect(t)
	src := filepath.Join(t.TempDir(), "tree")
	makeTree(t, src)
	want := listing(t, src)
	back := t.TempDir()
	writable(t, filepath.Join(b.home, "new"), filepath.Join(b.home, "tree"), filepath.Join(back, "new"), filepath.Join(back, "tree"))
	ctx := testContext(t)

	// To a new name, then into a folder; the second time over what is there.
	if err := c.Upload(ctx, []string{src}, "new", guest.CopyOptions{}); err != nil {
		t.Fatal(err)
	}
	if got := listing(t, filepath.Join(b.home, "new")); got != want {
		t.Errorf("uploaded\n%s\nwant\n%s", got, want)
	}
	if err := c.Upload(ctx, []string{src + "/"}, "~/", guest.CopyOptions{}); err != nil {
		t.Fatal(err)
	}
	if got := listing(t, filepath.Join(b.home, "tree")); got != want {
		t.Errorf("uploaded\n%s\nwant\n%s", got, want)
	}

	if err := c.Download(ctx, []string{"tree"}, filepath.Join(back, "new"), guest.CopyOptions{}); err != nil {
		t.Fatal(err)
	}
	if got := listing(t, filepath.Join(back, "new")); got != want {
		t.Errorf("downloaded\n%s\nwant\n%s", got, want)
	}
	if err := c.Download(ctx, []string{b.home + "/tree"}, back, guest.CopyOptions{}); err != nil {
		t.Fatal(err)
	}
	if got := listing(t, filepath.Join(back, "tree")); got != want {
		t.Errorf("downloaded\n%s\nwant\n%s", got, want)
	}
}

func TestCopyOver(t *testing.T) { bothWays(t, testCopyOver) }

func testCopyOver(t *testing.T, b *box) {
	c := b.connect(t)
	dir := t.TempDir()
	src, dst := filepath.Join(dir, "src"), filepath.Join(dir, "dst")
	if err := os.WriteFile(src, []byte("new"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, f := range []string{filepath.Join(b.home, "file"), dst} {
		if err := os.WriteFile(f, []byte("old and longer"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	link := filepath.Join(dir, "link")
	if err := os.Symlink(dst, link); err != nil {
		t.Fatal(err)
	}
	ctx := testContext(t)
	if err := c.Upload(ctx, []string{src}, "file", guest.CopyOptions{}); err != nil {
		t.Fatal(err)
	}
	// Through a link of the user's own.
	if err := c.Download(ctx, []string{"file"}, link, guest.CopyOptions{}); err != nil {
		t.Fatal(err)
	}
	for _, f := range []string{filepath.Join(b.home, "file"), dst} {
		if got, err := os.ReadFile(f); err != nil || string(got) != "new" {
			t.Errorf("%s: %q, %v", f, got, err)
		}
	}
	if to, err := os.Readlink(link); err != nil || to != dst {
		t.Errorf("the link: %q, %v", to, err)
	}
}

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
		"no name":       {c.Upload(ctx, []string{"-"}, "x/", guest.CopyOptions{Stdin: strings.NewReader("")}), "what comes from standard input needs the name of a file there"},
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

func TestCopyErrors(t *testing.T) { bothWays(t, testCopyErrors) }

func testCopyErrors(t *testing.T, b *box) {
	c := b.connect(t)
	ctx := testContext(t)
	dir := t.TempDir()
	src := filepath.Join(dir, "src")
	if err := os.WriteFile(src, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name string
		err  error
		want string
	}{
		{"no source here", c.Upload(ctx, []string{dir + "/no"}, "x", guest.CopyOptions{}), "there is no file or folder " + dir + "/no"},
		{"no source there", c.Download(ctx, []string{"no"}, dir, guest.CopyOptions{}), "web has no file or folder no"},
		{"no folder there", c.Upload(ctx, []string{src}, "no/", guest.CopyOptions{}), "web has no folder no/"},
		{"no parent there", c.Upload(ctx, []string{src}, "no/x", guest.CopyOptions{}), "web has no folder no"},
		{"no folder here", c.Download(ctx, []string{"x"}, dir+"/no/", guest.CopyOptions{}), "there is no folder " + dir + "/no/"},
		{"no parent here", c.Download(ctx, []string{"x"}, dir+"/no/x", guest.CopyOptions{}), "there is no folder " + dir + "/no"},
		{"several to a file", c.Upload(ctx, []string{src, src}, src, guest.CopyOptions{}), "web has no folder " + src},
	} {
		if tc.err == nil || tc.err.Error() != tc.want {
			t.Errorf("%s: got %v, want %s", tc.name, tc.err, tc.want)
		}
	}
}

func TestCopySkips(t *testing.T) { bothWays(t, testCopySkips) }

func testCopySkips(t *testing.T, b *box) {
	c := b.connect(t)
	for _, dir := range []string{filepath.Join(b.home, "odd"), filepath.Join(t.TempDir(), "odd")} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := syscall.Mkfifo(filepath.Join(dir, "fifo"), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "file"), []byte("x"), 0o644); err != nil {
			t.Fatal(err)
		}
		var err error
		var copied, skipped string
		if strings.HasPrefix(dir, b.home) {
			target := t.TempDir()
			err = c.Download(testContext(t), []string{"odd"}, target, guest.CopyOptions{})
			copied, skipped = filepath.Join(target, "odd/file"), "odd/fifo"
		} else {
			err = c.Upload(testContext(t), []string{dir}, "copy", guest.CopyOptions{})
			copied, skipped = filepath.Join(b.home, "copy/file"), dir+"/fifo"
		}
		var skip *guest.SkippedError
		if !errors.As(err, &skip) || !slices.Equal(skip.Paths, []string{skipped}) {
			t.Errorf("got %v, want %s skipped", err, skipped)
		}
		if _, err := os.Stat(copied); err != nil {
			t.Error(err)
		}
	}
}

func TestCopyLarge(t *testing.T) { bothWays(t, testCopyLarge) }

func testCopyLarge(t *testing.T, b *box) {
	c := b.connect(t)
	dir := t.TempDir()
	data := make([]byte, 64<<20)
	_, _ = rand.Read(data)
	src := filepath.Join(dir, "src")
	if err := os.WriteFile(src, data, 0o644); err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	var seen []int64
	opt := guest.CopyOptions{Progress: func(path string, done, total int64) {
		mu.Lock()
		defer mu.Unlock()
		seen = append(seen, done)
		if total != int64(len(data)) {
			t.Errorf("%s: total %d", path, total)
		}
	}}
	start := time.Now()
	if err := c.Upload(testContext(t), []string{src}, "big", opt); err != nil {
		t.Fatal(err)
	}
	up := time.Since(start)
	start = time.Now()
	if err := c.Download(testContext(t), []string{"big"}, dir+"/back", opt); err != nil {
		t.Fatal(err)
	}
	t.Logf("64 MiB: up %v, down %v", up, time.Since(start))
	got, err := os.ReadFile(dir + "/back")
	if err != nil || string(got) != string(data) {
		t.Errorf("got %d bytes, %v", len(got), err)
	}
	half := slices.Index(seen[1:], 0) + 1
	if !sort.SliceIsSorted(seen[:half], func(i, j int) bool { return seen[i] < seen[j] }) || seen[half-1] != int64(len(data)) || seen[len(seen)-1] != int64(len(data)) {
		t.Errorf("progress: %d", seen)
	}
}

func TestCopyCancelled(t *testing.T) { bothWays(t, testCopyCancelled) }

func testCopyCancelled(t *testing.T, b *box) {
	c := b.connect(t)
	dir := t.TempDir()
	src := filepath.Join(b.home, "src")
	f, err := os.Create(src)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.Truncate(1<<40), f.Close()); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancelCause(testContext(t))
	cause := errors.New("changed my mind")
	if b.agent.Files != nil { // which skips what is empty
		src = "/dev/zero"
	}
	err = c.Download(ctx, []string{src}, dir, guest.CopyOptions{Progress: func(_ string, done, _ int64) {
		if done > 0 {
			cancel(cause)
		}
	}})
	if !errors.Is(err, cause) {
		t.Errorf("got %v, want %v", err, cause)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

// hostile is a file server that lies. Its folder "evil" holds entries; a file's
// content is always "gotcha".
type hostile struct{ entries []fs.FileInfo }

type lie struct {
	name string
	mode fs.FileMode
}

func (l lie) Name() string       { return l.name }
func (l lie) Size() int64        { return 6 }
func (l lie) Mode() fs.FileMode  { return l.mode }
func (l lie) ModTime() time.Time { return time.Unix(1, 0) }
func (l lie) IsDir() bool        { return l.mode.IsDir() }
func (l lie) Sys() any           { return nil }

type lister []fs.FileInfo

func (l lister) ListAt(to []fs.FileInfo, off int64) (int, error) {
	if off >= int64(len(l)) {
		return 0, io.EOF
	}
	n := copy(to, l[off:])
	if int(off)+n == len(l) {
		return n, io.EOF
	}
	return n, nil
}

func (h hostile) Fileread(*sftp.Request) (io.ReaderAt, error) {
	return strings.NewReader("gotcha"), nil
}

func (h hostile) Filelist(r *sftp.Request) (sftp.ListerAt, error) {
	switch r.Method {
	case "List":
		if strings.Count(r.Filepath, "/") > 1 {
			return lister{lie{"authorized_keys", 0o600}}, nil
		}
		return lister(h.entries), nil
	case "Readlink":
		return lister{lie{name: "../victim"}}, nil
	}
	return lister{lie{"evil", fs.ModeDir | 0o755}}, nil
}

func TestHostileNames(t *testing.T) {
	host, key := newKey(t), newKey(t)
	for _, tc := range []struct {
		name    string
		entries []fs.FileInfo
		unsafe  bool // the others are made harmless: the sftp client cuts folders off names
	}{
		{"parent", []fs.FileInfo{lie{"../victim/x", 0o644}}, false},
		{"absolute", []fs.FileInfo{lie{"/tmp/x", 0o644}}, false},
		{"empty", []fs.FileInfo{lie{"", 0o644}, lie{"..", 0o644}}, false},
		{"nul", []fs.FileInfo{lie{"a\x00b", 0o644}}, true},
		{"folder through a link", []fs.FileInfo{lie{"x", fs.ModeSymlink}, lie{"x", fs.ModeDir | 0o755}}, false},
		{"file through a link", []fs.FileInfo{lie{"x", fs.ModeSymlink}, lie{"x", 0o644}}, false},
		{"set-uid", []fs.FileInfo{lie{"x", fs.ModeSetuid | 0o755}}, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := serveHostile(t, host, key, hostile{tc.entries})
			dir := t.TempDir()
			victim, target := filepath.Join(dir, "victim"), filepath.Join(dir, "target")
			for _, d := range []string{victim, target} {
				if err := os.Mkdir(d, 0o755); err != nil {
					t.Fatal(err)
				}
			}
			err := c.Download(testContext(t), []string{"evil"}, target, guest.CopyOptions{})
			if got := errors.Is(err, guest.ErrUnsafeName); got != tc.unsafe {
				t.Errorf("error %v, want ErrUnsafeName: %v", err, tc.unsafe)
			}
			if left, err := os.ReadDir(victim); err != nil || len(left) > 0 {
				t.Errorf("it was written outside the target: %v, %v", left, err)
			}
			if fi, err := os.Stat(target + "/evil/x"); err == nil && fi.Mode()&fs.ModeSetuid != 0 {
				t.Error("the set-uid bit was copied")
			}
		})
	}
}

// serveHostile logs in to a server whose files are h's.
func serveHostile(t *testing.T, host, key guest.Key, h hostile) *guest.Client {
	t.Helper()
	dir := t.TempDir()
	l, err := net.Listen("unix", filepath.Join(dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		sc := &ssh.ServerConfig{NoClientAuth: true}
		sc.AddHostKey(host.Signer)
		_, chans, reqs, err := ssh.NewServerConn(conn, sc)
		if err != nil {
			return
		}
		go ssh.DiscardRequests(reqs)
		for nc := range chans {
			ch, reqs, err := nc.Accept()
			if err != nil {
				return
			}
			go func() {
				for r := range reqs {
					_ = r.Reply(strings.HasSuffix(string(r.Payload), "sftp"), nil)
				}
			}()
			_ = sftp.NewRequestServer(ch, sftp.Handlers{FileGet: h, FileList: h}).Serve()
			ch.Close()
		}
	})
	c, err := guest.Connect(testContext(t), guest.Target{
		Machine: "evil", User: "root", Key: key.Signer, HostKey: host.Signer.PublicKey(),
		Dialers: guest.Dialers{Port: func(ctx context.Context, port uint16) (net.Conn, error) {
			if port != 22 {
				t.Errorf("port %d was dialled", port)
			}
			return net.Dial("unix", l.Addr().String())
		}},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close(); l.Close(); wg.Wait() })
	return c
}
