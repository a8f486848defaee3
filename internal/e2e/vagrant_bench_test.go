// SPDX-License-Identifier: Apache-2.0

//go:build e2e

package e2e

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/labfile/lab/providers/libvirt/daemontest"
)

// vagrantfile asks for the domain that lab makes, as far as there are settings for it,
// and for nothing in the guest: neither a synced folder nor a name nor another key. Its
// network is the plugin's own without forwarding, whose firewall rules a host may lack
// the tools for.
const vagrantfile = `Vagrant.configure("2") do |config|
  config.vm.box = "keyed"
  config.vm.box_check_update = false
  config.vm.guest = :linux
  config.vm.synced_folder ".", "/vagrant", disabled: true
  config.ssh.username = "root"
  config.ssh.private_key_path = %q
  config.ssh.insert_key = false
  config.ssh.shell = "sh"
  config.ssh.sudo_command = "%%c"
  config.vm.provider :libvirt do |v|
    v.uri = "qemu:///system"
    v.driver = %q
    v.machine_type = "q35"
    v.cpu_mode = "maximum"
    v.cpus = 1
    v.memory = 512
    v.kernel = %q
    v.initrd = %q
    v.cmd_line = %q
    v.disk_driver :cache => "unsafe"
    v.random :model => "random"
    v.graphics_type = "none"
    v.video_type = "none"
    v.memballoon_enabled = false
    v.qemuargs :value => "-cpu" # of two, QEMU takes the last; features can be set with a named model only
    v.qemuargs :value => %q
    v.management_network_mode = "open"
  end
end
`

// vagrant is a machine that vagrant-libvirt keeps on a daemon of the tests.
type vagrant struct {
	*site
	daemon *daemontest.Daemon
}

// run runs vagrant where the daemon is: its guests are reached from there only.
func (v *vagrant) run(args ...string) time.Duration {
	v.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	args = append([]string{"--target", strconv.Itoa(v.daemon.PID), "--mount", "--net", "vagrant"}, args...)
	began := time.Now()
	out, err := v.command(ctx, v.vagrantEnv(), "nsenter", args...).CombinedOutput()
	if err != nil {
		v.Fatalf("%q: %v\n%s", args, err, out)
	}
	return time.Since(began)
}

func (s *site) vagrantEnv() []string {
	return []string{"VAGRANT_HOME=" + filepath.Join(s.dir, "vagrant"), "VAGRANT_CWD=" + s.dir, "VAGRANT_CHECKPOINT_DISABLE=1"}
}

// needVagrant skips the benchmark on a host that cannot run vagrant-libvirt.
func needVagrant(s *site) {
	s.Helper()
	for _, program := range []string{"vagrant", "nsenter", "ip", "dnsmasq"} {
		_, err := exec.LookPath(program)
		if _, err2 := exec.LookPath("/usr/sbin/" + program); err != nil && err2 != nil {
			s.Skipf("this host has no %s (tools/deps bench)", program)
		}
	}
	out, err := s.command(context.Background(), s.vagrantEnv(), "vagrant", "plugin", "list").CombinedOutput()
	if err != nil || !strings.Contains(string(out), "vagrant-libvirt") {
		s.Skipf("vagrant has no plugin vagrant-libvirt (tools/deps bench): %v\n%s", err, out)
	}
}

// newVagrant gives vagrant the box that b was learned from. Its disk has one file more,
// the key that vagrant logs in with, which the agent brings to lab's machines.
func newVagrant(s *site, d *daemontest.Daemon, b bare) *vagrant {
	s.Helper()
	tmp := s.TempDir()
	key, raw, script := filepath.Join(s.dir, "login"), filepath.Join(tmp, "disk.raw"), filepath.Join(tmp, "script")
	s.tool("ssh-keygen", "-q", "-t", "rsa", "-b", "2048", "-m", "PEM", "-N", "", "-f", key)
	s.tool("qemu-img", "convert", "-f", b.format, "-O", "raw", b.disk, raw)
	orders := fmt.Sprintf("cd /root/.ssh\nwrite %s.pub authorized_keys\nsif authorized_keys mode 0100600\n", key)
	if err := os.WriteFile(script, []byte(orders), 0o600); err != nil {
		s.Fatal(err)
	}
	s.tool("debugfs", "-w", "-f", script, raw)
	s.tool("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, filepath.Join(s.dir, "keyed.qcow2"))
	s.vagrantBox("keyed.box", "keyed.qcow2", "")

	// The daemon's QEMU is nobody who may read the store, and changes the owner of these.
	boot := map[string]string{"kernel": b.kernel, "initrd": b.initrd}
	for name, from := range boot {
		boot[name] = filepath.Join(d.Home, name)
		if err := copyFile(from, boot[name], 0o644); err != nil {
			s.Fatal(err)
		}
	}
	kind := "qemu"
	if strings.HasPrefix(b.accel, "kvm") {
		kind = "kvm"
	}
	s.write("Vagrantfile", fmt.Sprintf(vagrantfile, key, kind, boot["kernel"], boot["initrd"], b.append, b.cpu))
	v := &vagrant{site: s, daemon: d}
	v.run("box", "add", "--name", "keyed", filepath.Join(s.dir, "keyed.box"))
	return v
}

// BenchmarkVagrantLibvirt measures a cold "lab up" through libvirt against a cold
// "vagrant up" with the same box, daemon, memory and number of processors: both have the
// box where they keep boxes, and neither has a machine. Both end when ssh can be used.
func BenchmarkVagrantLibvirt(b *testing.B) {
	for _, box := range []string{"builtin/tiny", "builtin/debian-12"} {
		b.Run(filepath.Base(box), func(b *testing.B) {
			d := daemontest.StartSystem(b)
			bench(b, func(s *site) {
				needVagrant(s)
				s.ok("up", "--provider", "qemu") // pins the box, and shows what it consists of
				bare := newBare(s)
				s.ok("destroy", "--yes")
				v := newVagrant(s, d, bare)
				up := func() time.Duration {
					r := s.lab("up", "--provider", "libvirt", "--uri", d.URI())
					if r.code != 0 {
						s.Fatal(r)
					}
					s.ok("destroy", "--yes")
					return r.took
				}
				vagrantUp := func() time.Duration {
					took := v.run("up", "--provider", "libvirt", "--no-provision")
					v.run("destroy", "--force")
					return took
				}
				up()
				vagrantUp() // brings the box into the daemon's pool
				var ups, vagrants []time.Duration
				for range rounds { // in turns, so that both meet the same weather
					ups, vagrants = append(ups, up()), append(vagrants, vagrantUp())
				}
				slices.Sort(ups)
				slices.Sort(vagrants)
				lab, other := ups[rounds/2], vagrants[rounds/2]
				b.ReportMetric(lab.Seconds(), "s/up")
				b.ReportMetric(other.Seconds(), "s/vagrant-up")
				b.ReportMetric(other.Seconds()/lab.Seconds(), "vagrant/up")
			}, "lab: bench\nmachines: {m: {box: "+box+", cpus: 1, memory: 512MiB, ready: [{port: 22}]}}\n")
		})
	}
}
