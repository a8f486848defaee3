// SPDX-License-Identifier: Apache-2.0

package cli_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/labfile/lab/internal/engine"
	"github.com/labfile/lab/internal/lab"
)

// sshSays returns what OpenSSH makes of the configuration for a host.
func (d *desk) sshSays(config, host, key string, more ...string) string {
	d.t.Helper()
	args := append([]string{"-G", "-F", config}, more...)
	out, err := exec.CommandContext(d.t.Context(), "ssh", append(args, host)...).CombinedOutput()
	if err != nil {
		d.t.Fatalf("ssh -G %s: %v\n%s", host, err, out)
	}
	for line := range strings.Lines(string(out)) {
		if k, v, _ := strings.Cut(strings.TrimSpace(line), " "); k == key {
			return v
		}
	}
	return ""
}

// Where connections are shared, ssh takes one that is there for the name, whatever lab
// it leads to: no two machines have the same.
func TestSharedConnectionsOfTwoLabsDiffer(t *testing.T) {
	d := newDesk(t, shop)
	other := strings.Replace(shop, "lab: shop", "lab: two", 1)
	d.write("two.yaml", other)
	defer func() {
		_, _, _ = d.run("destroy", "--yes")
		_, _, _ = d.run("destroy", "--yes", "--file", "two.yaml")
	}()
	d.ok("up", "-q")
	d.ok("up", "-q", "--file", "two.yaml")
	d.write("ssh.conf", d.ok("ssh-config", "--bare")+d.ok("ssh-config", "--file", "two.yaml"))
	config := filepath.Join(d.folder, "ssh.conf")
	seen := map[string]string{}
	for _, host := range []string{"web.shop", "db.shop", "web.two", "db.two"} {
		for _, path := range []string{"/cm/%C", "/cm/%r@%h:%p"} {
			at := d.sshSays(config, host, "controlpath", "-o", "ControlMaster=auto", "-o", "ControlPath="+path)
			if twin := seen[at]; at == "" || twin != "" {
				t.Errorf("%s and %s share %q", host, twin, at)
			}
			seen[at] = host
		}
		lab := strings.TrimPrefix(strings.TrimPrefix(host, "web."), "db.")
		if got := d.sshSays(config, host, "proxycommand"); !strings.Contains(got, "ssh-proxy --lab "+lab+"-") {
			t.Errorf("%s is reached by %q", host, got)
		}
	}
	if got := d.sshSays(config, "web", "proxycommand"); !strings.Contains(got, "ssh-proxy --lab shop-") {
		t.Errorf("the bare name is reached by %q", got)
	}
}

