// SPDX-License-Identifier: Apache-2.0

package libvirt

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	golibvirt "github.com/digitalocean/go-libvirt"
	"github.com/google/go-cmp/cmp"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/providers"
	"github.com/labfile/lab/providers/libvirt/daemontest"
	"github.com/labfile/lab/providers/local"
)

// TestSystem goes through what a session does with the daemon of the system, as root
// and as an ordinary user.
func TestSystem(t *testing.T) {
	run := func(t *testing.T, d *daemontest.Daemon) {
		t.Run("conformance", func(t *testing.T) { conform(t, d) })
		t.Run("files", func(t *testing.T) { systemFiles(t, d) })
		t.Run("kernel", func(t *testing.T) { systemKernel(t, d) })
		t.Run("console", func(t *testing.T) { systemConsole(t, d) })
		t.Run("log", func(t *testing.T) { systemLog(t, d) })
		t.Run("check", func(t *testing.T) { systemCheck(t, d) })
		t.Run("network", func(t *testing.T) { systemNetwork(t, d) })
	}
	if d := daemontest.Given(t); d != nil {
		run(t, d)
		return
	}
	t.Run("root", func(t *testing.T) {
		t.Parallel()
		run(t, daemontest.StartSystem(t))
	})
	t.Run("user", func(t *testing.T) {
		t.Parallel()
		d := daemontest.StartSystem(t)
		d.AsUser(t, "TestSystem")
		if err := os.RemoveAll(d.Logs()); err != nil {
			t.Fatal(err)
		}
		if left := d.Leftovers(t); len(left) > 0 {
			t.Errorf("left over: %q", left)
		}
	})
}

// benchOf is newBench on a daemon that runs.
func benchOf(t *testing.T, d *daemontest.Daemon) *bench {
	b := &bench{T: t, daemon: d, dirs: testDirs(t)}
	b.p = testProvider(t, d, b.dirs)
	return b
}

