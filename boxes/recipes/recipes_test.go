// SPDX-License-Identifier: Apache-2.0

package recipes

import (
	"errors"
	"io/fs"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/labfile/lab/internal/lab"
)

func TestEveryRecipeIsValid(t *testing.T) {
	for _, name := range Names() {
		r, err := Get("builtin/" + name)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if r.Name != name || r.User != "root" || r.Suite != "bookworm" || !strings.HasPrefix(r.Append, "root=/dev/vda rw console=ttyS0 ") {
			t.Errorf("%s: %+v", name, r)
		}
		err = fs.WalkDir(r.Files, ".", func(p string, d fs.DirEntry, err error) error {
			if err == nil && !d.IsDir() && strings.HasPrefix(p, "usr/lib/lab/") && modeOf(r, p) != 0o755 {
				t.Errorf("%s: %s is a program, its mode is %o", name, p, modeOf(r, p))
			}
			return err
		})
		if err != nil {
			t.Error(err)
		}
	}
	b, err := GetBoot()
	if err != nil {
		t.Fatal(err)
	}
	if b.Kernel != "linux-image-cloud-amd64" || !strings.HasPrefix(string(b.Init), "#!/bin/busybox sh\n") {
		t.Errorf("boot: %+v", b)
	}
}

func modeOf(r Recipe, p string) fs.FileMode {
	for _, m := range r.Modes {
		if m.Path == p {
			return m.Mode
		}
	}
	return 0o644
}

func TestGetUnknown(t *testing.T) {
	_, err := Get("builtin/../tiny")
	if want := `no such built-in box: "../tiny" (there are debian-12, tiny)`; err == nil || err.Error() != want || !errors.Is(err, ErrNotFound) {
		t.Errorf("got %v, want %s", err, want)
	}
}

func TestValidate(t *testing.T) {
	r := Recipe{
		Suite: "bookworm", Packages: []string{"a b"}, Others: []Other{{"trixie", []string{"C"}}}, Size: lab.GiB, Journal: 4 * lab.MiB,
		Keep: []string{"["}, Drop: []string{"/etc"},
		Links: []Link{{"../x", "y"}, {"a", "b"}, {"a", "c"}},
		Modes: []Entry{{"etc/nosuch", 0o755}}, Dirs: []Entry{{"/tmp", 0o1777}}, Files: fstest.MapFS{},
	}
	want := []string{
		"suite and variant are needed",
		"size_mib, journal_mib and min_memory_mib must be positive",
		"other_suites: packages of trixie cannot be installed over those of bookworm, only unpacked (variant: extract)",
		`"a b" is not the name of a package`,
		`"C" is not the name of a package`,
		`bad pattern "["`,
		`bad pattern "/etc"`,
		`bad link "../x" to "y"`,
		`two links "a"`,
		`bad path "/tmp"`,
		"modes: no file etc/nosuch",
	}
	if got := r.validate(); got == nil || got.Error() != strings.Join(want, "\n") {
		t.Errorf("got\n%v\nwant\n%s", got, strings.Join(want, "\n"))
	}
}
