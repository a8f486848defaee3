// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/labfile/lab/internal/dirs"
	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/providers"
	"github.com/labfile/lab/providers/local"
	"github.com/labfile/lab/providers/providertest"
)

// testDirs returns empty directories, with a runtime directory whose path is
// short enough for sockets.
func testDirs(t *testing.T) dirs.Dirs {
	t.Helper()
	run, err := os.MkdirTemp("/tmp", "labq-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(run) })
	tmp := t.TempDir()
	return dirs.Dirs{Data: filepath.Join(tmp, "data, with comma"), Run: run, Cache: filepath.Join(tmp, "cache")}
}

func leftovers(t *testing.T, d dirs.Dirs) []string {
	t.Helper()
	found := providertest.Hypervisors(t, filepath.Dir(d.Data))
	for _, root := range []string{d.Labs(), d.Run} {
		err := filepath.WalkDir(root, func(path string, e fs.DirEntry, err error) error {
			if err != nil && !local.Gone(err) {
				return err
			}
			if err == nil && path != root && !(e.IsDir() && filepath.Dir(path) == root && root == d.Labs()) {
				found = append(found, path)
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return found
}

func TestConformance(t *testing.T) {
	providertest.Run(t, func(t *testing.T) providertest.Host {
		d := testDirs(t)
		cfg := Config{Dirs: d, Accel: "tcg"}
		p := New(cfg)
		send := func(s syscall.Signal) func(*testing.T, providers.Machine) {
			return func(t *testing.T, m providers.Machine) {
				if err := syscall.Kill(m.PID, s); err != nil {
					t.Fatal(err)
				}
			}
		}
		return providertest.Host{
			Provider: p, Other: New(cfg),
			Image: providertest.BootImage(t, false), Deaf: providertest.BootImage(t, true), Memory: 16 * lab.MiB,
			Kill: send(syscall.SIGKILL),
			Freeze: func(t *testing.T, m providers.Machine) {
				send(syscall.SIGSTOP)(t, m)
				for !local.Halted(m.PID) { // the signal takes its time
					time.Sleep(time.Millisecond)
				}
			},
			Pause: func(t *testing.T, m providers.Machine) {
				if err := command(t.Context(), d.Socket(m.Generation, socketMonitor), "stop"); err != nil {
					t.Fatal(err)
				}
			},
			Isolate: func(t *testing.T, m providers.Machine) {
				if err := os.RemoveAll(d.RunLab(m.Lab)); err != nil {
					t.Fatal(err)
				}
			},
			Halve: func(t *testing.T, g lab.Generation) {
				dir := d.Generation(g)
				if err := os.Remove(filepath.Join(dir, local.FileDefinition)); err != nil {
					t.Fatal(err)
				}
				if err := os.Truncate(filepath.Join(dir, local.FileOverlay), 100); err != nil {
					t.Fatal(err)
				}
			},
			HalveDestroy: func(t *testing.T, g lab.Generation) {
				dir := d.Generation(g)
				trash := filepath.Join(filepath.Dir(dir), fmt.Sprintf("%s-%d-ABCDEFGH", local.TrashPrefix, g.Number))
				if err := os.Rename(dir, trash); err != nil {
					t.Fatal(err)
				}
				if err := os.Remove(filepath.Join(trash, local.FileDefinition)); err != nil {
					t.Fatal(err)
				}
			},
			ReadDisk:  providertest.ReadDisk,
			Leftovers: func(t *testing.T) []string { return leftovers(t, d) },
		}
	})
}
