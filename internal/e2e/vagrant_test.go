// SPDX-License-Identifier: Apache-2.0

//go:build e2e

package e2e

import (
	"archive/tar"
	"compress/gzip"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// vagrantPublic is one of the two keys that every Vagrant box lets in.
const vagrantPublic = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIN1YdxBpNlzxDqfJyw/QKow1F+wvG9hXGoqiysfJOn5Y vagrant insecure public key\n"

// vagrantImage makes a disk such as is in Vagrant boxes: without cloud-init, with a user
// "vagrant" whom the published key lets in, and with a host key of its own.
func (s *site) vagrantImage(name string) {
	s.Helper()
	key := filepath.Join(s.TempDir(), "key")
	s.tool("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key)
	s.foreignImage(name, func(script *strings.Builder, put func(to, content string), get func(from string) string) {
		for file, mode := range map[string]string{"etc/passwd": "0100644", "etc/shadow": "0100640", "etc/group": "0100644"} {
			was := get(file)
			fmt.Fprintf(script, "rm /%s\n", file)
			put(file, strings.ReplaceAll("\n"+was, "\nlab:", "\nvagrant:")[1:])
			fmt.Fprintf(script, "sif /%s mode %s\n", file, mode)
		}
		script.WriteString("sif /etc/shadow gid 42\nmkdir /home/lab/.ssh\n")
		put("home/lab/.ssh/authorized_keys", vagrantPublic)
		put("etc/ssh/ssh_host_ed25519_key", string(read(s, key)))
		put("etc/ssh/ssh_host_ed25519_key.pub", string(read(s, key+".pub")))
		put("etc/sudoers.d/vagrant", "vagrant ALL=(ALL) NOPASSWD: ALL\n")
		put("etc/cloud/cloud-init.disabled", "")
		put("etc/systemd/network/80-dhcp.network", "[Match]\nName=e*\n[Network]\nDHCP=yes\n")
		for path, mode := range map[string]string{"home/lab/.ssh": "040700", "home/lab/.ssh/authorized_keys": "0100600"} {
			fmt.Fprintf(script, "sif /%s mode %s\nsif /%s uid 1000\nsif /%s gid 1000\n", path, mode, path, path)
		}
		script.WriteString("sif /etc/ssh/ssh_host_ed25519_key mode 0100600\nsif /etc/sudoers.d/vagrant mode 0100440\n")
	})
}

// vagrantBox packs a disk and a Vagrantfile into a box.
func (s *site) vagrantBox(name, disk, vagrantfile string) {
	s.Helper()
	f, err := os.Create(filepath.Join(s.dir, name))
	if err != nil {
		s.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewWriterLevel(f, gzip.BestSpeed)
	if err != nil {
		s.Fatal(err)
	}
	w := tar.NewWriter(z)
	for name, content := range map[string]string{
		"./metadata.json": `{"provider":"libvirt","format":"qcow2","virtual_size":5}`,
		"./Vagrantfile":   vagrantfile, "./box.img": string(read(s, filepath.Join(s.dir, disk))),
	} {
		if err := w.WriteHeader(&tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(len(content))}); err != nil {
			s.Fatal(err)
		}
		if _, err := w.Write([]byte(content)); err != nil {
			s.Fatal(err)
		}
	}
	for _, close := range []func() error{w.Close, z.Close} {
		if err := close(); err != nil {
			s.Fatal(err)
		}
	}
}

// TestVagrantBox uses a Vagrant box as it comes: the published key is good for the first
// login, and for no other.
func TestVagrantBox(t *testing.T) {
	w := ordinary(t).debian(t)
	s := w.site(t, `lab: boxed
boxes:
  old: {from: ./it.box}
machines:
  m:
    box: old
    volumes:
      - {name: data, size: 64MiB, mount: /srv/data, owner: "vagrant:daemon", mode: "0750"}
    mounts:
      - ./shared:/srv/shared
`)
	if err := os.Mkdir(filepath.Join(s.dir, "shared"), 0o755); err != nil {
		t.Fatal(err)
	}
	s.write("shared/file", "of the host\n")
	if err := w.own(filepath.Join(s.dir, "shared")); err != nil {
		t.Fatal(err)
	}
	s.vagrantImage("disk.qcow2")
	s.vagrantBox("it.box", "disk.qcow2", "raise 'nobody runs this'\n")
	r := s.lab("up")
	if r.code != 0 {
		t.Fatal(r)
	}
	t.Logf("up took %s", r.took)
	look := func() string {
		return s.ok("exec", "m", "--", "id -un; sudo -n id -un; hostname; grep -c 'insecure public key' .ssh/authorized_keys; "+
			"stat -c %U:%G:%a /srv/data; grep -c ' /srv/data ext4 ' /proc/mounts; cat /srv/data/file /srv/shared/file; touch /srv/shared/x 2>&1 | grep -o Read-only")
	}
	s.ok("exec", "m", "--", "echo one >/srv/data/file")
	const want = "vagrant\nroot\nm\n0\nvagrant:daemon:750\n1\none\nof the host\nRead-only\n"
	s.equal("what it is", look(), want)
	if got := s.drift("m"); got != nil {
		t.Errorf("right after the birth: %q", got)
	}
	s.ok("stop")
	s.ok("start")
	s.equal("after a start", look(), want)
	s.ok("replace", "m")
	s.equal("after a replacement", look(), want)

	s.write("Labfile", string(read(s, filepath.Join(s.dir, "Labfile")))+"    provision: [{shell: 'true'}]\n")
	s.fails(1, []string{"cannot be baked into a Vagrant box"}, "plan")
	s.ok("destroy", "--yes", "--volumes", "--lab", string(s.id))
	s.gone = true
	s.nothingLeft()
}
