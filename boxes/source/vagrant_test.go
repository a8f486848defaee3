// SPDX-License-Identifier: Apache-2.0

package source_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/labfile/lab/boxes"
	"github.com/labfile/lab/boxes/source"
	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/providers/qcow2"
)

type member struct {
	name, content string
	kind          byte
}

// pack makes an archive.
func pack(t *testing.T, zipped bool, members ...member) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, m := range members {
		h := &tar.Header{Name: m.name, Typeflag: m.kind, Mode: 0o644, Size: int64(len(m.content)), Format: tar.FormatUSTAR}
		if m.kind == tar.TypeSymlink {
			h.Linkname, h.Size, m.content = m.content, 0, ""
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte(m.content)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if !zipped {
		return b.Bytes()
	}
	var z bytes.Buffer
	g := gzip.NewWriter(&z)
	if _, err := g.Write(b.Bytes()); err != nil {
		t.Fatal(err)
	}
	if err := g.Close(); err != nil {
		t.Fatal(err)
	}
	return z.Bytes()
}

func TestVagrantBox(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk")
	if err := qcow2.Create(path, lab.MiB); err != nil {
		t.Fatal(err)
	}
	content, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	disk := string(content)
	file := func(name, content string) member { return member{name, content, tar.TypeReg} }
	v1, v2 := `{"provider":"libvirt","format":"qcow2","virtual_size":1}`, `{"provider":"libvirt","disks":[{"path":"root.qcow2"}]}`
	for name, tt := range map[string]struct {
		plain   bool
		members []member
		want    string // the error; empty for a box
	}{
		"v1":               {members: []member{file("./metadata.json", v1), file("./Vagrantfile", "exit!"), file("./box.img", disk)}},
		"v1, disk first":   {plain: true, members: []member{file("box.img", disk), file("metadata.json", v1)}},
		"v2":               {members: []member{file("metadata.json", v2), file("root.qcow2", disk)}},
		"no disk":          {members: []member{file("metadata.json", v2), file("box.img", disk)}, want: "its disk root.qcow2 is not in it"},
		"two of a name":    {members: []member{file("metadata.json", v1), file("box.img", disk), file("./box.img", disk)}, want: "box.img is in it twice"},
		"a link":           {members: []member{file("metadata.json", v1), {"box.img", "/etc/passwd", tar.TypeSymlink}}, want: "box.img is not a regular file"},
		"another provider": {members: []member{file("metadata.json", `{"provider":"virtualbox"}`), file("box.ovf", "")}, want: `a Vagrant box for "virtualbox"`},
		"for amd64":        {members: []member{file("metadata.json", `{"provider":"libvirt","architecture":"amd64","format":"qcow2"}`), file("box.img", disk)}},
		"for x86_64":       {members: []member{file("metadata.json", `{"provider":"libvirt","architecture":"x86_64","format":"qcow2"}`), file("box.img", disk)}},
		"for anything":     {members: []member{file("metadata.json", `{"provider":"libvirt","architecture":"unknown","format":"qcow2"}`), file("box.img", disk)}},
		"for arm64":        {members: []member{file("metadata.json", `{"provider":"libvirt","architecture":"arm64","format":"qcow2"}`), file("box.img", disk)}, want: `it is a Vagrant box for "arm64", which machines of this host (amd64) cannot run`},
		"for riscv":        {members: []member{file("metadata.json", `{"provider":"libvirt","architecture":"riscv64"}`)}, want: `it is a Vagrant box for "riscv64"`},
		"two disks":        {members: []member{file("metadata.json", `{"provider":"libvirt","disks":[{"path":"a"},{"path":"b"}]}`)}, want: "has 2 disks"},
		"no box":           {members: []member{file("README", "hello")}, want: "it has no metadata.json"},
		"no metadata":      {members: []member{file("metadata.json", "{"), file("box.img", disk)}, want: "metadata.json: "},
		"hostile disk":     {members: []member{file("metadata.json", v1), file("box.img", strings.Replace(disk, "QFI\xfb\x00\x00\x00\x03\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00", "QFI\xfb\x00\x00\x00\x03\x00\x00\x00\x00\x00\x00\x01\x00\x00\x00\x00\x08", 1))}, want: "backing file"},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFixture(t)
			dir := t.TempDir()
			archive := pack(t, !tt.plain, tt.members...)
			if err := os.WriteFile(filepath.Join(dir, "it.box"), archive, 0o600); err != nil {
				t.Fatal(err)
			}
			req := source.Request{Ref: "it.box", BaseDir: dir}
			res, err := f.Resolve(t.Context(), req)
			if left := files(t, f.Cache); len(left) > 0 {
				t.Errorf("left over: %q", left)
			}
			if tt.want != "" {
				if err == nil || !strings.Contains(err.Error(), tt.want) {
					t.Fatalf("got %v, want %s", err, tt.want)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			sum := digest.FromBytes(archive)
			c := res.Box.Config
			if res.Checksum != sum.String() || res.Box.Disk.Digest != digest.FromString(disk) || !c.Vagrant || c.CloudInit || c.User != "vagrant" || c.Source != sum {
				t.Errorf("got %+v, %+v", res, c)
			}
			// Pinned, the archive's checksum is what counts; it is not read again.
			req.Pin, req.Checksum = res.Box.Digest, sum.String()
			if err := os.Remove(filepath.Join(dir, "it.box")); err != nil {
				t.Fatal(err)
			}
			if again, err := f.Resolve(t.Context(), req); err != nil || again.Box.Digest != res.Box.Digest || again.Fetched {
				t.Errorf("pinned: %+v, %v", again, err)
			}
			req.Checksum = digest.FromString("other").String()
			if _, err := f.Resolve(t.Context(), req); !errors.Is(err, boxes.ErrDigest) {
				t.Errorf("another checksum: %v", err)
			}
			// A wrong checksum is found before the store sees anything.
			if err := os.WriteFile(filepath.Join(dir, "it.box"), archive, 0o600); err != nil {
				t.Fatal(err)
			}
			fresh := newFixture(t)
			if _, err := fresh.Resolve(t.Context(), source.Request{Ref: "it.box", BaseDir: dir, Checksum: req.Checksum}); !errors.Is(err, boxes.ErrDigest) {
				t.Errorf("a wrong checksum: %v", err)
			}
			sha512 := digest.SHA512.FromBytes(archive).String()
			if res, err := fresh.Resolve(t.Context(), source.Request{Ref: "it.box", BaseDir: dir, Checksum: sha512}); err != nil || res.Checksum != sha512 {
				t.Errorf("by SHA-512: %+v, %v", res, err)
			}
		})
	}
}

// The empty parts of a disk take no space, neither while it is unpacked nor in the store.
func TestVagrantBoxSparse(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "disk")
	if err := qcow2.Create(path, lab.MiB); err != nil {
		t.Fatal(err)
	}
	content, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	archive := pack(
		t, true,
		member{"metadata.json", `{"provider":"libvirt","format":"qcow2","virtual_size":1}`, tar.TypeReg},
		member{"box.img", string(append(content, make([]byte, 64<<20)...)), tar.TypeReg},
	)
	if err := os.WriteFile(filepath.Join(dir, "it.box"), archive, 0o600); err != nil {
		t.Fatal(err)
	}
	res, err := newFixture(t).Resolve(t.Context(), source.Request{Ref: "it.box", BaseDir: dir})
	if err != nil {
		t.Fatal(err)
	}
	var st syscall.Stat_t
	if err := syscall.Stat(res.Box.Disk.Path, &st); err != nil {
		t.Fatal(err)
	}
	if takes := st.Blocks * 512; st.Size < 64<<20 || takes > 4<<20 {
		t.Errorf("a disk of %d bytes takes %d", st.Size, takes)
	}
}
