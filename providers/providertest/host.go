// SPDX-License-Identifier: Apache-2.0

package providertest

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/providers"
)

// What tests of providers that run QEMU on this host have in common.

// BootImage is an image whose disk is BootDisk's.
func BootImage(t *testing.T, deaf bool) providers.Image {
	t.Helper()
	disk := BootDisk(deaf)
	path := filepath.Join(t.TempDir(), "boot, disk.raw")
	if err := os.WriteFile(path, disk, 0o400); err != nil {
		t.Fatal(err)
	}
	return providers.Image{
		Digest: "sha256:" + strings.Repeat("1", 64), Arch: "amd64",
		Disk: path, Format: "raw", Size: lab.Bytes(len(disk)),
	}
}

// Hypervisors returns the command lines of live QEMU processes that name word.
func Hypervisors(t *testing.T, word string) []string {
	t.Helper()
	procs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	for _, p := range procs {
		b, err := os.ReadFile(filepath.Join(p, "cmdline"))
		if err == nil && bytes.Contains(b, []byte("qemu-system")) && bytes.Contains(b, []byte(word)) {
			found = append(found, fmt.Sprintf("%s: %.200q", p, b))
		}
	}
	return found
}

// ReadDisk has qemu-img put the layers together.
func ReadDisk(t *testing.T, layers []providers.Layer) []byte {
	t.Helper()
	var below map[string]any
	for _, l := range layers {
		n := map[string]any{"driver": l.Format, "file": map[string]any{"driver": "file", "filename": l.Path}}
		if l.Format == "qcow2" {
			n["backing"] = nil
			if below != nil {
				n["backing"] = below
			}
		}
		below = n
	}
	name, err := json.Marshal(below)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "disk.raw")
	out, err := exec.Command("qemu-img", "convert", "-O", "raw", "json:"+string(name), path).CombinedOutput()
	if err != nil {
		t.Fatalf("qemu-img convert: %v: %s", err, out)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}
