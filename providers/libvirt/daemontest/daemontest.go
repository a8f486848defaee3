// SPDX-License-Identifier: Apache-2.0

// Package daemontest starts real libvirt daemons for tests: a session's or the system's,
// with directories of their own and nothing of the host's.
package daemontest

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/labfile/lab/providers/local"
)

// Daemon is a libvirtd and what it started.
type Daemon struct {
	Home   string // what it keeps lies below it
	Socket string
	PID    int
	Port   string // of StartRemote: where it listens on loopback
	Pool   string // of StartRemote: the directory of its storage pool

	t      testing.TB
	system bool
	keeper *exec.Cmd
	orders *os.File
	said   *bufio.Scanner
}

const (
	// keeperVariable makes the keeper of a test's program.
	keeperVariable = "LAB_TEST_LIBVIRT_KEEPER"
	// argumentsVariable tells it what the daemon is started with.
	argumentsVariable = "LAB_TEST_LIBVIRT_ARGUMENTS"
)

// Main is called by TestMain of whoever uses this package, before anything else. In
// a process that Start made it does not return.
func Main() {
	if os.Getenv(keeperVariable) != "" {
		keep()
	}
}

// Start starts a daemon; it and all that it started end with the test. libvirt
// counts root's daemon as the system's, so root's runs in a user namespace in which
// he is somebody else.
func Start(t testing.TB) *Daemon {
	t.Helper()
	return start(t, options{})
}

