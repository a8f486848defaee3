// SPDX-License-Identifier: Apache-2.0

//go:build linux

package agent

import (
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// tree says of every file below dir what it is and holds.
func tree(t *testing.T, dir string) map[string]string {
	t.Helper()
	all := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(dir, path)
		says := info.Mode().String()
		switch {
		case d.Type() == fs.ModeSymlink:
			to, _ := os.Readlink(path)
			says = "-> " + to
		case d.Type().IsRegular():
			b, _ := os.ReadFile(path)
			says += " " + string(b)
		}
		all[rel] = says
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func TestFillVolume(t *testing.T) {
	image := t.TempDir()
	for path, content := range map[string]string{"main/PG_VERSION": "15\n", ".hidden": "x"} {
		path = filepath.Join(image, path)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("main/PG_VERSION", filepath.Join(image, "link")); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(image, 0o710); err != nil {
		t.Fatal(err)
	}
	full := tree(t, image)
	empty := t.TempDir()

	for name, tt := range map[string]struct {
		has  []string
		from string
		want map[string]string // nil for what the image has
	}{
		"new":                  {has: []string{"lost+found/"}, from: image},
		"interrupted":          {has: []string{"lost+found/", ".lab-filling", "half"}, from: image},
		"nothing to copy":      {has: []string{"lost+found/"}, from: empty, want: tree(t, empty)},
		"with data":            {has: []string{"lost+found/", "mine"}, from: image, want: map[string]string{".": "drwxr-xr-x", "lost+found": "drwx------", "mine": "-rw------- "}},
		"emptied by its owner": {from: image, want: map[string]string{".": "drwxr-xr-x"}},
	} {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			if err := os.Chmod(root, 0o755); err != nil {
				t.Fatal(err)
			}
			for _, path := range tt.has {
				var err error
				if at := filepath.Join(root, path); path[len(path)-1] == '/' {
					err = os.Mkdir(at, 0o700)
				} else {
					err = os.WriteFile(at, nil, 0o600)
				}
				if err != nil {
					t.Fatal(err)
				}
			}
			for range 2 { // the second time, it is not new
				if err := fillVolume(root, tt.from); err != nil {
					t.Fatal(err)
				}
			}
			want := tt.want
			if want == nil {
				want = full
			}
			if diff := cmp.Diff(want, tree(t, root)); diff != "" {
				t.Error(diff)
			}
		})
	}
}