func TestInstallSSHConfig(t *testing.T) {
	d := newDesk(t, shop)
	home := t.TempDir()
	d.env["HOME"] = home
	defer func() { _, _, _ = d.run("destroy", "--yes") }()
	if code, _, _ := d.run("ssh-config", "--install"); code != 1 {
		t.Errorf("of no lab: exit code %d, want 1", code)
	}
	d.ok("up", "-q", "db")

	// The user's file is a link into a folder of dotfiles, and readable by others.
	const mine = "Host *\n  User me # é\n"
	dots := filepath.Join(t.TempDir(), "ssh_config")
	config := filepath.Join(home, ".ssh", "config")
	must(t, os.WriteFile(dots, []byte(mine), 0o644))
	must(t, os.Mkdir(filepath.Dir(config), 0o700))
	must(t, os.Symlink(dots, config))
	for range 2 {
		d.ok("ssh-config", "--install")
	}
	include := "# machines of lab; \"lab ssh-config --uninstall\" takes this line away\nInclude \"" + d.host.Dirs.SSH() + "/*.conf\"\n"
	d.wantFile(dots, include+mine, 0o644)
	if fi, err := os.Lstat(config); err != nil || fi.Mode().Type() != fs.ModeSymlink {
		t.Errorf("the link is no link any more: %v, %v", fi, err)
	}
	if got := d.sshSays(config, "db.shop", "hostname"); !strings.HasPrefix(got, "db.shop-") {
		t.Errorf("db.shop is %q", got)
	}
	if got := d.sshSays(config, "db", "hostname"); got != "db" {
		t.Errorf("db is %q", got)
	}

	// Machines that are new or gone show at once.
	d.ok("up", "-q")
	if got := d.sshSays(config, "web.shop", "hostname"); !strings.HasPrefix(got, "web.shop-") {
		t.Errorf("web.shop is %q", got)
	}
	d.ok("destroy", "web", "--yes")
	if got := d.sshSays(config, "web.shop", "hostname"); got != "web.shop" {
		t.Errorf("web.shop is %q", got)
	}
	files := d.installed()
	if len(files) != 1 {
		t.Fatalf("the files are %v", files)
	}
	if fi, err := os.Stat(files[0]); err != nil || fi.Mode() != 0o600 {
		t.Errorf("the lab's file: %v, %v", fi, err)
	}

	// A second lab of the same name takes the short one from both.
	first, second := d.folder, t.TempDir()
	d.folder = second
	d.write("Labfile", shop)
	d.write("disk.raw", strings.Repeat("x", 4096))
	d.ok("up", "-q", "db")
	d.ok("ssh-config", "--install")
	if got := d.sshSays(config, "db.shop", "hostname"); got != "db.shop" {
		t.Errorf("of two labs, db.shop is %q", got)
	}
	d.ok("destroy", "--yes")
	if got := d.installed(); !slices.Equal(got, files) {
		t.Errorf("destroy left %v, want %v", got, files)
	}
	d.folder = first // whose short names are its own again
	if got := d.sshSays(config, "db.shop", "hostname"); !strings.HasPrefix(got, "db.shop-") {
		t.Errorf("db.shop is %q", got)
	}

	// So they are after the other's supervisor has destroyed it.
	d.folder = second
	d.ok("up", "-q", "db")
	d.ok("ssh-config", "--install")
	id := ""
	for _, file := range d.installed() {
		if file != files[0] {
			id = strings.TrimSuffix(filepath.Base(file), ".conf")
		}
	}
	must(t, d.host.Lab(lab.ID(id)).Destroy(t.Context(), engine.Options{}))
	if code, _, errOut := d.run("tend", id); code != 1 {
		t.Errorf("tend: %d\n%s", code, errOut)
	}
	d.folder = first
	if got := d.sshSays(config, "db.shop", "hostname"); !strings.HasPrefix(got, "db.shop-") {
		t.Errorf("after tend, db.shop is %q", got)
	}

	d.ok("ssh-config", "--uninstall")
	d.wantFile(dots, mine, 0o644)
	if got := d.installed(); len(got) > 0 {
		t.Errorf("uninstall left %v", got)
	}
	for _, args := range [][]string{{"--install", "--uninstall"}, {"--install", "db"}, {"--uninstall", "--json"}} {
		if code, _, _ := d.run(append([]string{"ssh-config"}, args...)...); code != 3 {
			t.Errorf("ssh-config %v: exit code %d, want 3", args, code)
		}
	}
}

