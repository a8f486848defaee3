// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// runWith runs a script in shell, which is "sh" for what the script starts too. It returns
// what the script said, on stderr too, and how it ended.
func runWith(t *testing.T, shell, script, dir string, in []byte) (string, error) {
	t.Helper()
	bin := t.TempDir()
	if err := os.Symlink(shell, filepath.Join(bin, "sh")); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, filepath.Join(bin, "sh"), "-c", script, "lab", dir)
	cmd.Env = append(os.Environ(), "PATH="+bin+":"+os.Getenv("PATH"))
	cmd.Stdin = bytes.NewReader(in)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	out, err := cmd.CombinedOutput()
	if ctx.Err() != nil {
		t.Fatalf("it does not end: %s", out)
	}
	return string(out), err
}

// A list that xargs cuts into several is read as a whole, by each shell that is "sh" somewhere.
func TestTarConflictsOfManyFiles(t *testing.T) {
	file, err := os.Lstat("tar.go")
	if err != nil {
		t.Fatal(err)
	}
	folder, err := os.Lstat(".")
	if err != nil {
		t.Fatal(err)
	}
	var items []item
	for i := range 4000 {
		name := fmt.Sprintf("./%04d %s", i, strings.Repeat("n", 40+i%60))
		info := file
		if i%3 == 0 {
			info = folder
		}
		items = append(items, item{name, info})
	}
	list := conflictList(items)
	if len(list) < 256<<10 {
		t.Fatalf("the list has %d bytes only", len(list))
	}
	for _, name := range []string{"dash", "bash", "busybox"} {
		t.Run(name, func(t *testing.T) {
			shell, err := exec.LookPath(name)
			if err != nil {
				t.Skip(err)
			}
			dir := t.TempDir()
			if out, err := runWith(t, shell, tarConflicts, dir, list); err != nil {
				t.Errorf("nothing is there: %v, %s", err, out)
			}
			for _, i := range []int{0, 1500, 2200, 3999} {
				at := filepath.Join(dir, items[i].name)
				if items[i].info.IsDir() {
					err = os.WriteFile(at, nil, 0o600)
				} else {
					err = os.Mkdir(at, 0o700)
				}
				if err != nil {
					t.Fatal(err)
				}
				if _, err := runWith(t, shell, tarConflicts, dir, list); err == nil {
					t.Errorf("the conflict with item %d is not seen", i)
				}
				if err := os.Remove(at); err != nil {
					t.Fatal(err)
				}
			}
		})
	}
}
