// SPDX-License-Identifier: Apache-2.0

package drift

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// list is a manifest of lines: the numbers, the path, and the target of a link.
func list(lines ...string) string {
	text := "lab-manifest 1\x00"
	for _, line := range append([]string{"d 755 0 0 4096 1.5 1.5 2 20 9 0 /"}, lines...) {
		f := strings.SplitN(line, " ", 13)
		target := ""
		if len(f) == 13 {
			target = f[12]
		}
		text += strings.Join(f[:11], " ") + "\x00" + target + "\x00" + f[11] + "\x00"
	}
	return text + "end\x00"
}

func manifest(t testing.TB, lines ...string) *Manifest {
	t.Helper()
	m, err := ReadManifest(strings.NewReader(list(lines...)))
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func TestCompareManifests(t *testing.T) {
	for _, tc := range []struct {
		name, old, now string
		same, other    string // what differs of one generation, and of two
	}{
		{"the same", "f 644 0 0 5 7.1 7.2 11 1 9 0 /a", "f 644 0 0 5 7.1 7.2 11 1 9 0 /a", "", ""},
		{"size", "f 644 0 0 5 7.1 7.2 11 1 9 0 /a", "f 644 0 0 6 7.1 7.2 11 1 9 0 /a", "M /a content", "M /a content"},
		{"a nanosecond", "f 644 0 0 5 7.1 7.2 11 1 9 0 /a", "f 644 0 0 5 7.100000001 7.2 11 1 9 0 /a", "M /a content", "M /a content"},
		{"digits beyond", "f 644 0 0 5 7.1 7.2 11 1 9 0 /a", "f 644 0 0 5 7.1000000004 7.2 11 1 9 0 /a", "", ""},
		{"sed -i and touch", "f 644 0 0 5 7.1 7.2 11 1 9 0 /a", "f 644 0 0 5 7.1 9.2 12 1 9 0 /a", "M /a content", ""},
		{"written, and touch", "f 644 0 0 5 7.1 7.2 11 1 9 0 /a", "f 644 0 0 5 7.1 9.2 11 1 9 0 /a", "M /a content", ""},
		{"chmod", "f 644 0 0 5 7.1 7.2 11 1 9 0 /a", "f 4755 0 0 5 7.1 9.2 11 1 9 0 /a", "M /a mode", "M /a mode"},
		{"chown", "f 644 0 0 5 7.1 7.2 11 1 9 0 /a", "f 644 0 1 5 7.1 9.2 11 1 9 0 /a", "M /a owner", "M /a owner"},
		{"ln", "f 644 0 0 5 7.1 7.2 11 1 9 0 /a", "f 644 0 0 5 7.1 9.2 11 2 9 0 /a", "", ""},
		{"a folder's times", "d 755 0 0 5 7.1 7.2 11 1 9 0 /a", "d 755 0 0 6 8.1 9.2 12 1 9 0 /a", "", ""},
		{"target", "l 777 0 0 1 7.1 7.2 11 1 9 0 /a b", "l 777 0 0 1 7.1 7.2 11 1 9 0 /a c d", "M /a target", "M /a target"},
		{"device", "c 644 0 0 0 7.1 7.2 11 1 9 1:a /a", "c 644 0 0 0 7.1 7.2 11 1 9 1:b /a", "M /a device", "M /a device"},
		{"kind", "f 644 0 0 5 7.1 7.2 11 1 9 0 /a", "d 755 0 0 5 7.1 7.2 11 1 9 0 /a", "R /a", "R /a"},
		{"gone", "f 644 0 0 5 7.1 7.2 11 1 9 0 /a", "", "D /a", "D /a"},
		{"raw mode", "f 4755 0 0 5 7.1 7.2 11 1 9 0 /a", "x89ed - 0 0 5 7.1 7.2 11 1 9 0:0 /a", "", ""},
		{"link as busybox shows it", "l 777 0 0 1 7.1 7.2 11 1 9 0 /a b", "xa1ff - 0 0 1 7.1 7.2 11 1 9 0:0 /a '/a' -> 'b'", "", ""},
		{"mounted over", "d 755 0 0 5 7.1 7.2 11 1 9 0 /a", "d 700 0 0 5 7.1 7.2 1 1 8 0 /a", "", ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var old, now []string
			if old = []string{tc.old}; tc.now != "" {
				now = []string{tc.now}
			}
			a, b := manifest(t, old...), manifest(t, now...)
			for same, want := range map[bool]string{true: tc.same, false: tc.other} {
				if got := strings.Join(lines(CompareManifests(a, b, same, Options{})), ", "); got != want {
					t.Errorf("one generation: %v: got %q, want %q", same, got, want)
				}
			}
		})
	}
}