// Without a configuration, one is made with mode 0600.
func TestInstallSSHConfigFirst(t *testing.T) {
	d := newDesk(t, shop)
	d.env["HOME"] = t.TempDir()
	defer func() { _, _, _ = d.run("destroy", "--yes") }()
	d.ok("up", "-q")
	d.ok("ssh-config", "--install")
	config := filepath.Join(d.env["HOME"], ".ssh", "config")
	d.wantFile(config, "# machines of lab; \"lab ssh-config --uninstall\" takes this line away\nInclude \""+d.host.Dirs.SSH()+"/*.conf\"\n", 0o600)
	if left, _ := filepath.Glob(filepath.Join(filepath.Dir(config), ".*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

// A lab whose record cannot be read keeps its file, and the short names in it.
func TestInstallSSHConfigBesideBroken(t *testing.T) {
	d := newDesk(t, shop)
	d.env["HOME"] = t.TempDir()
	config := filepath.Join(d.env["HOME"], ".ssh", "config")
	defer func() { _, _, _ = d.run("destroy", "--yes") }()
	d.ok("up", "-q", "db")
	d.ok("ssh-config", "--install")
	names := d.sshSays(config, "db.shop", "hostname")
	broken := lab.ID(strings.TrimPrefix(names, "db."))
	record, err := os.ReadFile(d.host.Dirs.Ledger(broken))
	must(t, err)
	must(t, os.WriteFile(d.host.Dirs.Ledger(broken), []byte("no record\n"), 0o600))

	first := d.folder
	d.folder = t.TempDir()
	d.write("Labfile", shop)
	d.write("disk.raw", strings.Repeat("x", 4096))
	d.ok("up", "-q", "db")
	d.ok("ssh-config", "--install")
	for _, file := range d.installed() {
		text, err := os.ReadFile(file)
		must(t, err)
		its := filepath.Base(file) == string(broken)+".conf"
		if has := strings.Contains(string(text), "Host db.shop "); has != its {
			t.Errorf("%s has the short name: %v, want %v", file, has, its)
		}
	}
	d.ok("destroy", "--yes")
	d.folder = first
	must(t, os.WriteFile(d.host.Dirs.Ledger(broken), record, 0o600))
}

func TestInstallSSHConfigDanglingLink(t *testing.T) {
	d := newDesk(t, shop)
	d.env["HOME"] = t.TempDir()
	config := filepath.Join(d.env["HOME"], ".ssh", "config")
	defer func() { _, _, _ = d.run("destroy", "--yes") }()
	d.ok("up", "-q", "db")
	must(t, os.Mkdir(filepath.Dir(config), 0o700))
	must(t, os.Symlink("/no/such/dotfiles", config))
	if code, _, errOut := d.run("ssh-config", "--install"); code != 1 || !strings.Contains(errOut, "is a link that leads to no file") || !strings.Contains(errOut, "remove the link") {
		t.Errorf("exit code %d\n%s", code, errOut)
	}
	if to, err := os.Readlink(config); err != nil || to != "/no/such/dotfiles" {
		t.Errorf("the link leads to %q, %v", to, err)
	}
}

// While one command is at the configuration, no other is. The user's file is a pipe here,
// so that the command stands where it reads.
func TestInstallSSHConfigLocks(t *testing.T) {
	d := newDesk(t, shop)
	d.env["HOME"] = t.TempDir()
	config := filepath.Join(d.env["HOME"], ".ssh", "config")
	defer func() { _, _, _ = d.run("destroy", "--yes") }()
	d.ok("up", "-q", "db")
	must(t, os.Mkdir(filepath.Dir(config), 0o700))
	must(t, unix.Mkfifo(config, 0o600))
	done := make(chan int, 1)
	go func() {
		code, _, _ := d.run("ssh-config", "--install")
		done <- code
	}()
	pipe, err := os.OpenFile(config, os.O_WRONLY, 0) // until somebody reads
	must(t, err)
	folder, err := os.Open(d.host.Dirs.SSH())
	must(t, err)
	defer folder.Close()
	if err := unix.Flock(int(folder.Fd()), unix.LOCK_EX|unix.LOCK_NB); !errors.Is(err, unix.EWOULDBLOCK) {
		t.Errorf("the folder is not locked: %v", err)
	}
	// It reads again before it writes: an ordinary file, of the same text.
	must(t, os.WriteFile(config+".new", nil, 0o600))
	must(t, os.Rename(config+".new", config))
	must(t, pipe.Close())
	if code := <-done; code != 0 {
		t.Errorf("exit code %d", code)
	}
}

// Ctrl-C ends a command that waits for another one that is at the configuration.
func TestInstallSSHConfigWaits(t *testing.T) {
	d := newDesk(t, shop)
	d.env["HOME"] = t.TempDir()
	defer func() { _, _, _ = d.run("destroy", "--yes") }()
	d.ok("up", "-q", "db")
	must(t, os.MkdirAll(d.host.Dirs.SSH(), 0o700))
	folder, err := os.Open(d.host.Dirs.SSH())
	must(t, err)
	defer folder.Close()
	must(t, unix.Flock(int(folder.Fd()), unix.LOCK_EX))
	fi, err := folder.Stat()
	must(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	done := make(chan string, 1)
	go func() {
		code, _, errOut := d.runContext(ctx, "ssh-config", "--install")
		done <- fmt.Sprintf("exit code %d, %s", code, errOut)
	}()
	inode := fmt.Sprintf(":%d ", fi.Sys().(*syscall.Stat_t).Ino)
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		locks, err := os.ReadFile("/proc/locks") // "1: -> FLOCK ADVISORY WRITE pid major:minor:inode 0 EOF" waits
		must(t, err)
		if slices.ContainsFunc(strings.Split(string(locks), "\n"), func(l string) bool {
			return strings.Contains(l, "->") && strings.Contains(l, inode)
		}) {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("it does not wait:\n%s", locks)
		}
	}
	cancel()
	if got := <-done; got != "exit code 130, lab: error: interrupted\n" {
		t.Errorf("it ended with %s", got)
	}
	if got := d.installed(); len(got) > 0 {
		t.Errorf("it wrote %q", got)
	}
	must(t, folder.Close())
	d.ok("ssh-config", "--install")
}

func (d *desk) installed() []string {
	files, _ := filepath.Glob(filepath.Join(d.host.Dirs.SSH(), "*"))
	return files
}

func (d *desk) wantFile(path, want string, mode fs.FileMode) {
	d.t.Helper()
	got, err := os.ReadFile(path)
	must(d.t, err)
	if diff := cmp.Diff(want, string(got)); diff != "" {
		d.t.Error(diff)
	}
	if fi, err := os.Stat(path); err != nil || fi.Mode() != mode {
		d.t.Errorf("%s: %v, want mode %v", path, fi.Mode(), mode)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
