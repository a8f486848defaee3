// SPDX-License-Identifier: Apache-2.0

package share

import (
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/pkg/sftp"
	"go.uber.org/goleak"

	"github.com/labfile/lab/internal/guest/agentapi"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// secret is a file outside of the folders that tests share.
const secret = "secret of the host\n"

// fixture is a shared folder and a guest that knows all tricks.
type fixture struct {
	*testing.T
	*sftp.Client
	dir     string // the folder
	outside string // beside it
	end     func() // hangs up, and returns when the server has ended
}

func newFixture(t *testing.T, writable bool) *fixture {
	t.Helper()
	top := t.TempDir()
	f := &fixture{T: t, dir: filepath.Join(top, "shared"), outside: filepath.Join(top, "outside")}
	for _, d := range []string{f.dir, filepath.Join(f.dir, "sub"), f.outside} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	f.write(filepath.Join(f.dir, "file"), "text\n")
	f.write(filepath.Join(f.dir, "sub", "deep"), "deep\n")
	f.write(filepath.Join(f.outside, "secret"), secret)
	f.Client, f.end = dial(t, Folder{Path: f.dir, Writable: writable})
	return f
}

// dial connects a guest.
func dial(t *testing.T, folder Folder) (*sftp.Client, func()) {
	t.Helper()
	host, guest := net.Pipe()
	var wg sync.WaitGroup
	wg.Go(func() { _ = Serve(host, folder) })
	c, err := sftp.NewClientPipe(guest, guest)
	if err != nil {
		t.Fatal(err)
	}
	end := func() {
		c.Close()
		wg.Wait()
	}
	t.Cleanup(end)
	return c, end
}

func (f *fixture) write(path, text string) {
	f.Helper()
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		f.Fatal(err)
	}
}

// tree is what the host has: content by path, of folders and links too.
func (f *fixture) tree(dir string) map[string]string {
	f.Helper()
	out := map[string]string{}
	err := filepath.Walk(dir, func(path string, info os.FileInfo, err error) error {
		if err != nil {
			return err
		}
		name, _ := filepath.Rel(dir, path)
		text := info.Mode().String()
		switch {
		case info.Mode()&os.ModeSymlink != 0:
			target, err := os.Readlink(path)
			if err != nil {
				return err
			}
			text += " " + target
		case info.Mode().IsRegular():
			b, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			text += " " + string(b)
		}
		out[name] = text
		return nil
	})
	if err != nil {
		f.Fatal(err)
	}
	return out
}

// code is the error that a guest is told, as Linux counts them.
func code(err error) syscall.Errno {
	var status *sftp.StatusError
	switch {
	case err == nil:
		return 0
	case errors.Is(err, os.ErrNotExist):
		return syscall.ENOENT
	case errors.Is(err, os.ErrPermission):
		return syscall.EACCES
	case errors.As(err, &status):
		if no, ok := agentapi.Errno(status.Error()); ok {
			return no
		}
	}
	return 999
}

func (f *fixture) refused(what string, err error, want ...syscall.Errno) {
	f.Helper()
	if got := code(err); !slices.Contains(want, got) {
		f.Errorf("%s: got %d (%v), want %v", what, got, err, want)
	}
}

func (f *fixture) read(name string) (string, error) {
	file, err := f.Open(name)
	if err != nil {
		return "", err
	}
	defer file.Close()
	b, err := io.ReadAll(file)
	return string(b), err
}

func (f *fixture) done(what string, err error) {
	f.Helper()
	if err != nil {
		f.Errorf("%s: %v", what, err)
	}
}

