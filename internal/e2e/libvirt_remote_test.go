// SPDX-License-Identifier: Apache-2.0

//go:build e2e

package e2e

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/labfile/lab/providers/libvirt/daemontest"
)

// here are the steps of a life that end processes of this host, where there are none of
// machines' that run on another.
var here = []string{"standstill", "supervisor killed", "hypervisor killed", "reboot of the host"}

// TestLibvirtRemote goes through the life of a lab whose machines run on another host, of
// which nothing can be reached but its libvirt: by ssh as an ordinary user, by TLS as root.
func TestLibvirtRemote(t *testing.T) {
	eachUser(t, func(t *testing.T, w *world) {
		s, far, uri := farSite(t, w, shop)
		last := len(life) - 1
		steps := slices.DeleteFunc(slices.Clone(life[:last]), func(st step) bool { return slices.Contains(here, st.name) })
		steps = append(
			steps,
			step{"supervisor killed far from machines", remoteSupervisorKilled},
			step{"machine ended there", func(s *site) { remoteEnded(s, far) }},
			step{"daemon killed", func(s *site) { remoteKilled(s, far) }},
			step{"replace and diff", libvirtReplaces},
			step{"bake", remoteBakes},
			step{"mounts", remoteMounts},
			step{"refusals", func(s *site) { remoteRefuses(s, uri) }},
			life[last],
			step{"nothing left there", func(s *site) { nothingFar(s, far) }},
		)
		live(t, s, steps)
	})
}

// farSite is where a lab is kept whose machines run on another host.
func farSite(t testing.TB, w *world, labfile string) (s *site, far *daemontest.Far, uri string) {
	far = daemontest.StartFar(t)
	uri = "qemu+tls://" + far.TLS + "/system?pkipath=" + far.PKI
	if w.name != "root" {
		uri = "qemu+ssh://root@" + far.SSH + "/system"
	}
	s = w.site(t, at(uri, labfile))
	s.kept, s.far = "domains", true
	s.env = append(s.env, "LAB_ACCEL=tcg", "PATH="+sshFor(t, w, far)+":"+os.Getenv("PATH"))
	return s, far, uri
}

// at is a Labfile for the daemon at uri.
func at(uri, labfile string) string {
	return strings.Replace(labfile, "\n", "\nprovider: libvirt\nuri: "+uri+"\n", 1)
}

// TestLibvirtRemoteVolumes keeps data on another host, takes it from there and there.
func TestLibvirtRemoteVolumes(t *testing.T) {
	s, far, uri := farSite(t, ordinary(t), stored)
	liveVolumes(s, at(uri, stored))
	nothingFar(s, far)

	// A volume is where it was made until it is taken elsewhere.
	s.gone = false
	grown := strings.Replace(stored, "64MiB", "96MiB", 1)
	s.write("Labfile", grown)
	s.ok("volume", "import", "data.raw", "data")
	s.write("Labfile", at(uri, grown))
	s.fails(1, []string{"volume data is kept on this host", "to run at " + uri, "lab volume import FILE data"}, "plan")
	s.ok("volume", "export", "data", "data.qcow2")
	s.ok("volume", "rm", "data", "--yes")
	s.ok("volume", "import", "data.qcow2", "data")
	if list := s.ok("volume", "list"); !strings.Contains(list, "at "+uri) {
		s.Errorf("lab volume list does not say where it is:\n%s", list)
	}
	s.ok("up")
	s.equal("what was taken there", s.ok("exec", "db", "--", "cat /srv/data/file"), "newest\n")

	// What a command left that was killed is gone with the lab, and nothing else is.
	first := fmt.Sprintf("lab-%s.", s.id)
	i := slices.IndexFunc(far.Volumes(), func(name string) bool { return strings.HasPrefix(name, first) && strings.Contains(name, ".data@") })
	if i < 0 {
		s.Fatalf("the pool has %q", far.Volumes())
	}
	prefix, _, _ := strings.Cut(far.Volumes()[i], "data@")
	far.Virsh("vol-create-as", "default", prefix+"half@1.qcow2", "1M")
	s.ok("destroy", "--yes")
	left := far.Volumes()
	if slices.Contains(left, prefix+"half@1.qcow2") || !slices.ContainsFunc(left, func(name string) bool { return strings.HasPrefix(name, prefix+"data@") }) {
		s.Errorf("after lab destroy the pool has %q", left)
	}

	// Without a ledger there is still what says where the machines are.
	s.ok("up")
	if err := os.Remove(filepath.Join(s.w.data(), "labs", string(s.id), "ledger.jsonl")); err != nil {
		t.Fatal(err)
	}
	far.Signal(syscall.SIGKILL)
	s.fails(5, []string{"listing the machines of " + string(s.id), "if that host is gone for good"}, "destroy", "--yes", "--volumes")
	far.Start()
	s.ok("destroy", "--yes", "--volumes")
	s.gone = true
	nothingFar(s, far)
}

