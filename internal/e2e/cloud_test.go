// SPDX-License-Identifier: Apache-2.0

//go:build e2e

package e2e

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/labfile/lab/boxes/recipes"
)

// cloudUnits are what the recipe leaves out of what Debian enables, and what cloud-init
// needs to bring up the network by systemd-networkd.
var cloudUnits = map[string]string{
	"etc/systemd/system/multi-user.target.wants/ssh.service":                              "/lib/systemd/system/ssh.service",
	"etc/systemd/system/multi-user.target.wants/systemd-networkd.service":                 "/lib/systemd/system/systemd-networkd.service",
	"etc/systemd/system/network-online.target.wants/systemd-networkd-wait-online.service": "/lib/systemd/system/systemd-networkd-wait-online.service",
	"etc/systemd/system/sockets.target.wants/systemd-networkd.socket":                     "/lib/systemd/system/systemd-networkd.socket",
	"lib/systemd/system/multi-user.target.wants/dbus.service":                             "../dbus.service",
	"lib/systemd/system/multi-user.target.wants/systemd-logind.service":                   "../systemd-logind.service",
}

const partitionAt = 1 << 20 // of the root file system, as every partitioning tool does it

// cloudImage makes a disk of builtin/debian-12 that is what a distribution publishes for
// clouds: it has a partition table and a boot loader, cloud-init and sshd, and nothing
// of lab.
func (s *site) cloudImage(name string) { s.foreignImage(name, nil) }

// foreignImage is cloudImage with changes of one's own: more gets a script for debugfs
// to add to, a function that adds a file, and one that reads one.
func (s *site) foreignImage(name string, more func(script *strings.Builder, put func(to, content string), get func(from string) string)) {
	s.Helper()
	disk, kernel, initrd := s.boxFiles("builtin/debian-12")
	tmp := s.TempDir()
	raw := filepath.Join(tmp, "disk.raw")
	info, err := exec.Command("qemu-img", "info", "-U", "--output=json", "-f", "qcow2", disk).Output()
	if err != nil {
		s.Fatal(err)
	}
	var size struct {
		Virtual int64 `json:"virtual-size"`
	}
	if err := json.Unmarshal(info, &size); err != nil {
		s.Fatal(err)
	}
	if err := os.WriteFile(raw, nil, 0o600); err != nil {
		s.Fatal(err)
	}
	if err := os.Truncate(raw, partitionAt+size.Virtual); err != nil {
		s.Fatal(err)
	}
	s.tool("qemu-img", "convert", "-n", "--image-opts", "--target-image-opts",
		"driver=qcow2,file.driver=file,file.locking=off,file.filename="+disk,
		fmt.Sprintf("driver=raw,offset=%d,file.driver=file,file.filename=%s", partitionAt, raw))
	s.unlab(tmp, raw, kernel, initrd, more)
	s.bootLoader(tmp, raw, size.Virtual)
	s.tool("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, filepath.Join(s.dir, name))
	if err := s.w.own(filepath.Join(s.dir, name)); err != nil {
		s.Fatal(err)
	}
}

// boxFiles are the blobs of a box in the store.
func (s *site) boxFiles(name string) (disk, kernel, initrd string) {
	s.Helper()
	var box struct{ Disk, Kernel, Initrd string }
	if err := json.Unmarshal([]byte(s.ok("box", "show", "--json", name)), &box); err != nil {
		s.Fatal(err)
	}
	return box.Disk, box.Kernel, box.Initrd
}

// tool runs a program of this host, which must succeed.
func (s *site) tool(name string, args ...string) string {
	s.Helper()
	cmd := exec.Command(name, args...)
	cmd.Env = append(os.Environ(), "PATH="+os.Getenv("PATH")+":/usr/sbin:/sbin")
	if p, err := exec.LookPath(filepath.Join("/usr/sbin", name)); err == nil {
		cmd.Path, cmd.Err = p, nil
	}
	out, err := cmd.CombinedOutput()
	if err != nil {
		s.Fatalf("%s %q: %v\n%s", name, args, err, out)
	}
	return string(out)
}

// neutral are files of the recipe that are no more lab's than a distribution's. Without the
// list of modules that no machine needs, udev takes seconds longer.
var neutral = []string{"etc/machine-id", "etc/hosts", "etc/hostname", "etc/modprobe.d/lab.conf"}

// unlab takes out of the root file system what the recipe laid over Debian, and puts in
// what boots from a partition.
func (s *site) unlab(tmp, raw, kernel, initrd string, more func(*strings.Builder, func(to, content string), func(from string) string)) {
	s.Helper()
	r, err := recipes.Get("debian-12")
	if err != nil {
		s.Fatal(err)
	}
	boot, err := recipes.GetBoot()
	if err != nil {
		s.Fatal(err)
	}
	var script strings.Builder
	put := func(to, content string) {
		from := filepath.Join(tmp, strings.ReplaceAll(to, "/", "_"))
		if err := os.WriteFile(from, []byte(content), 0o644); err != nil {
			s.Fatal(err)
		}
		fmt.Fprintf(&script, "write %s /%s\n", from, to)
	}
	script.WriteString("rm /usr/sbin/lab-agent\n")
	for _, l := range r.Links {
		fmt.Fprintf(&script, "rm /%s\n", l.Path)
	}
	err = fs.WalkDir(r.Files, ".", func(p string, e fs.DirEntry, err error) error {
		if err == nil && !e.IsDir() && !slices.Contains(neutral, p) {
			fmt.Fprintf(&script, "rm /%s\n", p)
		}
		return err
	})
	if err != nil {
		s.Fatal(err)
	}
	put("etc/fstab", "/dev/vda1 / ext4 rw,discard,errors=remount-ro 0 1\n")
	script.WriteString("mkdir /etc/systemd/system/network-online.target.wants\n")
	for p, target := range cloudUnits {
		fmt.Fprintf(&script, "symlink /%s %s\n", p, target)
	}
	put("boot/vmlinuz", string(read(s, kernel)))
	init := strings.ReplaceAll(string(boot.Init), "/dev/vda", "/dev/vda1")
	put("boot/initrd.img", appendix(string(read(s, initrd)), "init", strings.Replace(init, "-t ext4", "-t ext4 -o ro", 1)))
	if more != nil {
		more(&script, put, func(from string) string {
			to := filepath.Join(tmp, "was_"+strings.ReplaceAll(from, "/", "_"))
			s.tool("debugfs", "-R", fmt.Sprintf("dump /%s %s", from, to), fmt.Sprintf("%s?offset=%d", raw, partitionAt))
			return string(read(s, to))
		})
	}
	commands := filepath.Join(tmp, "debugfs")
	if err := os.WriteFile(commands, []byte(script.String()), 0o600); err != nil {
		s.Fatal(err)
	}
	out := s.tool("debugfs", "-w", "-f", commands, fmt.Sprintf("%s?offset=%d", raw, partitionAt))
	for line := range strings.Lines(out) { // it goes on after a command that did not work
		line = strings.TrimSpace(line)
		if line != "" && !strings.HasPrefix(line, "debugfs") && !strings.HasPrefix(line, "Allocated inode") {
			s.Fatalf("debugfs: %s", line)
		}
	}
}

// appendix adds an archive of one executable file, which the kernel unpacks over those
// before.
func appendix(initrd, name, content string) string {
	var b bytes.Buffer
	b.WriteString(initrd)
	entry := func(name, content string, mode int) {
		for b.Len()%4 != 0 {
			b.WriteByte(0)
		}
		fmt.Fprintf(&b, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s\x00",
			0, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name)+1, 0, name)
		for b.Len()%4 != 0 {
			b.WriteByte(0)
		}
		b.WriteString(content)
	}
	entry(name, content, 0o100755)
	entry("TRAILER!!!", "", 0)
	return b.String()
}