func TestCompareManifestsLinksAndMounts(t *testing.T) {
	old := manifest(
		t,
		"f 644 0 0 5 7.1 7.2 11 2 9 0 /a", "f 644 0 0 5 7.1 7.2 11 2 9 0 /b",
		"d 755 0 0 5 7.1 7.2 12 2 9 0 /m", "f 644 0 0 5 7.1 7.2 13 1 9 0 /m/under", "f 644 0 0 5 7.1 7.2 14 1 9 0 /m-beside",
	)
	now := manifest(
		t,
		"f 644 0 0 6 8.1 8.2 11 2 9 0 /a", "f 644 0 0 6 8.1 8.2 11 2 9 0 /b",
		"d 755 0 0 5 7.1 7.2 1 2 8 0 /m", "f 644 0 0 9 7.1 7.2 14 1 9 0 /m-beside",
	)
	ignore, err := ParseIgnore("/m-beside")
	if err != nil {
		t.Fatal(err)
	}
	r := CompareManifests(old, now, true, Options{Ignore: ignore})
	if d := cmp.Diff([]string{"M /a content"}, lines(r)); d != "" || r.Hidden != 1 {
		t.Errorf("%d hidden, %s", r.Hidden, d)
	}
	if d := cmp.Diff([]string{"/b"}, r.Changes[0].Links); d != "" {
		t.Error(d)
	}
}

func TestReadManifestRefuses(t *testing.T) {
	good := list("f 644 0 0 5 7.1 7.2 11 1 9 0 /a")
	for _, tc := range []struct{ text, want string }{
		{"", "unexpected EOF"},
		{"ELF\x00", `it begins with "ELF"`},
		{strings.TrimSuffix(good, "end\x00"), "unexpected EOF"},
		{"lab-manifest 1\x00end\x00", "it is empty"},
		{list("f 644 0 0 5 7.1 7.2 11 1 9 0 /a", "f 644 0 0 5 7.1 7.2 11 1 9 0 /a"), `"/a" is listed twice`},
		{list("f 644 0 0 5 7.1 7.2 11 1 9 0 /a/../b"), `"/a/../b": not the path of a file`},
		{list("f 644 0 0 5 7.1 7.2 11 1 9 0 a"), `"a": not the path of a file`},
		{list("f 644 0 0 -5 7.1 7.2 11 1 9 0 /a"), `"/a": strconv.ParseUint: parsing "-5": invalid syntax`},
		{list("c 644 0 0 5 7.1 7.2 11 1 9 0 /a"), `"/a": "0" is no device`},
		{"lab-manifest 1\x00" + strings.Repeat("x", 1<<20), "a text of more than 98304 bytes"},
	} {
		_, err := ReadManifest(strings.NewReader(tc.text))
		if err == nil || err.Error() != "reading a list of files: "+tc.want {
			t.Errorf("%.40q: got %v, want %s", tc.text, err, tc.want)
		}
	}
}