// sshFor makes the world's user one who can log in on the other host, and returns the
// folder of an ssh that knows: OpenSSH looks for its configuration where the account has its
// home, and there is none.
func sshFor(t testing.TB, w *world, far *daemontest.Far) string {
	t.Helper()
	real, err := exec.LookPath("ssh")
	if err != nil {
		t.Fatal(err)
	}
	key, err := os.ReadFile(far.Key)
	if err != nil {
		t.Fatal(err)
	}
	dir := w.path("ssh")
	host, _, err := net.SplitHostPort(far.SSH)
	if err != nil {
		t.Fatal(err)
	}
	files := map[string]string{
		"id": string(key), "known": far.Host + "\n",
		"config": fmt.Sprintf("Host %s\n  IdentityFile %[2]s/id\n  IdentitiesOnly yes\n  UserKnownHostsFile %[2]s/known\n  StrictHostKeyChecking yes\n", host, dir),
		"ssh":    fmt.Sprintf("#!/bin/sh\ncase \"$*\" in *virt-ssh-helper*) exec %s -F %s/config \"$@\";; esac\nexec %[1]s \"$@\"\n", real, dir),
	}
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for name, text := range files {
		mode := os.FileMode(0o600)
		if name == "ssh" {
			mode = 0o755
		}
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), mode); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.own(dir); err != nil {
		t.Fatal(err)
	}
	return dir
}

// remoteSupervisorKilled ends the supervisor: any command brings it back, and it plugs the
// machines in again.
func remoteSupervisorKilled(s *site) {
	before := s.status()
	s.kill(s.supervisor())
	after := s.status()
	s.equal("supervisor", after.Supervisor, "running")
	for i, m := range after.Machines {
		s.equal("state of "+m.Name, m.State, "ready")
		if fmt.Sprint(m.Ports) != fmt.Sprint(before.Machines[i].Ports) {
			s.Errorf("%s has ports %v, had %v", m.Name, m.Ports, before.Machines[i].Ports)
		}
	}
	s.equal("exec", s.ok("exec", "web-1", "--", "hostname"), "web-1\n")
	s.pings("web-1", "db", s.reached("db"))
}

// remoteEnded ends a machine behind lab's back. It is seen, and mended.
func remoteEnded(s *site, far *daemontest.Far) {
	before := s.machine("web-2")
	far.Virsh("destroy", fmt.Sprintf("lab-%s-web-2-%d", s.id, before.Generation))
	s.wait("the end of web-2 is seen", func() bool { return s.machine("web-2").State == "exited" })
	s.fails(2, nil, "plan") // there is something to do
	s.ok("up")
	after := s.machine("web-2")
	s.equal("state", after.State, "ready")
	s.equal("address", after.Address, before.Address)
	s.pings("db", "web-2", s.reached("web-2"))
}

