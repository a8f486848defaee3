// SPDX-License-Identifier: Apache-2.0

//go:build e2e

package e2e

import (
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
)

// TestLibvirt goes through the life of a lab whose machines libvirt runs, for an
// ordinary user: lab starts the user's daemon itself.
func TestLibvirt(t *testing.T) {
	w := ordinary(t)
	s := w.site(t, strings.Replace(shop, "lab: shop\n", "lab: shop\nprovider: libvirt\n", 1))
	s.kept = "domains"
	last := len(life) - 1
	steps := append(slices.Clone(life[:last]), step{"daemon killed", daemonKilled}, step{"replace and diff", libvirtReplaces}, life[last])
	live(t, s, steps)
	if left := s.domains(); left != "" {
		t.Errorf("libvirt still has %q", left)
	}
	for _, pattern := range []string{w.path("cache", "libvirt", "qemu", "log", "*"), w.path("config", "libvirt", "qemu", "*.xml")} {
		if left, err := filepath.Glob(pattern); err != nil || len(left) > 0 {
			t.Errorf("left over: %q, %v", left, err)
		}
	}
}

// domains lists all domains of the user.
func (s *site) domains() string {
	s.Helper()
	out, err := s.command(s.Context(), nil, "virsh", "--connect", "qemu:///session?socket="+filepath.Join(s.w.run, "libvirt", "libvirt-sock"),
		"list", "--all", "--name").CombinedOutput()
	if err != nil {
		s.Fatalf("virsh list: %v: %s", err, out)
	}
	return strings.TrimSpace(string(out))
}

// daemon returns the pid of the user's libvirtd.
func (s *site) daemon() int {
	s.Helper()
	b, err := os.ReadFile(filepath.Join(s.w.run, "libvirt", "libvirtd.pid"))
	if err != nil {
		s.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		s.Fatal(err)
	}
	return pid
}

// daemonKilled ends libvirtd under running machines. The next command starts it
// again, and nothing has happened.
func daemonKilled(s *site) {
	before := s.status()
	s.kill(s.daemon())
	s.equal("exec", s.ok("exec", "db", "--", "hostname"), "db\n")
	after := s.status()
	for i, m := range after.Machines {
		s.equal("state of "+m.Name, m.State, "ready")
		if m.PID != before.Machines[i].PID {
			s.Errorf("%s has process %d, had %d", m.Name, m.PID, before.Machines[i].PID)
		}
	}
	// A daemon that hangs is an error in seconds, not a wait without end.
	pid := s.daemon()
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		s.Fatal(err)
	}
	r := s.lab("stop", "db")
	if err := syscall.Kill(pid, syscall.SIGCONT); err != nil {
		s.Fatal(err)
	}
	s.failed(r, 1, "libvirt-sock does not answer", "its machines go on")
	s.equal("state", s.machine("db").State, "ready")
}

// libvirtReplaces changes a replica, sees what changed on its disk, and takes both back.
func libvirtReplaces(s *site) {
	s.ok("exec", "web-1", "--", "echo drift > /etc/drift; sync")
	got := strings.Join(s.drift("web-1"), "\n")
	if !strings.Contains(got, "A /etc/drift") {
		s.Errorf("lab diff: %s", got)
	}
	labfile := string(read(s, filepath.Join(s.dir, "Labfile")))
	s.write("Labfile", strings.Replace(labfile, `    ports: ["0:80"]`, "    ports: [\"0:80\"]\n    memory: 160MiB\n    replace: {strategy: blue-green, drain: 1s}", 1))
	s.ok("up")
	before := s.machine("web-1")
	s.equal("state", before.State, "ready")
	s.ok("rollback", "web-1")
	if after := s.machine("web-1"); after.State != "ready" || after.Generation != before.Generation+1 {
		s.Errorf("a rollback made %+v of %+v", after, before)
	}
	s.equal("drift", s.ok("exec", "web-1", "--", "ls /etc/drift 2>/dev/null || echo none"), "none\n")
	s.write("Labfile", labfile)
	s.ok("up")
	s.ok("plan")
}
