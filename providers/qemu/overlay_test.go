// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/labfile/lab/internal/lab"
)

// qemu-img is the judge of the overlays that are written here.
func TestOverlayIsSound(t *testing.T) {
	for _, c := range []struct{ size, virtual lab.Bytes }{
		{1, 512},
		{lab.MiB, lab.MiB},
		{512 * lab.MiB, 512 * lab.MiB},
		{512*lab.MiB + 1, 512*lab.MiB + 512},
		{10 * lab.GiB, 10 * lab.GiB},
		{maxOverlay, maxOverlay},
	} {
		path := filepath.Join(t.TempDir(), "o.qcow2")
		if err := writeOverlay(path, c.size); err != nil {
			t.Fatal(err)
		}
		out, err := exec.Command("qemu-img", "check", "-f", "qcow2", path).CombinedOutput()
		if err != nil || !bytes.Contains(out, []byte("No errors were found on the image.")) {
			t.Errorf("%s: qemu-img check: %v: %s", c.size, err, out)
		}
		out, err = exec.Command("qemu-img", "info", "--output=json", "-f", "qcow2", path).Output()
		if err != nil {
			t.Fatal(err)
		}
		var info struct {
			VirtualSize lab.Bytes `json:"virtual-size"`
			Cluster     int       `json:"cluster-size"`
			Backing     string    `json:"backing-filename"`
		}
		if err := json.Unmarshal(out, &info); err != nil {
			t.Fatal(err)
		}
		if info.VirtualSize != c.virtual || info.Cluster != 65536 || info.Backing != "" {
			t.Errorf("%s: qemu-img info: %+v", c.size, info)
		}
		// Data written through QEMU is still there, and the image still sound.
		io := exec.Command("qemu-io", "-f", "qcow2", "-c", "write -P 7 0 512", "-c", "read -P 7 0 512", path)
		if out, err := io.CombinedOutput(); err != nil || bytes.Contains(out, []byte("failed")) {
			t.Errorf("%s: qemu-io: %v: %s", c.size, err, out)
		}
		if out, err := exec.Command("qemu-img", "check", "-f", "qcow2", path).CombinedOutput(); err != nil {
			t.Errorf("%s: qemu-img check after a write: %v: %s", c.size, err, out)
		}
	}
}

func TestOverlayIsTheSameEachTime(t *testing.T) {
	dir := t.TempDir()
	var files [2][]byte
	for i, name := range []string{"a", "b"} {
		path := filepath.Join(dir, name)
		if err := writeOverlay(path, lab.GiB); err != nil {
			t.Fatal(err)
		}
		var err error
		if files[i], err = os.ReadFile(path); err != nil {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(files[0], files[1]) {
		t.Error("two overlays of one size differ")
	}
}

func TestOverlayRefused(t *testing.T) {
	path := filepath.Join(t.TempDir(), "o.qcow2")
	for size, want := range map[lab.Bytes]string{
		0:              "overlay of 0B: must be more than nothing and at most 4TiB",
		-5:             "overlay of -5B: must be more than nothing and at most 4TiB",
		maxOverlay + 1: "overlay of 4398046511105B: must be more than nothing and at most 4TiB",
	} {
		if err := writeOverlay(path, size); err == nil || err.Error() != want {
			t.Errorf("got %v, want %s", err, want)
		}
	}
}
