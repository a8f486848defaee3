// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// runWith runs a script in shell, which is "sh" for what the script starts too. It returns
// what the script said, on stderr too, and how it ended.
func runWith(t *testing.T, shell, script, dir string, in []byte) (string, error) {
	t.Helper()
	bin := t.TempDir()
	if err := os.Symlink(shell, filepath.Join(bin, "sh")); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, filepath.Join(bin, "sh"), "-c", script, "lab", dir)
	cmd.Env = append(os.Environ(), "PATH="+bin+":"+os.Getenv("PATH"))
	cmd.Stdin = bytes.NewReader(in)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	out, err := cmd.CombinedOutput()
	if ctx.Err() != nil {
		t.Fatalf("it does not end: %s", out)
	}
	return string(out), err
}

// A list that xargs cuts into several is read as a whole, by each shell that is "sh" somewhere.
func TestTarConflictsOfManyFiles(t *testing.T) {
	file, err := os.Lstat("tar.go")
	if err != nil {
		t.Fatal(err)
	}
	folder, err := os.Lstat(".")
	if err != nil {
		t.Fatal(err)
	}
	var items []item
	for i := range 4000 {
		name := fmt.Sprintf("./%04d %s", i, strings.Repeat("n", 40+i%60))
		info := file
		if i%3 == 0 {
			info = folder
		}
		items = append(items, item{name, info})
	}
	list := conflictList(items)
	if len(list) < 256<<10 {
		t.Fatalf("the list has %d bytes only", len(list))
	}
	for _, name := range []string{"dash", "bash", "busybox"} {
		t.Run(name, func(t *testing.T) {
			shell, err := exec.LookPath(name)
			if err != nil {
				t.Skip(err)
			}
			dir := t.TempDir()
			if out, err := runWith(t, shell, tarConflicts, dir, list); err != nil {
				t.Errorf("nothing is there: %v, %s", err, out)
			}
			for _, i := range []int{0, 1500, 2200, 3999} {
				at := filepath.Join(dir, items[i].name)
				if items[i].info.IsDir() {
					err = os.WriteFile(at, nil, 0o600)
				} else {
					err = os.Mkdir(at, 0o700)
				}
				if err != nil {
					t.Fatal(err)
				}
				if _, err := runWith(t, shell, tarConflicts, dir, list); err == nil {
					t.Errorf("the conflict with item %d is not seen", i)
				}
				if err := os.Remove(at); err != nil {
					t.Fatal(err)
				}
			}
		})
	}
}

