// SPDX-License-Identifier: Apache-2.0

package fsutil

import (
	"bytes"
	"errors"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"syscall"
	"testing"
)

func TestOpenRegular(t *testing.T) {
	dir := t.TempDir()
	file, pipe, link := filepath.Join(dir, "file"), filepath.Join(dir, "pipe"), filepath.Join(dir, "link")
	if err := errors.Join(os.WriteFile(file, []byte("x"), 0o600), syscall.Mkfifo(pipe, 0o600), os.Symlink(pipe, link)); err != nil {
		t.Fatal(err)
	}
	f, err := OpenRegular(file)
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
	for path, want := range map[string]string{
		dir: "a folder", pipe: "a named pipe", link: "a named pipe", "/dev/null": "a device",
	} {
		var kind *KindError
		if _, err := OpenRegular(path); !errors.As(err, &kind) || kind.Error() != path+" is "+want+", not a file" {
			t.Errorf("%s: %v", path, err)
		}
	}
	if _, err := OpenRegular(filepath.Join(dir, "none")); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
}

func TestSparse(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	var content []byte
	for i := range 40 {
		part := make([]byte, 1+random.IntN(5*block))
		if i%2 == 0 {
			for j := range part {
				part[j] = byte(random.Uint32())
			}
		}
		content = append(content, part...)
	}
	content = append(content, make([]byte, 100*block+7)...)
	path := filepath.Join(t.TempDir(), "file")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	s := &Sparse{File: f}
	for rest := content; len(rest) > 0; {
		n := min(1+random.IntN(3*block), len(rest))
		if got, err := s.Write(rest[:n]); got != n || err != nil {
			t.Fatal(got, err)
		}
		rest = rest[n:]
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(path)
	if err != nil || !bytes.Equal(got, content) {
		t.Fatalf("read %d bytes, %v; wrote %d", len(got), err, len(content))
	}
	var st syscall.Stat_t
	if err := syscall.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	if takes := st.Blocks * 512; takes > int64(len(content)-90*block) {
		t.Errorf("the file takes %d bytes of %d: the zeros at its end are no hole", takes, len(content))
	}
}