// mutations are all requests that change something, by name.
func (f *fixture) mutations(file, dir string) map[string]func() error {
	open := func(flag int) func() error {
		return func() error {
			file, err := f.OpenFile(file, flag)
			if err == nil {
				_, err = file.WriteAt([]byte("changed"), 0)
				return errors.Join(err, file.Close())
			}
			return err
		}
	}
	now := time.Now()
	return map[string]func() error{
		"open to write":          open(os.O_WRONLY),
		"open to read and write": open(os.O_RDWR),
		"open to append":         open(os.O_WRONLY | os.O_APPEND),
		"open and truncate":      open(os.O_RDONLY | os.O_TRUNC),
		"open and create":        open(os.O_RDONLY | os.O_CREATE),
		"create":                 func() error { _, err := f.Create(dir + "/new"); return err },
		"truncate":               func() error { return f.Truncate(file, 1) },
		"chmod":                  func() error { return f.Chmod(file, 0o600) },
		"chtimes":                func() error { return f.Chtimes(file, now, now) },
		"extended times": func() error {
			return f.SetExtendedData(file, []sftp.StatExtended{{ExtType: agentapi.TimesName, ExtData: agentapi.Times{Mtime: now}.String()}})
		},
		"chown":        func() error { return f.Chown(file, os.Getuid(), os.Getgid()) },
		"mkdir":        func() error { return f.Mkdir(dir + "/new") },
		"remove":       func() error { return f.Remove(file) },
		"rmdir":        func() error { return f.RemoveDirectory(dir) },
		"rename":       func() error { return f.Rename(file, dir+"/new") },
		"posix rename": func() error { return f.PosixRename(file, dir+"/new") },
		"link":         func() error { return f.Link(file, dir+"/new") },
		"symlink":      func() error { return f.Symlink(file, dir+"/new") },
	}
}

func TestReadOnly(t *testing.T) {
	f := newFixture(t, false)
	before := f.tree(f.dir)
	for name, do := range f.mutations("/file", "/sub") {
		f.refused(name, do(), syscall.EROFS)
	}
	if diff := cmp.Diff(before, f.tree(f.dir)); diff != "" {
		t.Error(diff)
	}
	if got, err := f.read("/sub/deep"); got != "deep\n" || err != nil {
		t.Errorf("read %q, %v", got, err)
	}
	// What an open file is for is not changed by what is asked of it.
	file, err := f.Open("/file")
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	if _, err := file.WriteAt([]byte("x"), 0); err == nil {
		t.Error("a file that is open for reading was written to")
	}
	f.refused("truncating an open file", file.Truncate(0), syscall.EROFS)
	f.refused("chmod of an open file", file.Chmod(0o777), syscall.EROFS)
	if diff := cmp.Diff(before, f.tree(f.dir)); diff != "" {
		t.Error(diff)
	}
}

