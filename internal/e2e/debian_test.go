// SPDX-License-Identifier: Apache-2.0

//go:build e2e

package e2e

import (
	"os"
	"strings"
	"testing"
)

// TestExample brings up the lab that newcomers meet first.
func TestExample(t *testing.T) {
	example, err := os.ReadFile("../../Labfile.example")
	if err != nil {
		t.Fatal(err)
	}
	eachUser(t, func(t *testing.T, w *world) {
		s := w.debian(t).site(t, string(example))
		r := s.lab("up")
		if r.code != 0 {
			t.Fatal(r)
		}
		t.Logf("up took %s:\n%s", r.took, r.stderr)
		st := s.status()
		if len(st.Machines) < 3 {
			t.Fatalf("the example has %d machines", len(st.Machines))
		}
		for _, m := range st.Machines {
			s.equal("state of "+m.Name, m.State, "ready")
			s.equal("hostname", s.ok("exec", m.Name, "--", "hostname"), m.Name+"\n")
			for _, other := range st.Machines {
				if other.Name != m.Name {
					s.pings(m.Name, other.Name, other.Address)
				}
			}
		}
		s.ok("destroy", "--yes")
		s.nothingLeft()
	})
}

// TestDebian looks into a machine of the box that the real world resembles,
// first-boot configuration by cloud-init included.
func TestDebian(t *testing.T) {
	s := ordinary(t).debian(t).site(t, `lab: real
machines:
  plain:
    box: builtin/debian-12
    disk: 12GiB
  told:
    box: builtin/debian-12
    user_data: |
      #cloud-config
      write_files:
        - {path: /etc/told, content: by cloud-init}
      runcmd:
        - [touch, /run/told]
    ready:
      - exec: test -e /run/told
`)
	s.ok("up")
	exec := func(machine, command string) string {
		s.Helper()
		return s.ok("exec", machine, "--", command)
	}
	s.equal("booted", exec("plain", "systemctl is-system-running --wait; udevadm settle"), "running\n")
	s.equal("system", exec("plain", ". /etc/os-release; echo $ID $VERSION_ID"), "debian 12\n")
	s.equal("failed units", exec("plain", "systemctl list-units --failed --plain --no-legend"), "")
	s.equal("cloud-init without user data", exec("plain", "systemctl is-active cloud-init.service || true"), "inactive\n")
	s.equal("sudo", exec("plain", "su lab -c 'sudo -n id -un'"), "root\n")
	s.equal("curl", exec("plain", "curl --version | cut -d' ' -f1 | head -1"), "curl\n")
	s.equal("modules to load, of which there are none", exec("plain", "systemctl is-active systemd-modules-load.service || true"), "inactive\n")
	s.equal("devices found", exec("plain", "udevadm info -q property -p /sys/class/net/eth0 | grep -c ^ID_NET_LINK_FILE=; systemctl is-active dev-vda.device serial-getty@ttyS0.service"), "1\nactive\nactive\n")
	s.equal("share of the processor after the boot", exec("plain",
		"cd /sys/fs/cgroup/system.slice; cat lab-agent.service/cpu.weight ssh.service/cpu.weight systemd-udevd.service/cpu.weight"), "100\n100\n100\n")
	size := strings.Fields(exec("plain", "df -BG --output=size / | tail -1"))
	if len(size) != 1 || size[0] != "12G" && size[0] != "11G" {
		t.Errorf("a disk of 12 GiB has a file system of %v", size)
	}
	s.equal("user data", exec("told", "cat /etc/told"), "by cloud-init")
	s.equal("hostname beside user data", exec("told", "hostname"), "told\n")
	s.pings("told", "plain", s.machine("plain").Address)
	s.pings("plain", "told", s.machine("told").Address)

	// The guest's own sshd answers too, with the key that lab made.
	s.equal("sshd", exec("plain", "ssh-keyscan -t ed25519 told 2>/dev/null | cut -d' ' -f3"),
		exec("told", "cut -d' ' -f2 /etc/ssh/ssh_host_ed25519_key.pub"))
	a, b := exec("plain", "cat /etc/machine-id"), exec("told", "cat /etc/machine-id")
	if a == b || len(a) != 33 {
		t.Errorf("machine ids: %q and %q", a, b)
	}

	// A program that loads AppArmor profiles finds the parser, though it is not told to
	// bring it: Docker's containers are confined.
	s.equal("AppArmor without a profile of the user's", exec("plain", "systemctl is-active apparmor.service || true"), "inactive\n")
	exec("plain", `apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends docker.io >/tmp/apt 2>&1 || { cat /tmp/apt; exit 1; }
		mkdir -p /tmp/image/bin && cp /bin/dash /tmp/image/bin/sh
		cp --parents -L /lib/x86_64-linux-gnu/libc.so.6 /lib64/ld-linux-x86-64.so.2 /tmp/image
		tar -C /tmp/image -c . | docker import - shell`)
	s.equal("a container", exec("plain", `docker run --rm shell /bin/sh -c 'read -r profile </proc/self/attr/current; echo "$profile"'`), "docker-default (enforce)\n")

	exec("plain", "printf dummy >/etc/modules-load.d/dummy.conf") // its only line has no end
	exec("plain", "echo 'profile confined { file, }' >/etc/apparmor.d/confined")
	s.ok("stop", "plain")
	s.ok("up")
	s.equal("module to load", exec("plain", "systemctl is-system-running --wait; grep -c '^dummy ' /proc/modules"), "running\n1\n")
	s.equal("profile to load", exec("plain", "grep ^confined /sys/kernel/security/apparmor/profiles"), "confined (enforce)\n")
}