// bootLoader makes the disk one that a BIOS boots: GRUB lies before the partition.
func (s *site) bootLoader(tmp, raw string, size int64) {
	s.Helper()
	core, config := filepath.Join(tmp, "core.img"), filepath.Join(tmp, "grub.cfg")
	err := os.WriteFile(config, []byte(`linux (hd0,msdos1)/boot/vmlinuz root=/dev/vda1 ro console=tty0 console=ttyS0,115200 no_timer_check
initrd (hd0,msdos1)/boot/initrd.img
boot
`), 0o600)
	if err != nil {
		s.Fatal(err)
	}
	s.tool("grub-mkimage", "-O", "i386-pc", "-p", "(hd0,msdos1)/boot/grub", "-c", config, "-o", core,
		"biosdisk", "part_msdos", "ext2", "linux", "boot")
	const sector, code = 512, 440
	mbr := make([]byte, sector)
	copy(mbr[:code], read(s, "/usr/lib/grub/i386-pc/boot.img"))
	entry := mbr[446:]
	copy(entry, []byte{0x80, 0xfe, 0xff, 0xff, 0x83, 0xfe, 0xff, 0xff}) // active, Linux, no cylinders
	binary.LittleEndian.PutUint32(entry[8:], partitionAt/sector)
	binary.LittleEndian.PutUint32(entry[12:], uint32(size/sector))
	copy(mbr[510:], "\x55\xaa")
	f, err := os.OpenFile(raw, os.O_WRONLY, 0)
	if err != nil {
		s.Fatal(err)
	}
	defer f.Close()
	// boot.img loads what stands in the next sector, and that the sectors behind it.
	if _, err := f.WriteAt(append(mbr, read(s, core)...), 0); err != nil {
		s.Fatal(err)
	}
}