// owners describes what lies below the roots: whose it is, and who may do what.
func owners(t *testing.T, roots ...string) map[string]string {
	t.Helper()
	found := map[string]string{}
	for _, root := range roots {
		err := filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			var st syscall.Stat_t
			if err := syscall.Lstat(path, &st); err != nil {
				return err
			}
			found[path] = fmt.Sprintf("%d:%d %o", st.Uid, st.Gid, st.Mode)
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return found
}

// QEMU is the caller's, and so is every file, before, during and after a run.
func systemFiles(t *testing.T, d *daemontest.Daemon) {
	b := benchOf(t, d)
	spec := b.spec(webOne)
	images := filepath.Dir(spec.Image.Disk)
	folder := t.TempDir()
	b.must(os.Chmod(spec.Image.Disk, 0o400))
	spec.Seed, spec.Mounts = []byte("seed"), []providers.Mount{{Tag: "m", Path: folder, Writable: true}}
	b.must(b.p.Create(b.ctx(), spec))
	before := owners(t, images, folder, b.dirs.Domain(webOne))
	unchanged := func(when string) {
		t.Helper()
		after := owners(t, images, folder, b.dirs.Domain(webOne))
		for path := range after {
			if before[path] == "" { // made since
				var uid, gid int
				fmt.Sscanf(after[path], "%d:%d", &uid, &gid)
				if uid != os.Geteuid() || gid != os.Getegid() {
					t.Errorf("%s: %s is %s", when, path, after[path])
				}
				delete(after, path)
			}
		}
		if diff := cmp.Diff(before, after); diff != "" {
			t.Errorf("%s (-before +after):\n%s", when, diff)
		}
	}
	b.start()
	m := b.state(providers.StateRunning, "")
	var st syscall.Stat_t
	b.must(syscall.Stat(fmt.Sprintf("/proc/%d", m.PID), &st))
	if int(st.Uid) != os.Geteuid() || int(st.Gid) != os.Getegid() {
		t.Errorf("QEMU runs as %d:%d", st.Uid, st.Gid)
	}
	unchanged("running")
	b.must(b.p.Freeze(b.ctx(), webOne))
	before[local.OverlayPath(b.dirs.Domain(webOne), 0)] = fmt.Sprintf("%d:%d %o", os.Geteuid(), os.Getegid(), syscall.S_IFREG|0o400) // frozen
	disk, err := b.p.OpenDisk(b.ctx(), webOne)
	b.must(err)
	b.must(disk.Release(b.ctx()))
	unchanged("frozen and read")
	b.must(b.p.Stop(b.ctx(), webOne, time.Minute))
	unchanged("stopped")
	b.destroyed()
}

// A kernel is read as the caller, too.
func systemKernel(t *testing.T, d *daemontest.Daemon) {
	b := benchOf(t, d)
	spec := b.spec(webOne)
	spec.Image.Kernel = filepath.Join(t.TempDir(), "kernel")
	b.must(os.WriteFile(spec.Image.Kernel, make([]byte, 4096), 0o400))
	before := owners(t, spec.Image.Kernel)
	b.must(b.p.Create(b.ctx(), spec))
	b.must(b.p.Start(b.ctx(), webOne))
	b.state(providers.StateRunning, "")
	b.must(b.p.Stop(b.ctx(), webOne, 0))
	if diff := cmp.Diff(before, owners(t, spec.Image.Kernel)); diff != "" {
		t.Errorf("the kernel (-before +after):\n%s", diff)
	}
	b.destroyed()
}

// The console's log is the caller's, however long, and is trimmed in place.
func systemConsole(t *testing.T, d *daemontest.Daemon) {
	b := benchOf(t, d)
	b.up()
	path := filepath.Join(b.dirs.Domain(webOne), local.FileConsole)
	b.console("zzzzzzzz", "zzzzzzzz")
	b.must(b.p.TrimLogs(b.ctx(), webOne, 8))
	b.console("z", "z")
	if got := owners(t, path)[path]; got != fmt.Sprintf("%d:%d %o", os.Geteuid(), os.Getegid(), syscall.S_IFREG|0o600) {
		t.Errorf("the console's log is %s", got)
	}
	b.destroyed()
}

// What libvirt writes about QEMU is root's to read.
func systemLog(t *testing.T, d *daemontest.Daemon) {
	b := benchOf(t, d)
	b.up()
	r, err := b.p.OpenLog(b.ctx(), webOne, providers.LogHypervisor)
	if os.Geteuid() == 0 {
		b.must(err)
		text, err := io.ReadAll(r)
		b.must(err)
		b.must(r.Close())
		if !strings.Contains(string(text), "starting up libvirt version") {
			t.Errorf("the log: %s", text)
		}
	} else {
		var private *errPrivate
		log := filepath.Join(d.Logs(), domainName(webOne)+".log")
		if want := `opening the hypervisor log of machine "web@1": the system's libvirt keeps it for root: open ` + log + `: permission denied`; !errors.As(err, &private) ||
			err.Error() != want || private.Hint() != `"sudo cat '`+log+`'" shows it` {
			t.Errorf("got %v\nwant %s", err, want)
		}
	}
	b.destroyed()
}

// systemNetwork has a machine of the caller's in a network that only root can make.
func systemNetwork(t *testing.T, d *daemontest.Daemon) {
	b := benchOf(t, d)
	b.must(b.p.Networks(b.ctx()))
	n, err := b.p.Network(b.ctx(), webOne.Lab, lab.NetworkIsolated)
	b.must(err)
	spec := b.spec(webOne)
	spec.Network, spec.Direct = lab.NetworkIsolated, n.Direct(lab.NetworkOf(webOne.Lab).Host(10), 1)
	b.must(b.p.Create(b.ctx(), spec))
	b.start()
	name := "lab-" + string(webOne.Lab) + "-isolated"
	if got := d.Virsh("domiflist", domainName(webOne)); !strings.Contains(got, name) || !strings.Contains(got, lab.MACOf(spec.Direct)) {
		t.Errorf("the machine's interfaces:\n%s", got)
	}
	b.destroyed()
	// A daemon of this host is remembered for as long as it has networks.
	session := New(Config{Dirs: b.p.cfg.Dirs, URI: "qemu:///session", Getenv: b.p.cfg.Getenv}).(providers.Networker)
	networked := func(want ...providers.Networked) {
		t.Helper()
		if got, err := session.Networked(b.ctx()); err != nil || !slices.Equal(got, want) {
			t.Errorf("these labs have networks: %v, %v; want %v", got, err, want)
		}
	}
	networked(providers.Networked{Lab: webOne.Lab, URI: b.p.URI()})
	b.must(b.p.RemoveNetworks(b.ctx(), webOne.Lab))
	networked()
	if _, err := os.Stat(b.p.remembered()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("it is remembered still: %v", err)
	}
	if got := d.Virsh("net-list", "--all", "--name"); strings.Contains(got, "lab-") {
		t.Errorf("left over: %s", got)
	}
}

func systemCheck(t *testing.T, d *daemontest.Daemon) {
	b := benchOf(t, d)
	found, err := b.p.Check(b.ctx())
	b.must(err)
	text := fmt.Sprint(found)
	for _, want := range []string{
		"{daemon ok libvirt ", " at " + d.Socket, "{emulator ok libvirt offers ",
		fmt.Sprintf("{files ok QEMU runs as user %d with what that user may do; libvirt changes the owner of no file }", os.Geteuid()),
	} {
		if !strings.Contains(text, want) {
			t.Errorf("the findings lack %q: %s", want, text)
		}
	}
}

const joinGroup = "join the group that may use it (sudo usermod -aG libvirt $USER, then log in again), or use qemu:///session"

// Who may not connect with the system's daemon is told how to be let in.
func TestSystemRefused(t *testing.T) {
	d := daemontest.Given(t)
	if d == nil {
		daemontest.StartSystem(t, `unix_sock_rw_perms = "0700"`).AsUser(t, t.Name())
		return
	}
	b := benchOf(t, d)
	err := b.p.Reach(b.ctx())
	if want := "libvirt does not listen at " + d.Socket + ": permission denied; " + joinGroup; !errors.Is(err, providers.ErrIncapable) || err.Error() != want {
		t.Errorf("got %v\nwant %s", err, want)
	}
	found, err := b.p.Check(b.ctx())
	b.must(err)
	want := providers.Finding{Topic: "daemon", Level: providers.LevelError, Detail: d.Socket + " is not for this user: permission denied", Cure: joinGroup}
	if found[1] != want {
		t.Errorf("got %+v\nwant %+v", found[1], want)
	}
}

// So is whom polkit refuses.
func TestRefused(t *testing.T) {
	for number, refused := range map[golibvirt.ErrorNumber]bool{
		golibvirt.ErrAuthFailed: true, golibvirt.ErrAuthUnavailable: true, golibvirt.ErrAuthCancelled: true, golibvirt.ErrNoDomain: false,
	} {
		if got := isRefused(golibvirt.Error{Code: uint32(number)}); got != refused {
			t.Errorf("%d: %t", number, got)
		}
	}
	k := &link{}
	err := &errRefused{"/sock", golibvirt.Error{Code: uint32(golibvirt.ErrAuthUnavailable), Message: "no polkit agent available"}, k.cure(os.ErrPermission)}
	if got := err.Error(); got != "libvirt at /sock refuses this user: no polkit agent available" || err.Hint() != joinGroup || !errors.Is(err, providers.ErrIncapable) {
		t.Errorf("%s; hint: %s", got, err.Hint())
	}
}

// Only those of the daemon's security models are told that keep QEMU from files.
func TestConfiningModels(t *testing.T) {
	for models, want := range map[string][]string{
		"": {}, "none dac": {}, "apparmor dac": {"apparmor"}, "selinux dac": {"selinux"},
	} {
		text := "<capabilities><host>"
		for m := range strings.FieldsSeq(models) {
			text += "<secmodel><model>" + m + "</model><doi>0</doi></secmodel>"
		}
		got, err := confiningModels(text + "</host></capabilities>")
		if diff := cmp.Diff(want, got); err != nil || diff != "" {
			t.Errorf("%q: %v (-want +got):\n%s", models, err, diff)
		}
	}
	if _, err := confiningModels("<capabilities>"); err == nil || !strings.HasPrefix(err.Error(), "reading libvirt's capabilities: ") {
		t.Errorf("half a document: %v", err)
	}
}

// Sockets that the daemon makes in the runtime directory get its group, and nobody else gets there.
func TestShare(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "run")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := share(dir); err != nil {
		t.Fatal(err)
	}
	if got, want := owners(t, dir)[dir], fmt.Sprintf("%d:%d %o", os.Geteuid(), os.Getegid(), syscall.S_IFDIR|syscall.S_ISGID|0o700); got != want {
		t.Errorf("the directory is %s, want %s", got, want)
	}
}
