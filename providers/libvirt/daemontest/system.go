// SPDX-License-Identifier: Apache-2.0

package daemontest

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// StartSystem starts a daemon as the system's: root's, for everybody who can reach its
// socket, with virtlogd as distributions have it. It is in namespaces of its own, in
// which all that it would write to is below Home, and so nothing of the host's is
// touched. Only root can do that; for others the test is skipped. Lines for libvirtd.conf
// go before those that are the default here.
func StartSystem(t testing.TB, lines ...string) *Daemon {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("only root can run a system's libvirt")
	}
	return start(t, options{system: true, lines: lines})
}

// userVariable names, in a process that AsUser made, the Home of its daemon.
const userVariable = "LAB_TEST_LIBVIRT_SYSTEM"

// AsUser runs a test of the calling program again, in a process of an ordinary user's,
// which finds the daemon by Given.
func (d *Daemon) AsUser(t *testing.T, test string) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	// Where go test leaves it only its owner gets.
	b, err := os.ReadFile(self)
	if err != nil {
		t.Fatal(err)
	}
	program, home := filepath.Join(d.Home, "test"), filepath.Join(d.Home, "user")
	if err := os.WriteFile(program, b, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(home, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(home, ordinary, ordinary); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), program, "-test.v", "-test.run", "^"+strings.ReplaceAll(test, "/", "$/^")+"$")
	cmd.Env = append(os.Environ(), "HOME="+home, "TMPDIR="+home, userVariable+"="+d.Home)
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: ordinary, Gid: ordinary}, Pdeathsig: syscall.SIGKILL}
	runtime.LockOSThread() // the thread's end would be taken for the parent's
	defer runtime.UnlockOSThread()
	out, err := cmd.CombinedOutput()
	if err != nil || !bytes.Contains(out, []byte("--- PASS: ")) {
		t.Errorf("as an ordinary user: %v\n%s", err, out)
	}
}

// ordinary is the user and group of AsUser, whom the host itself need not know.
const ordinary = 64060

// Given returns the daemon that a process which AsUser made is to talk to, nil in another.
func Given(t *testing.T) *Daemon {
	home := os.Getenv(userVariable)
	if home == "" {
		return nil
	}
	return &Daemon{Home: home, Socket: socketIn(home), t: t, system: true}
}

// qemuUser is whom the daemon runs QEMU as unless a domain says otherwise: somebody who
// can read nothing of the tests'.
const qemuUser = 64055

// settings are the daemon's files in /etc/libvirt.
var settings = map[string]string{
	"libvirtd.conf": `
unix_sock_ro_perms = "0777"
unix_sock_rw_perms = "0777"
auth_unix_ro = "none"
auth_unix_rw = "none"
`,
	// Without remember_owner a chown would not be undone, and be seen.
	"qemu.conf": fmt.Sprintf(`
user = "+%[1]d"
group = "+%[1]d"
security_driver = "none"
dynamic_ownership = 1
remember_owner = 0
namespaces = []
cgroup_controllers = []
hugetlbfs_mount = []
stdio_handler = "logd"
`, qemuUser),
}

// hostEtc is where below Home the daemon finds the /etc of the host. What is mounted on a
// file there would be gone as soon as another file is renamed to it, as useradd does with
// passwd; so all of /etc is another, with links to this one.
const hostEtc = "host-etc"

// replaced are the host's directories that the daemon finds others in the place of, by
// their names below Home.
var replaced = []struct{ home, host string }{
	{"run", "/run"},
	{"etc", "/etc"},
	{"lib", "/var/lib"},
	{"log", "/var/log"},
	{"cache", "/var/cache"},
	{"kvm", "/dev/kvm"},
}

// furnish makes what isolate puts in the place of the host's.
func (d *Daemon) furnish(lines []string) error {
	in := func(name string) string { return filepath.Join(d.Home, name) }
	if err := os.Chmod(d.Home, 0o755); err != nil { // everybody reaches the socket
		return err
	}
	for _, dir := range []string{"run", "run/lock", "run/sshd", "etc", hostEtc, "lib", "log", "cache", "root"} {
		if err := os.Mkdir(in(dir), 0o755); err != nil {
			return err
		}
	}
	if err := linkEtc(in("etc"), in(hostEtc)); err != nil {
		return err
	}
	for name, text := range settings {
		if name == "libvirtd.conf" {
			text = strings.Join(lines, "\n") + text // the first of a name counts
		}
		if err := os.WriteFile(in("etc/libvirt/"+name), []byte(text), 0o644); err != nil {
			return err
		}
	}
	// libvirtd does not start without the accounts that it was built to use, whatever
	// qemu.conf says, and polkit asks for the name of whoever calls. The host has the
	// former if its libvirt is set up for the system. Who comes by ssh as root finds another
	// home and another shell: what this host's .bashrc runs may take long, print, or hang.
	for name, line := range map[string]string{"passwd": "%s:x:%d:%[2]d::/nonexistent:/bin/false\n", "group": "%s:x:%d:\n"} {
		b, err := os.ReadFile("/etc/" + name)
		if err != nil {
			return err
		}
		for i, account := range []string{"lab-ordinary", "libvirt-qemu", "qemu", "kvm"} {
			if !strings.Contains("\n"+string(b), "\n"+account+":") {
				b = fmt.Appendf(b, line, account, ordinary+i)
			}
		}
		if name == "passwd" { // the first of a name counts
			b = append(fmt.Appendf(nil, "root:x:0:0:root:%s:/bin/sh\n", in("root")), b...)
		}
		if err := os.WriteFile(in("etc/"+name), b, 0o644); err != nil {
			return err
		}
	}
	// A /dev/kvm that root can open and QEMU's account cannot has libvirt look at all its
	// emulators again whenever it is asked anything.
	return os.WriteFile(in("kvm"), nil, 0)
}

// linkEtc makes links in folder etc to all that is in /etc, which will be at host, but the
// accounts and the settings of libvirt.
func linkEtc(etc, host string) error {
	entries, err := os.ReadDir("/etc")
	if err != nil {
		return err
	}
	for _, x := range entries {
		to := filepath.Join(host, x.Name())
		switch {
		case x.Name() == "passwd", x.Name() == "group", x.Name() == "libvirt":
			continue
		case x.Type()&fs.ModeSymlink != 0:
			if to, err = os.Readlink(filepath.Join("/etc", x.Name())); err != nil {
				return err
			}
		}
		if err := os.Symlink(to, filepath.Join(etc, x.Name())); err != nil {
			return err
		}
	}
	return os.Mkdir(filepath.Join(etc, "libvirt"), 0o755)
}

// isolate makes this process, which is in a mount namespace of its own, see nothing of
// the host's that libvirt would change.
func isolate(home string) error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("keeping mounts private: %w", err)
	}
	// libvirt takes a host without control groups as it is.
	if err := unix.Unmount("/sys/fs/cgroup", unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("hiding the control groups: %w", err)
	}
	etc := filepath.Join(home, hostEtc)
	err := unix.Mount("/etc", etc, "", unix.MS_BIND|unix.MS_REC, "")
	if err == nil { // nothing that cleans up below home removes the host's files
		err = unix.Mount("", etc, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, "")
	}
	if err != nil {
		return fmt.Errorf("keeping /etc: %w", err)
	}
	for _, r := range replaced {
		err := unix.Mount(filepath.Join(home, r.home), r.host, "", unix.MS_BIND, "")
		if r.host == "/dev/kvm" && errors.Is(err, unix.ENOENT) {
			continue // as good
		}
		if err != nil {
			return fmt.Errorf("replacing %s: %w", r.host, err)
		}
	}
	return nil
}