// Everything that GNU tar makes of a folder is in the one format that is taken.
func TestTarCreateFormat(t *testing.T) {
	dir := t.TempDir()
	long := filepath.Join(dir, strings.Repeat("d", 200))
	err := errors.Join(os.Mkdir(long, 0o755), os.Symlink(strings.Repeat("x/", 150), long+"/link"),
		os.WriteFile(long+"/plain", []byte("x"), 0o600), os.Link(long+"/plain", long+"/hard"),
		os.WriteFile(dir+"/sparse", []byte("x"), 0o4755), os.Truncate(dir+"/sparse", 1<<30),
		os.WriteFile(dir+"/many holes", nil, 0o600),
		os.WriteFile(dir+"/old", nil, 0o600), os.Chtimes(dir+"/old", time.Unix(-5, 1), time.Unix(-5, 1)),
		os.WriteFile(dir+"/new", nil, 0o600), os.Chtimes(dir+"/new", time.Unix(1<<34, 0), time.Unix(1<<34, 0)),
		syscall.Mkfifo(dir+"/fifo", 0o600))
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(dir+"/many holes", os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	for i := range int64(100) {
		if _, err := f.WriteAt([]byte("x"), i<<20); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	said, err := runWith(t, "/bin/sh", tarCreate, dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	made, ok := strings.CutPrefix(said, tarHello)
	if !ok || made == "" {
		t.Skipf("no GNU tar here: %q", said)
	}
	kinds := map[byte]int{}
	for r := tar.NewReader(strings.NewReader(made)); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		kinds[h.Typeflag]++
		if h.Format != tar.FormatGNU || len(h.PAXRecords) > 0 {
			t.Errorf("%q is in format %v, with records %v", h.Name, h.Format, h.PAXRecords)
		}
	}
	if want := map[byte]int{tar.TypeDir: 2, tar.TypeSymlink: 1, tar.TypeReg: 4, tar.TypeGNUSparse: 2, tar.TypeFifo: 1}; !maps.Equal(kinds, want) {
		t.Errorf("the archive has %v, want %v", kinds, want)
	}
}

// What fails is the first that tar says, whatever the times of the files are.
func TestTarExtractFromTheFuture(t *testing.T) {
	var archive bytes.Buffer
	w := tar.NewWriter(&archive)
	for _, name := range []string{"./a", "./x"} {
		if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o600, ModTime: time.Now().Add(1e6 * time.Hour), Format: tar.FormatGNU}); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := os.MkdirAll(dir+"/x/y", 0o755); err != nil {
		t.Fatal(err)
	}
	out, err := runWith(t, "/bin/sh", tarExtract, dir, archive.Bytes())
	said, ok := strings.CutPrefix(out, tarHello)
	if !ok {
		t.Skipf("no GNU tar here: %q", out)
	}
	if first, _, _ := strings.Cut(said, "\n"); err == nil || first != "tar: ./x: Cannot open: Is a directory" {
		t.Errorf("tar ended with %v and said first %q", err, first)
	}
}

var oddNames = []string{"a\nb", "tar: x", "c: socket ignored", `back\slash`, `\141`, "\xff\x01", `'"`, "ä", "tab\t.", "end\\"}

// What tar says of files is understood whatever their names are.
func TestTarComplaintsOddNames(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir) // the address of a socket is short
	want := []string{}
	for _, name := range oddNames {
		l, err := net.Listen("unix", "./"+name)
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		want = append(want, "top/"+name)
	}
	out, err := runWith(t, "/bin/sh", "exec 2>&1 >/dev/null\n"+tarCreate, dir, nil)
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	var said complaints
	if _, err := said.Write([]byte(out)); err != nil {
		t.Fatal(err)
	}
	skipped, vanished, why := said.read("top")
	slices.Sort(skipped)
	slices.Sort(want)
	if !slices.Equal(skipped, want) || len(vanished) > 0 || why != "" {
		t.Errorf("tar said\n%s\nof which was read %q, %q, %q", out, skipped, vanished, why)
	}
}

func TestTarComplaints(t *testing.T) {
	for said, want := range map[string][3]string{ // skipped, vanished, the error
		"tar: ./a\\nb: File removed before we read it\n":                                               {"", "top/a\nb", ""},
		"tar: ./a: socket ignored\ntar: ./b: file changed as we read it\n":                             {"top/a", "", ""},
		"tar: ./a\\: socket ignored: Cannot open: Permission denied\n":                                 {"", "", "top/a: socket ignored: permission denied"},
		"tar: ./a: socket ignored\ntar: ./x: Cannot write: No space left on device\ntar: ./y: Other\n": {"top/a", "", "top/x: no space left on device"},
		"tar: ./x\\n: Wrote only 1 of 2 bytes\n":                                                       {"", "", "top/x\n: Wrote only 1 of 2 bytes"},
		"tar: Out of luck\n":                                                                           {"", "", "top: Out of luck"},
	} {
		var c complaints
		if _, err := c.Write([]byte(said)); err != nil {
			t.Fatal(err)
		}
		skipped, vanished, why := c.read("top")
		got := [3]string{strings.Join(skipped, "|"), strings.Join(vanished, "|"), ""}
		if why != "" {
			got[2] = tarFailure("top", why).Error()
		}
		if got != want {
			t.Errorf("%q:\ngot  %q\nwant %q", said, got, want)
		}
	}
}
