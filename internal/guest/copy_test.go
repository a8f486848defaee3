// SPDX-License-Identifier: Apache-2.0

package guest_test

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/labfile/lab/internal/guest"
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

// bothWays runs a test with an agent that takes a stream of files, and with an ssh server
// that knows sftp only: in a guest that has tar, and in one that has not.
func bothWays(t *testing.T, test func(t *testing.T, b *box)) {
	t.Run("stream", func(t *testing.T) { test(t, newBox(t)) })
	t.Run("tar", func(t *testing.T) {
		b := newBox(t)
		b.agent.Files = nil
		test(t, b)
	})
	t.Run("sftp", func(t *testing.T) {
		b := newBox(t)
		b.agent.Files = nil
		b.without(t, "tar")
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
