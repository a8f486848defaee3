// SPDX-License-Identifier: Apache-2.0

package fsutil

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
)

// record has the system calls of the test recorded, with names relative to dir and without the
// random end of a draft's. The call that is named fail fails.
func record(t *testing.T, dir, fail string) *[]string {
	t.Helper()
	var got []string
	name := func(path string) string {
		rel, err := filepath.Rel(dir, path)
		if err != nil {
			t.Error(err)
		}
		if before, _, ok := strings.Cut(rel, "-"); ok {
			return before
		}
		return rel
	}
	note := func(call string) error {
		got = append(got, call)
		if call == fail {
			return syscall.EIO
		}
		return nil
	}
	real := system
	t.Cleanup(func() { system = real })
	system = calls{
		sync: func(f *os.File) error { return errors.Join(note("sync "+name(f.Name())), real.sync(f)) },
		rename: func(from, to string) error {
			if err := note("rename " + name(from) + " " + name(to)); err != nil {
				return err
			}
			return real.rename(from, to)
		},
		link: func(from, to string) error {
			if err := note("link " + name(from) + " " + name(to)); err != nil {
				return err
			}
			return real.link(from, to)
		},
	}
	return &got
}

// The content is on the disk before the name is, and the name before the call returns.
func TestOrderOfSystemCalls(t *testing.T) {
	for name, c := range map[string]struct {
		do   func(path string) error
		want []string
	}{
		"WriteFile": {
			func(path string) error { return WriteFile(path, []byte("new"), 0o600) },
			[]string{"sync .f", "rename .f f", "sync ."},
		},
		"CommitNew": {func(path string) error {
			d, err := NewDraft(path, 0o600)
			if err != nil {
				return err
			}
			defer d.Drop()
			d.WriteString("new")
			return d.CommitNew()
		}, []string{"sync .f", "link .f f", "sync ."}},
		"Rename": {func(path string) error {
			if err := os.WriteFile(path+"0", []byte("new"), 0o600); err != nil {
				return err
			}
			return Rename(path+"0", path)
		}, []string{"sync f0", "rename f0 f", "sync ."}},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			got := record(t, dir, "")
			if err := c.do(filepath.Join(dir, "f")); err != nil {
				t.Fatal(err)
			}
			if !slices.Equal(*got, c.want) {
				t.Errorf("calls %q, want %q", *got, c.want)
			}
			if b, err := os.ReadFile(filepath.Join(dir, "f")); err != nil || string(b) != "new" {
				t.Errorf("content %q, %v", b, err)
			}
			if all, err := os.ReadDir(dir); err != nil || len(all) != 1 {
				t.Errorf("left behind: %v, %v", all, err)
			}
			for _, call := range c.want[:2] { // when a call fails, the old file stays and no draft is left
				dir := t.TempDir()
				path := filepath.Join(dir, "f")
				if name != "CommitNew" {
					if err := os.WriteFile(path, []byte("old"), 0o600); err != nil {
						t.Fatal(err)
					}
				}
				record(t, dir, call)
				if err := c.do(path); !errors.Is(err, syscall.EIO) || name != "Rename" && err.Error() != "write "+path+": input/output error" {
					t.Errorf("%s failed, and the error is %v", call, err)
				}
				b, err := os.ReadFile(path)
				if name == "CommitNew" && !errors.Is(err, fs.ErrNotExist) || name != "CommitNew" && string(b) != "old" {
					t.Errorf("%s failed, and the file holds %q, %v", call, b, err)
				}
				if drafts, _ := filepath.Glob(filepath.Join(dir, ".f-*")); len(drafts) > 0 {
					t.Errorf("%s failed and left %v", call, drafts)
				}
			}
		})
	}
}

func TestWriteFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	for _, c := range []struct {
		content string
		mode    fs.FileMode
	}{{"one", 0o600}, {"", 0o400}, {"three", 0o600}} {
		if err := WriteFile(path, []byte(c.content), c.mode); err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(path)
		fi, _ := os.Stat(path)
		if err != nil || string(b) != c.content || fi.Mode() != c.mode {
			t.Errorf("%q with mode %v: read %q, %v, %v", c.content, c.mode, b, fi.Mode(), err)
		}
	}
	if err := WriteFile(filepath.Join(path, "below"), nil, 0o600); !errors.Is(err, syscall.ENOTDIR) {
		t.Errorf("a file as a folder: %v", err)
	}
}

func TestCommitNewKeepsWhatIsThere(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	if err := WriteFile(path, []byte("first"), 0o600); err != nil {
		t.Fatal(err)
	}
	d, err := NewDraft(path, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Drop()
	if err := d.CommitNew(); !errors.Is(err, fs.ErrExist) {
		t.Errorf("CommitNew over a file: %v", err)
	}
	if b, _ := os.ReadFile(path); string(b) != "first" {
		t.Errorf("the file holds %q", b)
	}
}

func TestSyncDirWithoutFsync(t *testing.T) {
	real := system
	t.Cleanup(func() { system = real })
	for err, want := range map[error]error{syscall.EINVAL: nil, syscall.ENOTSUP: nil, syscall.EIO: syscall.EIO} {
		system.sync = func(*os.File) error { return err }
		if got := SyncDir(t.TempDir()); !errors.Is(got, want) {
			t.Errorf("fsync says %v: %v", err, got)
		}
	}
}
