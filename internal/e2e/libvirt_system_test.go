// SPDX-License-Identifier: Apache-2.0

//go:build e2e

package e2e

import (
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/labfile/lab/providers/libvirt/daemontest"
)

// TestLibvirtSystem goes through the life of a lab whose machines the system's libvirt
// runs, for root and for an ordinary user.
func TestLibvirtSystem(t *testing.T) {
	eachUser(t, func(t *testing.T, w *world) {
		d := daemontest.StartSystem(t)
		by := "\nprovider: libvirt\nuri: " + d.URI() + "\n"
		t.Run("storage", func(t *testing.T) { systemStorage(w.site(t, strings.Replace(shared, "\n", by, 1))) })
		s := w.site(t, strings.Replace(shop, "\n", by, 1))
		s.kept = "domains"
		last := len(life) - 1
		steps := append(
			slices.Clone(life[:last]),
			step{"doctor", func(s *site) { systemDoctor(s, d) }},
			step{"daemon killed", func(s *site) { systemKilled(s, d) }},
			step{"replace and diff", libvirtReplaces},
			step{"owners", onlyOwn},
			life[last],
		)
		live(t, s, steps)
		if left := d.Virsh("list", "--all", "--name"); left != "" {
			t.Errorf("libvirt still has %q", left)
		}
		if left := d.Virsh("net-list", "--all", "--name"); left != "" {
			t.Errorf("libvirt still has the networks %q", left)
		}
	})
}

// shared is a lab whose machine has a volume and two folders of the host.
const shared = `lab: shared
machines:
  db:
    box: builtin/tiny
    volumes:
      - {name: data, size: 16MiB, mount: /srv/data}
    mounts:
      - ./in:/srv/in
      - {from: ./out, to: /srv/out, writable: true}
`

// systemStorage reads and writes what is outside a machine: as its user, in place.
func systemStorage(s *site) {
	for _, dir := range []string{"in", "out"} {
		if err := os.Mkdir(filepath.Join(s.dir, dir), 0o700); err != nil {
			s.Fatal(err)
		}
	}
	s.write("in/file", "of the host\n")
	if err := s.w.own(s.dir); err != nil {
		s.Fatal(err)
	}
	s.ok("up")
	s.equal("the guest reads", s.ok("exec", "db", "--", "cat /srv/in/file"), "of the host\n")
	s.ok("exec", "db", "--", "echo one > /srv/data/file; echo of the guest > /srv/out/file")
	out := filepath.Join(s.dir, "out", "file")
	s.equal("the host reads", string(read(s, out)), "of the guest\n")
	var st syscall.Stat_t
	if err := syscall.Stat(out, &st); err != nil || int(st.Uid) != s.w.uid() {
		s.Errorf("what the guest made belongs to user %d, %v", st.Uid, err)
	}
	s.ok("volume", "snapshot", "data") // under a machine that writes
	s.ok("exec", "db", "--", "echo two > /srv/data/file; sync")
	s.ok("replace", "db", "--yes")
	s.equal("after a replacement", s.ok("exec", "db", "--", "cat /srv/data/file /srv/out/file"), "two\nof the guest\n")
	onlyOwn(s)
	s.ok("destroy", "--yes", "--volumes")
	s.gone = true
}

func systemDoctor(s *site, d *daemontest.Daemon) {
	got := s.ok("doctor", "--provider", "libvirt", "--uri", d.URI())
	for _, want := range []string{"at " + d.Socket, "libvirt changes the owner of no file"} {
		if !strings.Contains(got, want) {
			s.Errorf("lab doctor lacks %q:\n%s", want, got)
		}
	}
}

// systemKilled ends libvirtd under running machines, and then makes it hang: they go on,
// and lab says what is wrong.
func systemKilled(s *site, d *daemontest.Daemon) {
	before := s.status()
	d.Signal(syscall.SIGKILL)
	s.wait("the loss is noticed", func() bool {
		r := s.lab("stop", "db")
		return r.code == 5 && strings.Contains(r.stderr, "libvirt does not listen at "+d.Socket) && strings.Contains(r.stderr, "sudo systemctl start libvirtd")
	})
	d.Start()
	s.equal("exec", s.ok("exec", "db", "--", "hostname"), "db\n")
	after := s.status()
	for i, m := range after.Machines {
		s.equal("state of "+m.Name, m.State, "ready")
		if m.PID != before.Machines[i].PID {
			s.Errorf("%s has process %d, had %d", m.Name, m.PID, before.Machines[i].PID)
		}
	}
	d.Signal(syscall.SIGSTOP)
	r := s.lab("stop", "db")
	d.Signal(syscall.SIGCONT)
	s.failed(r, 1, "libvirt-sock does not answer", "its machines go on")
	s.equal("state", s.machine("db").State, "ready")
}

// onlyOwn checks that all of lab's files are its user's, while machines run. The sockets
// that the daemon made are root's; nobody else gets to them.
func onlyOwn(s *site) {
	for _, root := range []string{s.w.data(), s.w.runtime()} {
		err := filepath.WalkDir(root, func(path string, e fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			var st syscall.Stat_t
			if err := syscall.Lstat(path, &st); err != nil {
				return err
			}
			if int(st.Uid) != s.w.uid() && e.Type() != fs.ModeSocket {
				s.Errorf("%s belongs to user %d", path, st.Uid)
			}
			if e.IsDir() && path == root && st.Mode&0o077 != 0 {
				s.Errorf("%s has mode %o", path, st.Mode)
			}
			return nil
		})
		if err != nil {
			s.Fatal(err)
		}
	}
}