// TestConfined goes out of the folder by all names that lead there.
func TestConfined(t *testing.T) {
	f := newFixture(t, true)
	for name, target := range map[string]string{
		"out":       "../outside",
		"absolute":  f.outside,
		"file-out":  "../outside/secret",
		"twice":     "sub/../../outside",
		"sub/above": "../../outside",
		"chain":     "out",
	} {
		if err := f.Symlink(target, "/"+name); err != nil {
			t.Fatal(err)
		}
		if got, err := f.ReadLink("/" + name); got != target || err != nil {
			t.Errorf("%s leads to %q, %v; want the words of the link", name, got, err)
		}
	}
	before, outside := f.tree(f.dir), f.tree(f.outside)
	files := []string{"/out/secret", "/absolute/secret", "/file-out", "/twice/secret", "/sub/above/secret", "/chain/secret"}
	for _, name := range files {
		if got, err := f.read(name); err == nil {
			t.Errorf("%s was read: %q", name, got)
		}
		if _, err := f.Stat(name); err == nil {
			t.Errorf("%s was looked at", name)
		}
	}
	for _, dir := range []string{"/out", "/absolute", "/twice", "/sub/above", "/chain"} {
		if list, err := f.ReadDir(dir); err == nil {
			t.Errorf("%s was listed: %v", dir, list)
		}
		for name, do := range f.mutations(dir+"/secret", dir) {
			if err := do(); err == nil && name != "symlink" {
				t.Errorf("%s in %s was possible", name, dir)
			}
		}
		f.refused("moving a file to "+dir, f.PosixRename("/file", dir+"/new"), syscall.EACCES)
		f.refused("linking a file from "+dir, f.Link(dir+"/secret", "/stolen"), syscall.EACCES)
	}
	if diff := cmp.Diff(outside, f.tree(f.outside)); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff(before, f.tree(f.dir)); diff != "" {
		t.Error(diff)
	}
	// Names that would lead out lead to the top of the folder.
	for _, name := range []string{"/../file", "../../file", "/sub/../../../file", "file"} {
		if got, err := f.read(name); got != "text\n" || err != nil {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
	f.refused("a name above", f.Mkdir("/../outside/new"), syscall.ENOENT)
	if _, err := f.read(filepath.Join(f.outside, "secret")); code(err) != syscall.ENOENT {
		t.Errorf("an absolute name of the host: %v", err)
	}
	for name, do := range map[string]func() error{
		"remove": func() error { return f.RemoveDirectory("/") },
		"rename": func() error { return f.PosixRename("/", "/sub/top") },
		"onto":   func() error { return f.PosixRename("/sub", "/..") },
	} {
		f.refused(name+" of the folder itself", do(), syscall.EBUSY)
	}
}

// TestSpecialFiles does not wait for the other end of a pipe, and opens no socket.
func TestSpecialFiles(t *testing.T) {
	f := newFixture(t, true)
	if err := syscall.Mkfifo(filepath.Join(f.dir, "pipe"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("pipe", filepath.Join(f.dir, "to-pipe")); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"/pipe", "/to-pipe"} {
		for _, flag := range []int{os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_CREATE} {
			_, err := f.OpenFile(name, flag)
			f.refused("open "+name, err, syscall.EACCES)
		}
	}
	_, err := f.Open("/sub")
	f.refused("open a folder", err, syscall.EISDIR)
	if err := f.Chmod("/file", os.ModeSetuid|os.ModeSetgid|os.ModeSticky|0o755); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(filepath.Join(f.dir, "file")); err != nil || info.Mode() != 0o755 {
		t.Errorf("mode is %v, %v", info.Mode(), err)
	}
	f.refused("chown", f.Chown("/file", 0, 0), syscall.EPERM)
}

func TestChanges(t *testing.T) {
	f := newFixture(t, true)
	file, err := f.OpenFile("/new", os.O_RDWR|os.O_CREATE|os.O_EXCL)
	if err != nil {
		t.Fatal(err)
	}
	_, err = file.WriteAt([]byte("0123456789"), 0)
	f.done("write", err)
	_, err = file.WriteAt([]byte("ab"), 12)
	f.done("write beyond the end", err)
	b := make([]byte, 20)
	if n, err := file.ReadAt(b, 0); n != 14 || err != io.EOF || string(b[:n]) != "0123456789\x00\x00ab" {
		t.Errorf("read %q, %v", b[:n], err)
	}
	f.done("truncate", file.Truncate(3))
	f.done("close", file.Close())
	_, err = f.OpenFile("/new", os.O_RDWR|os.O_CREATE|os.O_EXCL)
	f.refused("exclusive", err, syscall.EEXIST)
	f.refused("rename onto a file", f.Rename("/new", "/file"), syscall.EEXIST)
	f.done("posix rename onto a file", f.PosixRename("/new", "/file"))
	f.done("mkdir", f.Mkdir("/dir"))
	f.refused("mkdir again", f.Mkdir("/dir"), syscall.EEXIST)
	f.done("mkdir", f.Mkdir("/empty"))
	f.refused("rename onto an empty folder", f.Rename("/dir", "/empty"), syscall.EEXIST)
	f.done("posix rename onto an empty folder", f.PosixRename("/dir", "/empty"))
	f.done("rename", f.Rename("/empty", "/dir"))
	f.done("link", f.Link("/file", "/dir/one"))
	f.done("symlink", f.Symlink("anything at all", "/dir/two"))
	f.done("chmod", f.Chmod("/dir", 0o700))
	f.refused("rmdir of a full folder", f.RemoveDirectory("/dir"), syscall.ENOTEMPTY)
	f.refused("rmdir of a file", f.RemoveDirectory("/file"), syscall.ENOTDIR)
	want := map[string]string{
		".": "drwxr-xr-x", "file": "-rw-r--r-- 012", "sub": "drwxr-xr-x", "sub/deep": "-rw-r--r-- deep\n",
		"dir": "drwx------", "dir/one": "-rw-r--r-- 012", "dir/two": "Lrwxrwxrwx anything at all",
	}
	if diff := cmp.Diff(want, f.tree(f.dir)); diff != "" {
		t.Error(diff)
	}
	for _, name := range []string{"/dir/one", "/dir/two", "/dir"} {
		f.done("remove "+name, f.Remove(name))
	}

	at := time.Unix(1700000000, 123456789)
	set := agentapi.Times{Atime: at, Mtime: at.Add(time.Hour)}
	f.done("times", f.SetExtendedData("/file", []sftp.StatExtended{{ExtType: agentapi.TimesName, ExtData: set.String()}}))
	info, err := f.Lstat("/file")
	if err != nil {
		t.Fatal(err)
	}
	ext := info.Sys().(*sftp.FileStat).Extended
	if len(ext) != 1 || ext[0].ExtType != agentapi.AttrName {
		t.Fatalf("extended attributes: %v", ext)
	}
	got, err := agentapi.ParseAttr(ext[0].ExtData)
	if err != nil || !got.Atime.Equal(set.Atime) || !got.Mtime.Equal(set.Mtime) || got.Nlink != 1 {
		t.Errorf("got %+v, %v", got, err)
	}
	if st, err := f.StatVFS("/"); err != nil || st.Blocks == 0 {
		t.Errorf("statvfs: %+v, %v", st, err)
	}
}

// TestLargeFolder lists more than goes into one answer.
// TestRaised takes the bits away that run a program as somebody else, whoever lab is.
func TestRaised(t *testing.T) {
	f := newFixture(t, true)
	path := filepath.Join(f.dir, "file")
	if err := os.Chmod(path, 0o755|os.ModeSetuid|os.ModeSetgid); err != nil {
		t.Fatal(err)
	}
	w, err := f.OpenFile("/file", os.O_WRONLY)
	if err != nil {
		t.Fatal(err)
	}
	f.done("write", func() error { _, err := w.Write([]byte("#!/bin/sh\n")); return err }())
	f.done("close", w.Close())
	if info, err := os.Stat(path); err != nil || info.Mode() != 0o755 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
}

func TestLargeFolder(t *testing.T) {
	f := newFixture(t, false)
	var want []string
	for i := range 1234 {
		name := strconv.Itoa(i)
		f.write(filepath.Join(f.dir, "sub", name), name)
		want = append(want, name)
	}
	want = append(want, "deep")
	list, err := f.ReadDir("/sub")
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, info := range list {
		got = append(got, info.Name())
		if info.Name() != "deep" && info.Size() != int64(len(info.Name())) {
			t.Errorf("%s has %d bytes", info.Name(), info.Size())
		}
	}
	slices.Sort(got)
	slices.Sort(want)
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

// TestGreed opens what there is until it is refused, and finds that the host has
// closed it all with the connection.
func TestGreed(t *testing.T) {
	f := newFixture(t, false)
	var (
		last error
		n    int
		open []*sftp.File
	)
	for n = range 2 * maxOpen {
		var file *sftp.File
		if file, last = f.Open("/file"); last != nil {
			break
		}
		open = append(open, file)
	}
	if n != maxOpen {
		t.Errorf("%d files could be opened", n)
	}
	f.refused("one more", last, syscall.EMFILE)
	_, err := f.ReadDir("/")
	f.refused("a listing", err, syscall.EMFILE)
	f.done("close", open[0].Close())
	_, err = f.ReadDir("/")
	f.done("listing after a file was closed", err)
	f.end()
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil || len(fds) > maxOpen/2 {
		t.Errorf("%d files are open still, %v", len(fds), err)
	}
}

// TestFolderReplaced finds the folder again that was made anew under its name.
func TestFolderReplaced(t *testing.T) {
	top := t.TempDir()
	dir := filepath.Join(top, "dir")
	s := &server{folder: Folder{Path: dir, Writable: true}}
	defer s.close()
	stat := func() error {
		s.checked = time.Time{} // as if time had passed
		root, name, err := s.at("/file")
		if err == nil {
			_, err = root.Lstat(name)
		}
		return wire(err)
	}
	if err := stat(); !errors.Is(err, syscall.ENOENT) {
		t.Errorf("no folder: %v", err)
	}
	for range 2 {
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := stat(); !errors.Is(err, syscall.ENOENT) {
			t.Errorf("an empty folder: %v", err)
		}
		if err := os.WriteFile(filepath.Join(dir, "file"), nil, 0o644); err != nil {
			t.Fatal(err)
		}
		if err := stat(); err != nil {
			t.Errorf("a folder with the file: %v", err)
		}
		if err := os.Rename(dir, filepath.Join(top, strconv.FormatInt(time.Now().UnixNano(), 10))); err != nil {
			t.Fatal(err)
		}
	}
}

// TestErrorsNameNoPath keeps the host's paths from the guest.
func TestErrorsNameNoPath(t *testing.T) {
	f := newFixture(t, true)
	if err := os.Symlink(f.outside, filepath.Join(f.dir, "out")); err != nil {
		t.Fatal(err)
	}
	for name, err := range map[string]error{
		"missing": f.Mkdir("/no/such"), "escape": f.Mkdir("/out/x"), "exists": f.Mkdir("/sub"), "full": f.RemoveDirectory("/sub"),
	} {
		if strings.Contains(err.Error(), f.dir) || strings.Contains(err.Error(), f.outside) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// duplex is a connection that only ever hears what it was made with.
type duplex struct {
	io.Reader
	io.Writer
}

func (duplex) Close() error { return nil }

// FuzzServe takes anything for requests. Whatever it is, nothing outside of the
// folder changes, and the server ends.
func FuzzServe(f *testing.F) {
	packet := func(kind byte, body ...string) string {
		b := []byte{kind, 0, 0, 0, 1}
		for _, s := range body {
			b = append(b, 0, 0, 0, byte(len(s)))
			b = append(b, s...)
		}
		return string([]byte{0, 0, 0, byte(len(b))}) + string(b)
	}
	start := "\x00\x00\x00\x05\x01\x00\x00\x00\x03"
	f.Add([]byte(start + packet(17, "/file") + packet(7, "/sub") + packet(11, "/") + packet(12, "1")))
	f.Add([]byte(start + packet(14, "/d") + packet(18, "/file", "/d/../../outside/x") + packet(20, "/etc/passwd", "/l") + packet(13, "/l")))
	f.Add([]byte(start + packet(3, "/file") + packet(5, "1") + packet(9, "/file") + packet(10, "1")))
	f.Add([]byte(start + packet(200, "posix-rename@openssh.com", "/file", "/../outside/secret") + packet(200, "statvfs@openssh.com", "/")))
	// setstat with many extended attributes, of which there are none
	f.Add([]byte(start + "\x00\x00\x00\x13\x09\x00\x00\x00\x01\x00\x00\x00\x02/f\x80\x00\x00\x00\xff\xff\xff\xff"))
	f.Fuzz(func(t *testing.T, in []byte) {
		top := t.TempDir()
		dir, outside := filepath.Join(top, "shared"), filepath.Join(top, "outside")
		err := errors.Join(os.MkdirAll(filepath.Join(dir, "sub"), 0o755), os.Mkdir(outside, 0o755),
			os.WriteFile(filepath.Join(dir, "file"), []byte("text"), 0o644),
			os.WriteFile(filepath.Join(outside, "secret"), []byte(secret), 0o644),
			os.Symlink("../outside", filepath.Join(dir, "out")))
		if err != nil {
			t.Fatal(err)
		}
		_ = Serve(duplex{bytes.NewReader(in), io.Discard}, Folder{Path: dir, Writable: true})
		list, err := os.ReadDir(outside)
		if err != nil || len(list) != 1 {
			t.Fatalf("outside: %v, %v", list, err)
		}
		if b, err := os.ReadFile(filepath.Join(outside, "secret")); string(b) != secret || err != nil {
			t.Fatalf("the secret is %q, %v", b, err)
		}
	})
}

// A guest that writes to the folder above puts a link in the place of a folder that is
// shared, too.
func TestFolderIsReplacedByALink(t *testing.T) {
	f := newFixture(t, true)
	inner, _ := dial(t, Folder{Path: filepath.Join(f.dir, "sub"), Writable: true})
	if _, err := inner.Stat("/deep"); err != nil {
		t.Fatal(err)
	}
	if err := f.PosixRename("/sub", "/gone"); err != nil {
		t.Fatal(err)
	}
	if err := f.Symlink("../outside", "/sub"); err != nil {
		t.Fatal(err)
	}
	late, _ := dial(t, Folder{Path: filepath.Join(f.dir, "sub"), Writable: true}) // as after a restart
	if _, err := late.Open("/secret"); err == nil {
		t.Error("a new server shows what the link leads to")
	}
	for refused := false; !refused; { // the folder is looked at again now and then
		if _, err := inner.Open("/secret"); err == nil {
			t.Fatal("the server shows what the link leads to")
		}
		_, err := inner.Stat("/deep")
		refused = err != nil
	}
}

// Nobody waits for the other end of a pipe.
func TestPipeInTheWay(t *testing.T) {
	f := newFixture(t, true)
	if err := syscall.Mkfifo(filepath.Join(f.dir, "pipe"), 0o600); err != nil {
		t.Fatal(err)
	}
	for what, err := range map[string]error{
		"rename": f.PosixRename("/pipe/x", "/y"), "rename to": f.PosixRename("/sub", "/pipe/x"),
		"times": f.Chtimes("/pipe/x", time.Unix(1, 0), time.Unix(1, 0)),
	} {
		if err == nil {
			t.Errorf("%s was done", what)
		}
	}
	if _, err := f.ReadDir("/pipe"); err == nil {
		t.Error("a pipe was listed")
	}
}