// StartRemote starts a daemon of the kind that Start does, which listens on a port of
// loopback, too, and has a storage pool.
func StartRemote(t testing.TB) *Daemon {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_, port, err := net.SplitHostPort(l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	d := start(t, options{listen: true, lines: []string{
		"listen_tls = 0", "listen_tcp = 1", `listen_addr = "127.0.0.1"`, fmt.Sprintf("tcp_port = %q", port), `auth_tcp = "none"`,
	}})
	d.Port = port
	d.MakePool(filepath.Join(d.Home, "pool, one"))
	return d
}

// MakePool makes the storage pool "default" in that directory.
func (d *Daemon) MakePool(dir string) {
	d.t.Helper()
	d.Pool = dir
	d.Virsh("pool-define-as", "default", "dir", "--target", dir)
	d.Virsh("pool-build", "default")
	d.Virsh("pool-start", "default")
}

// options is what kinds of daemons differ in.
type options struct {
	system bool
	listen bool     // for connections from other hosts
	lines  []string // of libvirtd.conf
	sshd   string   // configuration of an ssh server that runs beside it; empty for none
}

func start(t testing.TB, o options) *Daemon {
	t.Helper()
	home, err := os.MkdirTemp("/tmp", "labv-") // socket paths are short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(home) })
	d := &Daemon{Home: home, t: t, system: o.system, Socket: socketIn(home)}
	kind := "session"
	if o.system {
		kind = "system"
		err = d.furnish(o.lines)
	} else {
		for _, dir := range []string{"run", "config", "cache", "data"} {
			err = errors.Join(err, os.Mkdir(filepath.Join(home, dir), 0o700))
		}
		conf := filepath.Join(home, "config", "libvirt")
		err = errors.Join(err, os.Mkdir(conf, 0o700),
			os.WriteFile(filepath.Join(conf, "libvirtd.conf"), []byte(strings.Join(o.lines, "\n")), 0o600))
	}
	if err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	d.keeper = exec.Command(self)
	d.keeper.Env = append(os.Environ(), append(d.Env(), keeperVariable+"="+kind)...)
	if o.listen {
		d.keeper.Env = append(d.keeper.Env, argumentsVariable+"=--listen", sshdVariable+"="+o.sshd)
	}
	d.keeper.Dir = "/"
	d.keeper.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	switch {
	case o.system:
		d.keeper.SysProcAttr.Cloneflags = syscall.CLONE_NEWNS | syscall.CLONE_NEWNET
	case os.Geteuid() == 0:
		other := []syscall.SysProcIDMap{{ContainerID: 1000, HostID: 0, Size: 1}}
		d.keeper.SysProcAttr.Cloneflags = syscall.CLONE_NEWUSER
		d.keeper.SysProcAttr.UidMappings, d.keeper.SysProcAttr.GidMappings = other, other
	}
	log, err := os.Create(filepath.Join(home, "libvirtd.log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	d.keeper.Stderr = log
	orders, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer orders.Close()
	d.keeper.Stdin, d.orders = orders, w
	out, err := d.keeper.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	d.said = bufio.NewScanner(out)
	if err := d.keeper.Start(); err != nil {
		t.Fatalf("starting libvirtd: %v", err)
	}
	t.Cleanup(func() {
		d.orders.Close()
		d.keeper.Wait()
		if b, err := os.ReadFile(log.Name()); err == nil && t.Failed() {
			t.Logf("libvirtd said:\n%s", b)
		}
	})
	d.Start()
	return d
}

// socketIn is where the daemon with that Home listens.
func socketIn(home string) string { return filepath.Join(home, "run", "libvirt", "libvirt-sock") }

// Env is what a program needs in its environment to take this daemon for its user's.
func (d *Daemon) Env() []string {
	return []string{
		"XDG_RUNTIME_DIR=" + filepath.Join(d.Home, "run"), "XDG_CONFIG_HOME=" + filepath.Join(d.Home, "config"),
		"XDG_CACHE_HOME=" + filepath.Join(d.Home, "cache"), "XDG_DATA_HOME=" + filepath.Join(d.Home, "data"), "HOME=" + d.Home,
	}
}

// Getenv looks into Env.
func (d *Daemon) Getenv(name string) string {
	for _, e := range d.Env() {
		if v, ok := strings.CutPrefix(e, name+"="); ok {
			return v
		}
	}
	return ""
}

// URI names the daemon, for everybody.
func (d *Daemon) URI() string {
	if d.system {
		return "qemu+unix:///system?socket=" + d.Socket
	}
	return "qemu:///session?socket=" + d.Socket
}

// Start starts the daemon again, once it has been killed, and waits until it listens.
func (d *Daemon) Start() {
	d.t.Helper()
	if _, err := d.orders.WriteString("start\n"); err != nil {
		d.t.Fatal(err)
	}
	if !d.said.Scan() {
		d.t.Fatalf("starting libvirtd: %v", d.said.Err())
	}
	pid, err := strconv.Atoi(d.said.Text())
	if err != nil {
		d.t.Fatalf("starting libvirtd: %s", d.said.Text())
	}
	// In a namespace of users the pid is the same.
	d.PID = pid
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	d.await(ctx, d.Socket)
	if syscall.Kill(pid, 0) != nil {
		d.t.Fatal("libvirtd ended at once")
	}
	if d.system {
		d.await(ctx, filepath.Join(filepath.Dir(d.Socket), "virtlogd-sock"))
	}
}

// await returns once somebody listens at a socket.
func (d *Daemon) await(ctx context.Context, socket string) {
	d.t.Helper()
	for {
		c, err := (&net.Dialer{}).DialContext(ctx, "unix", socket)
		if err == nil {
			c.Close()
			return
		}
		select {
		case <-ctx.Done():
			d.t.Fatalf("nobody listens at %s: %v", socket, err)
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// Signal sends the daemon a signal; SIGKILL leaves its socket and its machines. Signal
// returns after a killed daemon has ended: until then its socket accepts connections, and
// Start would take it for the next one's.
func (d *Daemon) Signal(s syscall.Signal) {
	d.t.Helper()
	daemon, err := local.OpenProcess(d.PID) // before it can have ended
	if err != nil {
		d.t.Fatal(err)
	}
	defer daemon.Close()
	if err := daemon.Signal(s); err != nil {
		d.t.Fatal(err)
	}
	if s != syscall.SIGKILL {
		return
	}
	ended, err := daemon.WaitFor(context.Background(), time.Minute)
	if err != nil || !ended {
		d.t.Fatalf("libvirtd outlived SIGKILL: %v", err)
	}
}

// Virsh runs virsh on the daemon.
func (d *Daemon) Virsh(args ...string) string {
	d.t.Helper()
	cmd := exec.Command("virsh", append([]string{"--quiet", "--connect", strings.Replace(d.URI(), "qemu:", "qemu+unix:", 1)}, args...)...)
	cmd.Env = append(os.Environ(), d.Env()...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		d.t.Fatalf("virsh %s: %v: %s", strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}

// Logs is where the system's daemon writes about its domains.
func (d *Daemon) Logs() string { return filepath.Join(d.Home, "log", "libvirt", "qemu") }

// Leftovers names the files that libvirt keeps of domains.
func (d *Daemon) Leftovers(t *testing.T) []string {
	t.Helper()
	patterns := []string{"config/libvirt/qemu/*.xml", "run/libvirt/qemu/run/*.xml", "cache/libvirt/qemu/log/*", "config/libvirt/qemu/*/domain-*"}
	if d.system {
		patterns = []string{"etc/libvirt/qemu/*.xml", "run/libvirt/qemu/*.xml", "lib/libvirt/qemu/domain-*"}
		if os.Geteuid() == 0 { // others cannot remove what is root's
			patterns = append(patterns, "log/libvirt/qemu/*")
		}
	}
	var found []string
	for _, pattern := range patterns {
		files, err := filepath.Glob(filepath.Join(d.Home, pattern))
		if err != nil {
			t.Fatal(err)
		}
		found = append(found, files...)
	}
	return found
}

func fatal(doing string, err error) {
	fmt.Fprintf(os.Stderr, "%s: %v\n", doing, err)
	os.Exit(1)
}