// TestManifestOfDisk lists two disks: what was changed is found as in the disks.
func TestManifestOfDisk(t *testing.T) {
	tree, other := t.TempDir(), filepath.Join(t.TempDir(), "other")
	for _, name := range []string{"etc/motd", "etc/hosts", "etc/gone"} {
		write(t, filepath.Join(tree, name), name+"\n")
	}
	if err := os.Symlink("motd", filepath.Join(tree, "etc/link")); err != nil {
		t.Fatal(err)
	}
	write(t, other, "another content\n")
	base := image(t, tree, "8M")
	over := overlay(t, base, "rm /etc/gone\nrm /etc/motd\nwrite "+other+" /etc/motd\nset_inode_field /etc/hosts mode 0100600\n"+
		"rm /etc/link\nsymlink /etc/link hosts\nmkdir /opt\nwrite "+other+" /opt/app\n")
	old, now := root(t, Layer{base, "raw"}), root(t, Layer{base, "raw"}, Layer{over, "qcow2"})
	want, err := Compare(context.Background(), old, now, Options{})
	if err != nil {
		t.Fatal(err)
	}
	var lists []*Manifest
	for _, r := range []*Root{old, now} {
		m, err := r.Manifest(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		lists = append(lists, m)
	}
	if d := cmp.Diff(lines(want), lines(CompareManifests(lists[0], lists[1], true, Options{}))); d != "" || len(want.Changes) != 6 {
		t.Errorf("%d changes; lists against disks: %s", len(want.Changes), d)
	}
}

// TestUnreadable names what else may be on a disk.
func TestUnreadable(t *testing.T) {
	tree := t.TempDir()
	write(t, filepath.Join(tree, "etc/a"), "a")
	encrypted := image(t, tree, "8M", "-O", "encrypt")
	for name, tc := range map[string]struct {
		at   int64
		text string
		want string
	}{
		"empty": {0, "", "no ext4 was found on the disk"},
		"xfs":   {0, "XFSB", "it may be on xfs"},
		"btrfs": {0x10040, "_BHRfS_M", "it may be on btrfs"},
		"LVM":   {512, "LABELONE", "it may be on LVM"},
		"ext4":  {-1, "", "ext4 with features that are not supported: 0x10000"},
	} {
		disk := encrypted
		if tc.at >= 0 {
			disk = filepath.Join(t.TempDir(), name)
			if err := os.WriteFile(disk, append(make([]byte, tc.at), tc.text...), 0o600); err != nil {
				t.Fatal(err)
			}
			if err := os.Truncate(disk, 1<<20); err != nil {
				t.Fatal(err)
			}
		}
		c, err := OpenChain([]Layer{{disk, "raw"}})
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		v, err := c.View(1)
		if err != nil {
			t.Fatal(err)
		}
		_, err = OpenRoot(v)
		var un *UnreadableError
		if !errors.As(err, &un) || un.Why != tc.want {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestSidesOfGuests shows and writes down what a guest says of its files, and does
// without what nobody has kept.
func TestSidesOfGuests(t *testing.T) {
	files := map[string]string{
		"/a": "new\n", "/etc/passwd": "root:x:0:0::/:\nops:x:7:7::/:\n", "/etc/group": "root:x:0:\nops:x:7:\n",
	}
	now := Asked(func(_ context.Context, w io.Writer, path string, limit int64) error {
		text, ok := files[path]
		if !ok {
			return errors.New("it went away")
		}
		_, err := io.WriteString(w, text[:min(int64(len(text)), limit)])
		return err
	})
	old := []string{"f 644 0 0 5 7.1 7.2 11 1 9 0 /a", "f 644 0 0 5 7.1 7.2 12 1 9 0 /d", "f 644 0 0 5 7.1 7.2 13 1 9 0 /w"}
	later := []string{"f 644 7 7 4 8.1 8.2 11 1 9 0 /a", "f 644 0 0 5 8.1 8.2 13 1 9 0 /w"}
	changes := CompareManifests(manifest(t, old...), manifest(t, later...), true, Options{}).Changes
	var texts []string
	for _, c := range changes {
		text, err := Diff(t.Context(), Lost(now, changes), now, c)
		if err != nil {
			t.Fatal(err)
		}
		texts = append(texts, text)
	}
	want := []string{
		"\"/a\" was changed; what was in it was not kept, and this is in it now:\ndiff /dev/null b/a\n--- /dev/null\n+++ b/a\n@@ -0,0 +1,1 @@\n+new\n",
		"\"/d\" was deleted; what was in it was not kept\n",
		"\"/w\" could not be read: it went away\n",
	}
	if d := cmp.Diff(want, texts); d != "" {
		t.Error(d)
	}
	steps, err := Provision(t.Context(), Lost(now, changes), now, changes, ProvisionOptions{})
	if err != nil {
		t.Fatal(err)
	}
	wantSteps := `      # "/w" could not be read: it went away
      - shell: |
          rm -rf -- /d
      - file:
          to: /a
          content: |
            new
          mode: "0644"
          owner: ops:ops
`
	if d := cmp.Diff(wantSteps, steps); d != "" {
		t.Error(d)
	}
	// Names that came later are not those of the image.
	changes = append(changes, Change{Op: Modified, Path: "/etc/passwd", Old: &Meta{Kind: KindFile}, New: &Meta{Kind: KindFile, Mode: "0644"}, What: []string{MTime}})
	if steps, err = Provision(t.Context(), Lost(now, changes), now, changes, ProvisionOptions{}); err != nil || !strings.Contains(steps, "owner: 7:ops\n") {
		t.Errorf("with other accounts: %v\n%s", err, steps)
	}
}

// FuzzReadManifest reads what guests may say of their files.
func FuzzReadManifest(f *testing.F) {
	f.Add([]byte(list("f 644 0 0 5 7.1 7.2 11 1 9 0 /a", "xa1ff - 0 0 5 7 -7 11 1 8 0:0 /b '/b' -> 'c'")))
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := ReadManifest(strings.NewReader(string(b)))
		if err != nil {
			return
		}
		if r := CompareManifests(m, m, true, Options{All: true}); len(r.Changes) != 0 {
			t.Errorf("it differs from itself: %q", lines(r))
		}
	})
}
