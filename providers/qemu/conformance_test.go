// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"bytes"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/labfile/lab/internal/dirs"
	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/providers"
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

func testImage(t *testing.T, deaf bool) providers.Image {
	t.Helper()
	disk := providertest.BootDisk(deaf)
	path := filepath.Join(t.TempDir(), "boot, disk.raw")
	if err := os.WriteFile(path, disk, 0o400); err != nil {
		t.Fatal(err)
	}
	return providers.Image{
		Digest: "sha256:" + strings.Repeat("1", 64), Arch: "amd64",
		Disk: path, Format: "raw", Size: lab.Bytes(len(disk)),
	}
}

// hypervisors returns the command lines of live processes that name dir.
func hypervisors(t *testing.T, dir string) []string {
	t.Helper()
	procs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	for _, p := range procs {
		b, err := os.ReadFile(filepath.Join(p, "cmdline"))
		if err == nil && bytes.Contains(b, []byte("qemu-system")) && bytes.Contains(b, []byte(filepath.Base(filepath.Dir(dir)))) {
			found = append(found, fmt.Sprintf("%s: %.200q", p, b))
		}
	}
	return found
}

func leftovers(t *testing.T, d dirs.Dirs) []string {
	t.Helper()
	found := hypervisors(t, d.Data)
	for _, root := range []string{d.Labs(), d.Run} {
		err := filepath.WalkDir(root, func(path string, e fs.DirEntry, err error) error {
			if err != nil && !gone(err) {
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

// readDisk has qemu-img put the layers together.
func readDisk(t *testing.T, layers []providers.Layer) []byte {
	t.Helper()
	var below node
	for _, l := range layers {
		n := node{"driver": l.Format, "file": node{"driver": "file", "filename": l.Path}}
		if l.Format == "qcow2" {
			n["backing"] = nil
			if below != nil {
				n["backing"] = below
			}
		}
		below = n
	}
	path := filepath.Join(t.TempDir(), "disk.raw")
	out, err := exec.Command("qemu-img", "convert", "-O", "raw", "json:"+encode(below), path).CombinedOutput()
	if err != nil {
		t.Fatalf("qemu-img convert: %v: %s", err, out)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
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
			Image: testImage(t, false), Deaf: testImage(t, true), Memory: 16 * lab.MiB,
			Kill: send(syscall.SIGKILL),
			Freeze: func(t *testing.T, m providers.Machine) {
				send(syscall.SIGSTOP)(t, m)
				for !halted(m.PID) { // the signal takes its time
					time.Sleep(time.Millisecond)
				}
			},
			Halve: func(t *testing.T, g lab.Generation) {
				dir := d.Generation(g)
				if err := os.Remove(filepath.Join(dir, fileDefinition)); err != nil {
					t.Fatal(err)
				}
				if err := os.Truncate(filepath.Join(dir, fileOverlay), 100); err != nil {
					t.Fatal(err)
				}
			},
			HalveDestroy: func(t *testing.T, g lab.Generation) {
				dir := d.Generation(g)
				trash := filepath.Join(filepath.Dir(dir), fmt.Sprintf("%s-%d-ABCDEFGH", trashPrefix, g.Number))
				if err := os.Rename(dir, trash); err != nil {
					t.Fatal(err)
				}
				if err := os.Remove(filepath.Join(trash, fileDefinition)); err != nil {
					t.Fatal(err)
				}
			},
			ReadDisk:  readDisk,
			Leftovers: func(t *testing.T) []string { return leftovers(t, d) },
		}
	})
}
