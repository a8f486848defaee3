// SPDX-License-Identifier: Apache-2.0

package disk_test

import (
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/labfile/lab/boxes/disk"
)

func qemuImg(t *testing.T, args ...string) []byte {
	t.Helper()
	cmd := exec.Command("qemu-img", args...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", cmd, err, out)
	}
	return out
}

func inspectFile(t *testing.T, path string) (disk.Info, error) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	return disk.Inspect(f, fi.Size())
}

// What qemu-img makes is accepted, and described as qemu-img describes it.
func TestInspectAgreesWithQEMU(t *testing.T) {
	dir := t.TempDir()
	source := filepath.Join(dir, "source.raw")
	content := []byte(strings.Repeat("some content that compresses well. ", 100_000))
	if err := os.WriteFile(source, content[:len(content)&^511], 0o600); err != nil {
		t.Fatal(err)
	}
	create := func(args ...string) []string { return append([]string{"create", "-q"}, args...) }
	convert := func(args ...string) []string { return append([]string{"convert", "-f", "raw"}, args...) }
	tests := []struct {
		name string
		args []string // the path follows
		size string   // of a created image
	}{
		{"qcow2", create("-f", "qcow2"), "10G"},
		{"qcow2 of one sector", create("-f", "qcow2"), "512"},
		{"qcow2 of 16 TiB", create("-f", "qcow2"), "16T"},
		{"version 2", create("-f", "qcow2", "-o", "compat=0.10"), "1G"},
		{"512-byte clusters", create("-f", "qcow2", "-o", "cluster_size=512"), "1G"},
		{"2 MiB clusters", create("-f", "qcow2", "-o", "cluster_size=2M"), "1G"},
		{"extended L2 entries", create("-f", "qcow2", "-o", "extended_l2=on,cluster_size=128k"), "1G"},
		{"lazy refcounts", create("-f", "qcow2", "-o", "lazy_refcounts=on"), "1G"},
		{"1-bit refcounts", create("-f", "qcow2", "-o", "refcount_bits=1"), "1G"},
		{"64-bit refcounts", create("-f", "qcow2", "-o", "refcount_bits=64"), "1G"},
		{"preallocated metadata", create("-f", "qcow2", "-o", "preallocation=metadata"), "1G"},
		{"raw", create("-f", "raw"), "1G"},
		{"converted", convert("-O", "qcow2", source), ""},
		{"converted, small clusters", convert("-O", "qcow2", "-o", "cluster_size=512", source), ""},
		{"converted, extended", convert("-O", "qcow2", "-o", "extended_l2=on", source), ""},
		{"compressed", convert("-c", "-O", "qcow2", source), ""},
		{"compressed, zstd", convert("-c", "-O", "qcow2", "-o", "compression_type=zstd", source), ""},
		{"compressed, version 2", convert("-c", "-O", "qcow2", "-o", "compat=0.10", source), ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "disk")
			args := append(tt.args, path)
			if tt.size != "" {
				args = append(args, tt.size)
			}
			qemuImg(t, args...)
			var want struct {
				Format      string `json:"format"`
				VirtualSize int64  `json:"virtual-size"`
				ClusterSize int64  `json:"cluster-size"`
				Specific    struct {
					Data struct {
						Compat      string `json:"compat"`
						Compression string `json:"compression-type"`
					} `json:"data"`
				} `json:"format-specific"`
			}
			if err := json.Unmarshal(qemuImg(t, "info", "--output=json", path), &want); err != nil {
				t.Fatal(err)
			}
			got, err := inspectFile(t, path)
			if err != nil {
				t.Fatal(err)
			}
			wanted := disk.Info{
				Format:      disk.Format(want.Format),
				VirtualSize: want.VirtualSize,
				ClusterSize: want.ClusterSize,
				Version:     map[string]int{"0.10": 2, "1.1": 3}[want.Specific.Data.Compat],
				Compression: want.Specific.Data.Compression,
			}
			if got != wanted {
				t.Errorf("Inspect = %+v, qemu-img says %+v", got, wanted)
			}
		})
	}
}

// What depends on something else is refused when qemu-img made it, too.
func TestInspectRefusesWhatQEMUMakes(t *testing.T) {
	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	qemuImg(t, "create", "-q", "-f", "qcow2", path("base"), "1M")
	qemuImg(t, "create", "-q", "-f", "qcow2", "-b", path("base"), "-F", "qcow2", path("backing"))
	qemuImg(t, "create", "-q", "-f", "qcow2", "-o", "data_file="+path("data"), path("data-file"), "1M")
	qemuImg(t, "create", "-q", "-f", "qcow2", "-o", "data_file="+path("data")+",data_file_raw=on", path("raw-data-file"), "1M")
	qemuImg(t, "create", "-q", "-f", "qcow2", path("snapshot"), "1M")
	qemuImg(t, "snapshot", "-c", "one", path("snapshot"))
	qemuImg(t, "create", "-q", "-f", "qcow2", path("bitmap"), "1M")
	qemuImg(t, "bitmap", "--add", path("bitmap"), "one")
	// LUKS, the newer method, would measure the processor first, which fails on a
	// busy host.
	qemuImg(t, "create", "-q", "--object", "secret,id=s,data=secret", "-f", "qcow2",
		"-o", "encrypt.format=aes,encrypt.key-secret=s", path("encrypted"), "1M")
	for _, format := range []string{"vmdk", "vdi", "vhdx", "vpc", "qed", "parallels", "qcow"} {
		qemuImg(t, "create", "-q", "-f", format, path(format), "1M")
	}
	qemuImg(t, "create", "-q", "-f", "vpc", "-o", "subformat=fixed", path("vpc-fixed"), "1M")
	tests := map[string]string{
		"backing":       "the image has a backing file, \"" + path("base") + "\", which could be any file of this host",
		"data-file":     "the image keeps its content in an external data file, which could be any file of this host",
		"raw-data-file": "the image keeps its content in an external data file, which could be any file of this host",
		"snapshot":      "the image holds 1 internal snapshot(s), of which a box has no use",
		"bitmap":        "the image holds dirty bitmaps, of which a box has no use",
		"encrypted":     "the image is encrypted (method 1)",
		"vmdk":          "the file is a VMware disk (VMDK), not a qcow2 or raw disk",
		"vdi":           "the file is a VirtualBox disk (VDI), not a qcow2 or raw disk",
		"vhdx":          "the file is a Hyper-V disk (VHDX), not a qcow2 or raw disk",
		"vpc":           "the file is a Virtual PC disk (VHD), not a qcow2 or raw disk",
		"vpc-fixed":     "the file is a Virtual PC disk (VHD), not a qcow2 or raw disk",
		"qed":           "the file is a QED disk, not a qcow2 or raw disk",
		"parallels":     "the file is a Parallels disk, not a qcow2 or raw disk",
		"qcow":          "the file is a qcow disk of version 1, not qcow2",
	}
	for name, reason := range tests {
		t.Run(name, func(t *testing.T) {
			_, err := inspectFile(t, path(name))
			if !errors.Is(err, disk.ErrUnsafe) {
				t.Fatalf("error %v does not wrap ErrUnsafe", err)
			}
			if got, want := err.Error(), "unsafe disk image: "+reason; got != want {
				t.Errorf("error\n got %s\nwant %s", got, want)
			}
		})
	}
}
