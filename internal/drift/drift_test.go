// SPDX-License-Identifier: Apache-2.0

package drift

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// tool runs a program; the host must have it.
func tool(t testing.TB, stdin string, argv ...string) string {
	t.Helper()
	path, err := exec.LookPath(argv[0])
	if err != nil {
		t.Fatalf("%s is missing: install e2fsprogs and qemu-utils", argv[0])
	}
	cmd := exec.Command(path, argv[1:]...)
	cmd.Stdin = strings.NewReader(stdin)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%q: %v\n%s", argv, err, out)
	}
	return string(out)
}

// image makes a file system of a tree.
func image(t testing.TB, tree, size string, args ...string) string {
	t.Helper()
	disk := filepath.Join(t.TempDir(), "disk.raw")
	argv := append([]string{"mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "-E", "root_owner=0:0"}, args...)
	tool(t, "", append(argv, "-d", tree, disk, size)...)
	return disk
}

// overlay makes a layer above base of what debugfs changes.
func overlay(t testing.TB, base, script string) string {
	t.Helper()
	dir := t.TempDir()
	raw, over := filepath.Join(dir, "new.raw"), filepath.Join(dir, "new.qcow2")
	tool(t, "", "cp", "--sparse=always", base, raw)
	tool(t, script, "debugfs", "-w", "-f", "-", raw)
	tool(t, "", "qemu-img", "convert", "-O", "qcow2", "-B", base, "-F", "raw", raw, over)
	return over
}

func write(t testing.TB, path, content string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

func root(t testing.TB, layers ...Layer) *Root {
	t.Helper()
	c, err := OpenChain(layers)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	v, err := c.View(c.Len())
	if err != nil {
		t.Fatal(err)
	}
	r, err := OpenRoot(v)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func lines(r Report) []string {
	var out []string
	for _, c := range r.Changes {
		out = append(out, strings.TrimSpace(fmt.Sprintf("%s %s %s", c.Op, c.Path, strings.Join(c.What, ","))))
	}
	return out
}

func TestCompare(t *testing.T) {
	tree := t.TempDir()
	for _, name := range []string{"etc/motd", "etc/hosts", "etc/passwd", "etc/gone", "etc/kind", "var/log/syslog", "srv/raw"} {
		write(t, filepath.Join(tree, name), strings.Repeat(name+"\n", 2000))
	}
	if err := os.Symlink("motd", filepath.Join(tree, "etc/link")); err != nil {
		t.Fatal(err)
	}
	if err := os.Link(filepath.Join(tree, "srv/raw"), filepath.Join(tree, "srv/twin")); err != nil {
		t.Fatal(err)
	}
	other := filepath.Join(t.TempDir(), "other")
	write(t, other, "another content\n")
	base := image(t, tree, "64M")
	block := strings.Fields(tool(t, "", "debugfs", "-R", "blocks /srv/raw", base))
	bnum := block[len(block)-1]
	script := strings.Join([]string{
		"rm /etc/gone", "rm /etc/kind", "mkdir /etc/kind",
		"rm /etc/motd", "write " + other + " /etc/motd",
		"set_inode_field /etc/hosts mode 0100600",
		"set_inode_field /etc/passwd uid 1000",
		"rm /etc/link", "symlink /etc/link hosts",
		"write " + other + " /etc/new",
		"mkdir /opt", "write " + other + " /opt/app",
		"write " + other + " /var/log/more",
		"zap_block -o 100 -l 1 -p 0x21 " + bnum, // the inode stays as it was
		"set_inode_field /var/log/syslog mtime 20200101000000",
	}, "\n") + "\n"
	over := overlay(t, base, script)
	old := root(t, Layer{base, "raw"})
	now := root(t, Layer{base, "raw"}, Layer{over, "qcow2"})
	ignore, err := ParseIgnore(Defaults())
	if err != nil {
		t.Fatal(err)
	}
	got, err := Compare(context.Background(), old, now, Options{Ignore: ignore})
	if err != nil {
		t.Fatal(err)
	}
	want := []string{
		"D /etc/gone", "M /etc/hosts mode", "R /etc/kind", "M /etc/link target", "M /etc/motd content,mode",
		"A /etc/new", "M /etc/passwd owner", "A /opt", "A /opt/app", "M /srv/raw content",
	}
	// debugfs writes files with the mode and owner of the file on the host.
	want[4] = "M /etc/motd content"
	if d := cmp.Diff(want, lines(got)); d != "" {
		t.Errorf("changes (-want +got):\n%s", d)
	}
	if got.Hidden != 1 {
		t.Errorf("%d changes hidden, want 1", got.Hidden)
	}
	for _, c := range got.Changes {
		if c.Path == "/srv/raw" && !cmp.Equal(c.Links, []string{"/srv/twin"}) {
			t.Errorf("links of /srv/raw: %q", c.Links)
		}
	}
	all, err := Compare(context.Background(), old, now, Options{Ignore: ignore, All: true})
	if err != nil {
		t.Fatal(err)
	}
	want = append(want, "M /var/log/syslog mtime", "A /var/log/more")
	if len(all.Changes) != len(want) {
		t.Errorf("with all: %q", lines(all))
	}
	// The same disk in one piece shares nothing with the chain: every byte is read.
	flat := filepath.Join(t.TempDir(), "flat.raw")
	tool(t, "", "cp", base, flat)
	if got, err = Compare(context.Background(), root(t, Layer{flat, "raw"}), now, Options{Ignore: ignore}); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(want[:10], lines(got)); d != "" {
		t.Errorf("unrelated chains (-want +got):\n%s", d)
	}
	if got, err = Compare(context.Background(), now, now, Options{All: true}); err != nil || len(got.Changes) != 0 {
		t.Errorf("a disk against itself: %q, %v", lines(got), err)
	}
}

// TestJournal checks that a log which was not replayed yet counts.
func TestJournal(t *testing.T) {
	for _, features := range []string{"metadata_csum,64bit", "metadata_csum,^64bit", "^metadata_csum,64bit"} {
		for _, version := range []string{"-c -v 3", "-c -v 2", "-v 1"} {
			if strings.HasPrefix(features, "^") && version != "-v 1" {
				continue
			}
			t.Run(features+" "+version, func(t *testing.T) {
				tree := t.TempDir()
				write(t, filepath.Join(tree, "etc/a"), strings.Repeat("a", 4096))
				write(t, filepath.Join(tree, "etc/b"), strings.Repeat("b", 4096))
				write(t, filepath.Join(tree, "etc/c"), strings.Repeat("c", 4096))
				base := image(t, tree, "64M", "-O", features)
				at := func(p string) string { return strings.TrimSpace(tool(t, "", "debugfs", "-R", "blocks "+p, base)) }
				num := func(p string) string { f := strings.Fields(at(p)); return f[len(f)-1] }
				x := filepath.Join(t.TempDir(), "x")
				write(t, x, "\xc0\x3b\x39\x98"+strings.Repeat("x", 4092)) // must be escaped
				log := func(cmds ...string) string {
					return "jo " + version + "\n" + strings.Join(cmds, "\n") + "\njc\n"
				}
				script := log("jw -b "+num("/etc/a")+" "+x, "jw -b "+num("/etc/b")+" "+x, "jw -r "+num("/etc/b"))
				over := overlay(t, base, script)
				got, err := Compare(context.Background(), root(t, Layer{base, "raw"}), root(t, Layer{base, "raw"}, Layer{over, "qcow2"}), Options{})
				if err != nil {
					t.Fatal(err)
				}
				if d := cmp.Diff([]string{"M /etc/a content"}, lines(got)); d != "" {
					t.Errorf("changes (-want +got):\n%s", d)
				}
			})
		}
	}
}

func TestIgnore(t *testing.T) {
	ig, err := ParseIgnore(Defaults(), "*.bak\nbuild/\n/srv/é*/x\n!/var/log/keep\n")
	if err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]bool{
		"/var/log": false, "/var/log/a/b": true, "/var/log/keep": false, "/etc/machine-id": true, "/etc/machine-id2": false,
		"/etc/a.bak": true, "/a.bak": true, "/x/build": false, "/x/build/y": true, "/srv/éa/x": true, "/tmp": false,
		"/root/.bash_history": true, "/srv/x/é": false,
	} {
		if got := ig.Match(path, false); got != want {
			t.Errorf("Match(%q) = %v, want %v", path, got, want)
		}
	}
	if !ig.Match("/x/build", true) {
		t.Error("the folder /x/build is not ignored")
	}
}

// BenchmarkDiff compares 30,000 files of a 4 GiB disk after a small change.
func BenchmarkDiff(b *testing.B) {
	tree := b.TempDir()
	for n := range 30000 {
		write(b, filepath.Join(tree, fmt.Sprintf("usr/%d/%d/%d", n/1000, n/20%50, n)), strings.Repeat("x", 1000+n%30000))
	}
	base := image(b, tree, "4G")
	x := filepath.Join(b.TempDir(), "x")
	write(b, x, "x")
	over := overlay(b, base, "rm /usr/3/5/3110\nwrite "+x+" /usr/new\nset_inode_field /usr/7/0/7001 mode 0100600\n")
	b.ResetTimer()
	for b.Loop() {
		old, now := root(b, Layer{base, "raw"}), root(b, Layer{base, "raw"}, Layer{over, "qcow2"})
		r, err := Compare(context.Background(), old, now, Options{})
		if err != nil {
			b.Fatal(err)
		}
		if len(r.Changes) != 3 {
			b.Fatalf("%q", lines(r))
		}
	}
}
