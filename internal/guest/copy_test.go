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

func TestCopyTree(t *testing.T) {
	b := newBox(t)
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
	if err := c.Download(ctx, []string{b.home + "/tree/."}, back, guest.CopyOptions{}); err != nil {
		t.Fatal(err)
	}
	if got := listing(t, filepath.Join(back, "tree")); got != want {
		t.Errorf("downloaded\n%s\nwant\n%s", got, want)
	}
}

func TestCopyOver(t *testing.T) {
	b := newBox(t)
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

// What is neither file nor folder, such as /dev/null, is not replaced by a copy.
func TestCopyToDevice(t *testing.T) {
	b := newBox(t)
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
	for _, tc := range []struct{ src, dst string }{{"pipe", pipe}, {"pipe", link}, {"pipe", dir}, {"tree", dir}} {
		err := c.Download(testContext(t), []string{tc.src}, tc.dst, guest.CopyOptions{})
		if err == nil || !strings.Contains(err.Error(), "not an ordinary file") {
			t.Errorf("Download(%q, %q) = %v", tc.src, tc.dst, err)
		}
	}
	for _, p := range []string{pipe, inside} {
		if fi, err := os.Lstat(p); err != nil || fi.Mode().Type() != fs.ModeNamedPipe {
			t.Errorf("%s: %v, %v", p, fi, err)
		}
	}
}

func TestCopyErrors(t *testing.T) {
	b := newBox(t)
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
		{"no source here", c.Upload(ctx, []string{dir + "/no"}, "x", guest.CopyOptions{}), "stat " + dir + "/no: no such file or directory"},
		{"no source there", c.Download(ctx, []string{"no"}, dir, guest.CopyOptions{}), `reading "no" in the guest: file does not exist`},
		{"no folder there", c.Upload(ctx, []string{src}, "no/", guest.CopyOptions{}), `copying into "no/": file does not exist`},
		{"no folder here", c.Download(ctx, []string{"."}, dir+"/no/", guest.CopyOptions{}), `copying into "` + dir + `/no/": stat ` + dir + `/no/: no such file or directory`},
		{"several to a file", c.Upload(ctx, []string{src, src}, src, guest.CopyOptions{}), `copying into "` + src + `": not a folder`},
	} {
		if tc.err == nil || tc.err.Error() != tc.want {
			t.Errorf("%s: got %v, want %s", tc.name, tc.err, tc.want)
		}
	}
}

func TestCopySkips(t *testing.T) {
	b := newBox(t)
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

func TestCopyLarge(t *testing.T) {
	b := newBox(t)
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

func TestCopyCancelled(t *testing.T) {
	b := newBox(t)
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
	err = c.Download(ctx, []string{"src"}, dir, guest.CopyOptions{Progress: func(_ string, done, _ int64) {
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
					_ = r.Reply(true, nil)
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