// clouded is a lab of that image. Its root cannot be read from outside once it is
// baked: tune2fs turns on a feature of ext4 that only kernels know.
const clouded = `lab: clouded
boxes:
  cloud: {from: ./disk.qcow2}
machines:
  m:
    box: cloud
    user: ops
    user_data: |
      #cloud-config
      runcmd:
        - [touch, /etc/late]
    volumes:
      - {name: data, size: 64MiB, mount: /srv/data, owner: "daemon:101", mode: "0750"}
    boot:
      - shell: echo "$(id -un) $LAB_MACHINE@$LAB_GENERATION $(stat -c %U /srv/data) $(ls /etc/late)" >/etc/booted
`

const cloudSteps = `    provision:
      - file: {content: "baked\n", to: /etc/baked, owner: "daemon:daemon", mode: "0640"}
      - shell: |
          id -un > /etc/who
          tune2fs -O encrypt /dev/vda1
checks:
  - {on: m, user: ops}
  - {on: m, file: /etc/baked, mode: 0640, owner: daemon}
  - {on: m, service: ssh, enabled: true, running: true}
  - {on: m, port: tcp:22}
`

// TestCloudImage uses a box that lab did not make, as it comes: everything goes over
// ssh.
func TestCloudImage(t *testing.T) {
	s := ordinary(t).debian(t).site(t, clouded)
	s.cloudImage("disk.qcow2")
	r := s.lab("up")
	if r.code != 0 {
		t.Fatal(r)
	}
	t.Logf("up took %s", r.took)
	exec := func(command string) string {
		s.Helper()
		return s.ok("exec", "m", "--", command)
	}
	s.equal("what it is", exec("id -un; sudo -n id -un; hostname; systemctl is-active systemd-networkd; test -e /usr/sbin/lab-agent || echo no agent; test -e /etc/late && echo user data"),
		"ops\nroot\nm\nactive\nno agent\nuser data\n")
	s.equal("ssh", s.ok("ssh", "m", "--", "echo", "hello"), "hello\n")
	volume := "stat -c %U:%g:%a /srv/data; grep -c ' /srv/data ext4 ' /proc/mounts; sudo -n cat /srv/data/file"
	s.equal("the volume", exec("echo one | sudo -n tee /srv/data/file >/dev/null; "+volume), "daemon:101:750\n1\none\n")

	s.equal("what the boot step saw", exec("cat /etc/booted"), "root m@1 daemon /etc/late\n")
	if got := s.drift("m"); got != nil {
		t.Errorf("right after the birth: %q", got)
	}
	exec("echo appended | sudo -n tee -a /etc/profile; sudo -n touch /srv/added")
	if got := s.drift("m"); !slices.Equal(got, []string{"M /etc/profile content", "A /srv/added"}) {
		t.Errorf("drift: %q", got)
	}
	if err := os.Mkdir(filepath.Join(s.dir, "tree"), 0o755); err != nil {
		t.Fatal(err)
	}
	s.write("tree/a", "A")
	s.ok("cp", "tree", "m:tree")
	s.ok("cp", "m:tree/a", "back")
	s.equal("copied there and back", string(read(s, filepath.Join(s.dir, "back"))), "A")

	// The next generation stands on a baked image, and has the data.
	s.write("Labfile", clouded+cloudSteps)
	r = s.lab("up", "--yes")
	if r.code != 0 {
		t.Fatal(r)
	}
	t.Logf("bake and replacement took %s", r.took)
	s.equal("baked, and with the data", exec("sudo -n stat -c %U:%a /etc/baked; cat /etc/who; "+volume), "daemon:640\nroot\ndaemon:101:750\n1\none\n")
	s.equal("what the boot step saw", exec("cat /etc/booted"), "root m@2 daemon /etc/late\n")
	s.ok("verify")

	// Now the guest has to be asked, by ssh.
	if got := s.drift("m"); got != nil {
		t.Errorf("right after the birth: %q", got)
	}
	exec("echo appended | sudo -n tee -a /etc/profile; sudo -n chmod 0640 /etc/hosts; sudo -n ln -s hosts /etc/added; sudo -n rm /etc/baked")
	want := []string{"A /etc/added", "D /etc/baked", "M /etc/hosts mode", "M /etc/profile content"}
	if got := s.drift("m"); !slices.Equal(got, want) {
		t.Errorf("what the guest says:\n got %q\nwant %q", got, want)
	}
	r = s.lab("diff", "m", "--content")
	if r.code != 2 || !strings.Contains(r.stderr, "m@2 at birth, m@2: the guest was asked") || !strings.Contains(r.stdout, "\n+appended\n") {
		t.Errorf("the text of the drift: %s", r)
	}
	s.ok("destroy", "--yes", "--volumes")
	s.gone = true
	s.nothingLeft()
}
