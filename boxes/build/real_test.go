// SPDX-License-Identifier: Apache-2.0

//go:build e2e

package build

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/labfile/lab/internal/program"
)

// TestRealTinyTwice builds builtin/tiny twice from Debian's packages: the file system
// is sound, and both builds are equal to the bit.
func TestRealTinyTwice(t *testing.T) {
	t.Setenv("TMPDIR", openTemp(t))
	sums := make([]string, 2)
	for i := range sums {
		dir := t.TempDir()
		var stages []string
		b := &Builder{Mirror: os.Getenv(MirrorEnv)}
		a, err := b.BuildFiles(t.Context(), "tiny", dir, func(p Progress) {
			if len(stages) == 0 || stages[len(stages)-1] != p.Stage {
				stages = append(stages, p.Stage)
			}
		})
		if err != nil {
			t.Fatal(err)
		}
		if got, want := strings.Join(stages, ", "), "installing packages, making the disk, packing the disk"; got != want {
			t.Errorf("stages are %q, want %q", got, want)
		}
		for _, f := range []string{a.Disk, a.Kernel, a.Initrd, filepath.Join(dir, "config.json")} {
			content, err := os.ReadFile(f)
			if err != nil {
				t.Fatal(err)
			}
			sums[i] += fmt.Sprintf("%s %x\n", filepath.Base(f), sha256.Sum256(content))
		}
		raw := filepath.Join(dir, "raw")
		if out, err := exec.Command("qemu-img", "convert", "-f", "qcow2", "-O", "raw", a.Disk, raw).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		fsck, err := program.Look("e2fsck")
		if err != nil {
			t.Fatal(err)
		}
		if out, err := exec.Command(fsck, "-fn", raw).CombinedOutput(); err != nil {
			t.Errorf("e2fsck: %v\n%s", err, out)
		}
		debugfs, err := program.Look("debugfs")
		if err != nil {
			t.Fatal(err)
		}
		out, err := exec.Command(debugfs, "-R", "cat /etc/inittab", raw).Output()
		if err != nil || !bytes.Contains(out, []byte("::sysinit:/etc/init.d/rcS")) {
			t.Errorf("/etc/inittab is %q (%v)", out, err)
		}
	}
	if sums[0] != sums[1] {
		t.Errorf("two builds differ:\n%s\n%s", sums[0], sums[1])
	}
	nothingLeft(t)
}

// TestRealInterrupted ends a build while packages are being unpacked.
func TestRealInterrupted(t *testing.T) {
	t.Setenv("TMPDIR", openTemp(t))
	stop := errors.New("enough")
	ctx, cancel := context.WithCancelCause(t.Context())
	defer cancel(nil)
	b := &Builder{Mirror: os.Getenv(MirrorEnv), Log: func(line string) {
		if strings.Contains(line, "extracting archives") {
			cancel(stop)
		}
	}}
	_, err := b.BuildFiles(ctx, "tiny", t.TempDir(), func(Progress) {})
	if want := `building box "tiny": enough`; !errors.Is(err, stop) || err.Error() != want {
		t.Errorf("got %v, want %s", err, want)
	}
	nothingLeft(t)
}

// openTemp makes a temporary directory that the subordinate users of a user
// namespace can reach, which t.TempDir's can't be.
func openTemp(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "lab-test-*")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o711); err != nil {
		t.Fatal(err)
	}
	return dir
}

// nothingLeft wants the temporary directory empty.
func nothingLeft(t *testing.T) {
	t.Helper()
	left, err := os.ReadDir(os.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range left {
		if strings.HasPrefix(e.Name(), "lab-") || strings.HasPrefix(e.Name(), "mmdebstrap") {
			t.Errorf("left behind: %s", e.Name())
		}
	}
}
