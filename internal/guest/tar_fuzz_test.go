// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/labfile/lab/internal/guest/filestream"
)

// bounded is a buffer that takes no more than 16 MiB.
type bounded struct{ bytes.Buffer }

func (b *bounded) Write(p []byte) (int, error) {
	if b.Len()+len(p) > 16<<20 {
		return 0, io.ErrShortWrite
	}
	return b.Buffer.Write(p)
}

// Whatever a guest's tar says, nothing is written beside the folder that was asked for.
func FuzzUnpack(f *testing.F) {
	var seed bytes.Buffer
	w := tar.NewWriter(&seed)
	for _, h := range []tar.Header{
		{Typeflag: tar.TypeDir, Name: "./", Mode: 0o755},
		{Typeflag: tar.TypeSymlink, Name: "./l", Linkname: "../victim"},
		{Typeflag: tar.TypeDir, Name: "./d/", Mode: 0o755},
		{Typeflag: tar.TypeReg, Name: "./d/f", Mode: 0o644},
	} {
		if err := w.WriteHeader(&h); err != nil {
			f.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		f.Fatal(err)
	}
	f.Add(seed.Bytes())
	f.Add(bytes.ReplaceAll(seed.Bytes(), []byte("./d/"), []byte("./l/")))
	f.Fuzz(func(t *testing.T, b []byte) {
		dir := t.TempDir()
		if err := errors.Join(os.Mkdir(filepath.Join(dir, "victim"), 0o755), os.Mkdir(filepath.Join(dir, "target"), 0o755)); err != nil {
			t.Fatal(err)
		}
		root, err := os.OpenRoot(filepath.Join(dir, "target"))
		if err != nil {
			t.Fatal(err)
		}
		defer root.Close()
		ctx, cancel := context.WithTimeout(context.Background(), time.Second) // a file may be one large hole
		defer cancel()
		var stream bounded
		e := filestream.NewEncoder(&stream)
		_ = e.Entry(filestream.Entry{Kind: filestream.Dir, Name: "evil"}) // to memory
		_, _ = unpack(ctx, e, tar.NewReader(bytes.NewReader(b)))
		_ = e.End(filestream.Outcome{})
		r := &filestream.Receiver{Decoder: filestream.NewDecoder(&stream.Buffer), Atomic: true, Where: func(e filestream.Entry) (filestream.Place, error) {
			at := filestream.Place{Tree: root, Name: e.Name}
			if e.Kind != filestream.Dir {
				return at, nil
			}
			if err := root.Mkdir(e.Name, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
				return at, err
			}
			return at, nil
		}}
		_, _ = r.Receive(ctx)
		for d, want := range map[string]int{".": 2, "victim": 0} {
			if left, err := os.ReadDir(filepath.Join(dir, d)); err != nil || len(left) != want {
				t.Errorf("written outside the target: %v, %v", left, err)
			}
		}
	})
}
