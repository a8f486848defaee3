// SPDX-License-Identifier: Apache-2.0

package qcow2

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/labfile/lab/internal/lab"
)

// qemu-img is the judge of the images that are written here.
func TestImageIsSound(t *testing.T) {
	for _, c := range []struct{ size, virtual lab.Bytes }{
		{1, 512},
		{lab.MiB, lab.MiB},
		{512 * lab.MiB, 512 * lab.MiB},
		{512*lab.MiB + 1, 512*lab.MiB + 512},
		{10 * lab.GiB, 10 * lab.GiB},
		{MaxSize, MaxSize},
	} {
		path := filepath.Join(t.TempDir(), "o.qcow2")
		if err := Create(path, c.size); err != nil {
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

func TestImageIsTheSameEachTime(t *testing.T) {
	dir := t.TempDir()
	var files [2][]byte
	for i, name := range []string{"a", "b"} {
		path := filepath.Join(dir, name)
		if err := Create(path, lab.GiB); err != nil {
			t.Fatal(err)
		}
		var err error
		if files[i], err = os.ReadFile(path); err != nil {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(files[0], files[1]) {
		t.Error("two images of one size differ")
	}
}

func TestSizesRefused(t *testing.T) {
	path := filepath.Join(t.TempDir(), "o.qcow2")
	for size, want := range map[lab.Bytes]string{
		0:           "disk of 0B: must be more than nothing and at most 4TiB",
		-5:          "disk of -5B: must be more than nothing and at most 4TiB",
		MaxSize + 1: "disk of 4398046511105B: must be more than nothing and at most 4TiB",
	} {
		if err := Create(path, size); err == nil || err.Error() != want {
			t.Errorf("got %v, want %s", err, want)
		}
	}
}
