// SPDX-License-Identifier: Apache-2.0

package dirs

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/labfile/lab/internal/lab"
)

func TestRuntimeDirectory(t *testing.T) {
	root, err := os.MkdirTemp("", "d")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(root) })
	file := filepath.Join(root, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	foreign := "/proc" // nobody's to write to; for root it is a directory of its own all the same
	if os.Getuid() == 0 {
		foreign = filepath.Join(root, "foreign")
		if err := os.Mkdir(foreign, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.Chown(foreign, 65534, 65534); err != nil {
			t.Skip(err)
		}
	}
	for name, c := range map[string]struct {
		set  string
		want string // empty for the one under /tmp
	}{
		"own":            {root, filepath.Join(root, "lab")},
		"to be made":     {root + "/run", filepath.Join(root, "run/lab")},
		"unset":          {"", ""},
		"relative":       {"run", ""},
		"too long":       {root + "/" + strings.Repeat("x", maxRun), ""},
		"somebody's":     {foreign, ""},
		"cannot be made": {file + "/x", ""},
	} {
		t.Run(name, func(t *testing.T) {
			d, err := FromEnv(func(v string) string {
				return map[string]string{"HOME": root, "XDG_RUNTIME_DIR": c.set}[v]
			})
			if err != nil {
				t.Fatal(err)
			}
			if strings.HasPrefix(d.Run, "/tmp/lab-") {
				t.Cleanup(func() { os.Remove(d.Run) })
				if c.want != "" {
					t.Errorf("%s is used instead of %s", d.Run, c.want)
				}
			} else if d.Run != c.want {
				t.Errorf("got %s, want %q", d.Run, c.want)
			}
			if fi, err := os.Stat(d.Run); err != nil || fi.Mode().Perm() != 0o700 {
				t.Errorf("%s: %v, %v", d.Run, fi, err)
			}
		})
	}
}

// A unix socket path has 107 bytes, whatever the names are.
func TestSocketPathsFit(t *testing.T) {
	d := Dirs{Run: "/" + strings.Repeat("r", maxRun-1)}
	id := lab.NewID(strings.Repeat("l", 63), "/Labfile")
	name := lab.Name(strings.Repeat("m", 63))
	one := d.Socket(lab.Generation{Lab: id, Machine: name, Number: 9999}, "abcde")
	if len(one) > 107 {
		t.Errorf("%s has %d bytes", one, len(one))
	}
	if two := d.Socket(lab.Generation{Lab: id, Machine: name[:62], Number: 9999}, "abcde"); one == two {
		t.Error("two machines share a socket")
	}
}
