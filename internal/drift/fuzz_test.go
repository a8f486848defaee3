// SPDX-License-Identifier: Apache-2.0

package drift

import (
	"bytes"
	"context"
	"encoding/binary"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/labfile/lab/internal/drift/qcow2"
)

// FuzzCompare damages a small file system, journal included, in places of the
// fuzzer's choice: an error is fine, a panic or an endless walk is not.
func FuzzCompare(f *testing.F) {
	tree := f.TempDir()
	write(f, filepath.Join(tree, "etc/a"), "a")
	write(f, filepath.Join(tree, "etc/b/c"), "bc")
	base := image(f, tree, "2M", "-b", "1024", "-N", "32")
	large := filepath.Join(f.TempDir(), "large")
	write(f, large, string(make([]byte, 900)))
	tool(f, "ea_set /etc/a user.a small\nea_set -f "+large+" /etc/b/c user.b\n", "debugfs", "-w", "-f", "-", base)
	data, err := os.ReadFile(base)
	if err != nil {
		f.Fatal(err)
	}
	old := root(f, Layer{base, "raw"})
	f.Add([]byte{})
	f.Add([]byte{0, 4, 0, 0, 0xff, 0xff, 0xff, 0xff})
	f.Fuzz(func(t *testing.T, patch []byte) {
		b := bytes.Clone(data)
		for ; len(patch) >= 8; patch = patch[8:] {
			at := int(binary.LittleEndian.Uint32(patch)) % (len(b) - 4)
			copy(b[at:], patch[4:8])
		}
		path := filepath.Join(t.TempDir(), "disk")
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		c, err := OpenChain([]Layer{{path, "raw"}})
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		v, err := c.View(1)
		if err != nil {
			t.Fatal(err)
		}
		now, err := OpenRoot(v)
		if err != nil {
			return
		}
		start := time.Now()
		_, _ = Compare(context.Background(), old, now, Options{})
		if d := time.Since(start); d > 10*time.Second {
			t.Errorf("it took %v", d)
		}
	})
}

func FuzzQcow2(f *testing.F) {
	path := filepath.Join(f.TempDir(), "x.qcow2")
	tool(f, "", "qemu-img", "create", "-q", "-f", "qcow2", path, "1M")
	data, err := os.ReadFile(path)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data)
	f.Fuzz(func(t *testing.T, b []byte) {
		i, err := qcow2.Open(bytes.NewReader(b), int64(len(b)))
		if err != nil || i.Size() > 1<<30 {
			return
		}
		p := make([]byte, 512)
		for off := int64(0); off < i.Size(); {
			e, err := i.Map(off)
			if err != nil {
				return
			}
			if e.Len < 1 {
				t.Fatalf("an extent of %d bytes at %d", e.Len, off)
			}
			_ = i.ReadAt(p[:min(e.Len, 512)], off, e)
			off += e.Len
		}
	})
}