// remoteKilled ends libvirtd under running machines, and then makes it hang: they go on,
// and lab says what is wrong.
func remoteKilled(s *site, far *daemontest.Far) {
	before := s.status()
	far.Signal(syscall.SIGKILL)
	r := s.lab("stop", "db")
	if r.code == 0 {
		s.Errorf("stop without libvirtd: %s", r.stderr)
	}
	far.Start()
	s.equal("exec", s.ok("exec", "db", "--", "hostname"), "db\n")
	for i, m := range s.status().Machines {
		s.equal("state of "+m.Name, m.State, "ready")
		if m.Generation != before.Machines[i].Generation {
			s.Errorf("%s has generation %d, had %d", m.Name, m.Generation, before.Machines[i].Generation)
		}
	}
	s.pings("web-1", "db", s.reached("db"))
	far.Signal(syscall.SIGSTOP)
	r = s.lab("stop", "db")
	far.Signal(syscall.SIGCONT)
	s.failed(r, 1, "does not answer", "its machines go on")
	s.equal("state", s.machine("db").State, "ready")
}

// remoteBakes has a machine born from an image that is baked there and kept here.
func remoteBakes(s *site) {
	labfile := string(read(s, filepath.Join(s.dir, "Labfile")))
	s.write("Labfile", strings.Replace(labfile, "  db:\n", "  db:\n    provision:\n      - shell: echo baked > /etc/baked\n", 1))
	s.ok("up", "--yes")
	s.equal("baked", s.ok("exec", "db", "--", "cat /etc/baked"), "baked\n")
	s.write("Labfile", labfile)
	s.ok("up", "--yes")
}

// remoteMounts has a folder of this host in a machine of the other.
func remoteMounts(s *site) {
	if err := os.Mkdir(filepath.Join(s.dir, "in"), 0o755); err != nil {
		s.Fatal(err)
	}
	s.write("in/file", "of this host\n")
	labfile := string(read(s, filepath.Join(s.dir, "Labfile")))
	s.write("Labfile", strings.Replace(labfile, "  db:\n", "  db:\n    mounts: [\"./in:/srv/in\"]\n", 1))
	s.ok("up", "--yes")
	s.equal("the guest reads", s.ok("exec", "db", "--", "cat /srv/in/file"), "of this host\n")
	s.write("Labfile", labfile)
	s.ok("up", "--yes")
}

// remoteRefuses asks what is there, and for what is not.
func remoteRefuses(s *site, uri string) {
	with := "?"
	if strings.Contains(uri, "?") {
		with = "&"
	}
	got := s.ok("doctor", "--provider", "libvirt", "--uri", uri)
	for _, want := range []string{"pool", "/var/lib/libvirt/images", "acceleration", "machines are in a network of libvirt's that each lab gets"} {
		if !strings.Contains(got, want) {
			s.Errorf("lab doctor lacks %q:\n%s", want, got)
		}
	}
	r := s.lab("doctor", "--provider", "libvirt", "--uri", uri+with+"pool=absent")
	s.failed(r, 5)
	if all := r.stdout + r.stderr; !strings.Contains(all, "does not exist") || !strings.Contains(all, "pool-define-as absent dir") {
		s.Errorf("lab doctor of a pool that is not there: %s", all)
	}
	s.fails(5, []string{"libvirt keeps it on the machine's host", "look there at /var/log/libvirt/qemu/lab-" + string(s.id) + "-db-"}, "logs", "db", "--hypervisor")
}

// nothingFar looks for what is left on the other host.
func nothingFar(s *site, far *daemontest.Far) {
	if left := far.Virsh("list", "--all", "--name"); left != "" {
		s.Errorf("libvirt still has %q", left)
	}
	if left := far.Virsh("net-list", "--all", "--name"); left != "" {
		s.Errorf("libvirt still has the networks %q", left)
	}
	for _, name := range far.Volumes() {
		if !strings.HasPrefix(name, "lab-image-") {
			s.Errorf("left in the pool: %s", name)
		}
	}
	s.ok("gc")
	if left := far.Volumes(); len(left) > 0 {
		s.Errorf("left in the pool by lab gc: %q", left)
	}
}
