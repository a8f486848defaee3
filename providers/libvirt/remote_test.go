// SPDX-License-Identifier: Apache-2.0

package libvirt

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	golibvirt "github.com/digitalocean/go-libvirt"

	"github.com/labfile/lab/internal/dirs"
	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/providers"
	"github.com/labfile/lab/providers/accel"
	"github.com/labfile/lab/providers/libvirt/daemontest"
	"github.com/labfile/lab/providers/local"
	"github.com/labfile/lab/providers/providertest"
)

// testRemote returns a provider of a daemon that is reached by its URI alone.
func testRemote(t *testing.T, uri string, d *daemontest.Daemon, dirs dirs.Dirs) *Remote {
	r, ok := New(Config{Dirs: dirs, URI: uri, Accel: "tcg", Getenv: d.Getenv}).(*Remote)
	if !ok {
		t.Fatal("the daemon is one of this host")
	}
	t.Cleanup(r.Close)
	return r
}

// qemuOf finds the process of a generation, which the provider cannot see.
func qemuOf(t *testing.T, r *Remote, g lab.Generation) int {
	t.Helper()
	all := providertest.Hypervisors(t, r.prefix(g))
	if len(all) != 1 {
		t.Fatalf("%s has the QEMUs %q", g, all)
	}
	pid, _, _ := strings.Cut(strings.TrimPrefix(all[0], "/proc/"), ":")
	n, err := strconv.Atoi(pid)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// TestRemote puts the provider of another host's daemon to the proof: in a network
// namespace, by TLS, and a session's by TCP.
func TestRemote(t *testing.T) {
	t.Run("tls", func(t *testing.T) {
		t.Parallel()
		d := daemontest.StartFar(t)
		conformRemote(t, d.Daemon, "qemu+tls://"+d.TLS+"/system?pkipath="+d.PKI, filepath.Join(d.Home, "lib", "libvirt", "images"))
	})
	t.Run("session", func(t *testing.T) {
		t.Parallel()
		d := daemontest.StartRemote(t)
		conformRemote(t, d, "qemu+tcp://127.0.0.1:"+d.Port+"/session", d.Pool)
	})
}

// A pool that cannot be used is told of before anything is made there.
func TestRemoteRoom(t *testing.T) {
	t.Parallel()
	d := daemontest.StartRemote(t)
	uri := "qemu+tcp://127.0.0.1:" + d.Port + "/session"
	r := testRemote(t, uri, d, testDirs(t))
	room, err := r.HostRoom(t.Context())
	if err != nil || room.At != d.Pool+" at "+uri || room.Free <= 0 {
		t.Errorf("%+v, %v", room, err)
	}
	refused := func(r *Remote, want, cure string) {
		t.Helper()
		room, err := r.HostRoom(t.Context())
		var pool *errPool
		if !errors.Is(err, providers.ErrIncapable) || !errors.As(err, &pool) || err.Error() != want || !strings.Contains(pool.Hint(), cure) {
			t.Errorf("%+v, %v, want %s; %s", room, err, want, cure)
		}
	}
	d.Virsh("pool-destroy", "default")
	refused(r, `the storage pool "default" at `+uri+` is not active`, "pool-start default")
	d.Virsh("pool-start", "default")
	if _, err := r.HostRoom(t.Context()); err != nil {
		t.Error(err)
	}
	other := testRemote(t, uri+"?pool=none", d, testDirs(t))
	refused(other, `the storage pool "none" at `+uri+`?pool=none does not exist`, "pool-define-as none dir")
}

// What decides about KVM is shown by emulation, which there is everywhere.
func TestRemoteProbe(t *testing.T) {
	t.Parallel()
	d := daemontest.StartRemote(t)
	r := testRemote(t, "qemu+tcp://127.0.0.1:"+d.Port+"/session", d, testDirs(t))
	files, err := r.pool(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	ran := false
	for range 20 { // the limit is one for KVM on a host that is not busy
		var why string
		if ran, why, err = r.probe(t.Context(), files, "qemu", ""); err != nil {
			t.Fatal(err)
		}
		if ran {
			break
		}
		t.Log(why)
	}
	if !ran {
		t.Error("guest code was not seen to run")
	}
	if ran, why, err := r.probe(t.Context(), files, "xen", ""); ran || err != nil || !strings.HasPrefix(why, "libvirt says: ") {
		t.Errorf("a type that there is not: %v, %q, %v", ran, why, err)
	}
	entries, err := os.ReadDir(d.Pool)
	if left := d.Virsh("list", "--all", "--name"); left != "" || err != nil || len(entries) > 0 {
		t.Errorf("left over: %q, %v, %v", left, entries, err)
	}
	// Whatever KVM is worth here, there is a decision, and it is remembered.
	r.p.cfg.Accel = accel.Auto
	decided, err := r.accel(t.Context(), files, "")
	if err != nil || decided.Name != accel.KVM && decided.Name != accel.TCG || decided.Reason == "" {
		t.Errorf("decided: %+v, %v", decided, err)
	}
	t.Logf("%+v", decided)
	if again, err := r.accel(t.Context(), files, ""); err != nil || again != decided {
		t.Errorf("decided %+v, then %+v, %v", decided, again, err)
	}
	now := time.Now()
	for _, c := range []struct {
		v      verdict
		kernel bool
		want   bool
	}{
		{verdict{Host: "h", Usable: true, At: now}, false, true},
		{verdict{Host: "h", Usable: true, At: now}, true, false}, // firmware alone was run
		{verdict{Host: "h", Usable: false, At: now}, true, true},
		{verdict{Host: "h", Usable: true, Kernel: true, At: now}, true, true},
		{verdict{Host: "other", Usable: true, Kernel: true, At: now}, true, false},
		{verdict{Host: "h", Usable: true, Kernel: true, At: now.Add(-verdictTime)}, true, false},
		{verdict{Host: "h", Usable: true, Kernel: true, At: now.Add(time.Hour)}, true, false},
	} {
		if got := c.v.settles("h", c.kernel, now); got != c.want {
			t.Errorf("%+v, kernel %v: %v", c.v, c.kernel, got)
		}
	}
}

// What ssh says is what the user is told.
func TestRemoteUnreachable(t *testing.T) {
	port := func() string { // nobody listens there
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		return l.Addr().String()
	}
	for uri, want := range map[string]string{
		"qemu+ssh://" + port() + "/system":                        "Connection refused",
		"qemu+tcp://" + port() + "/system":                        "connection refused",
		"qemu+tls://" + port() + "/system?pkipath=" + t.TempDir(): "connection refused",
	} {
		d := New(Config{Dirs: testDirs(t), URI: uri})
		err := d.Reach(t.Context())
		var absent *errAbsent
		if !errors.As(err, &absent) || !errors.Is(err, providers.ErrIncapable) || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), uri) {
			t.Errorf("%s: %v", uri, err)
		}
		// Where nothing of ours can be, it is nobody's trouble.
		if all, err := d.List(t.Context(), ""); err != nil || len(all) > 0 {
			t.Errorf("%s: List: %+v, %v", uri, all, err)
		}
	}
}

// What the account's shell does before libvirt is there is told from what libvirt does.
func TestRemoteShell(t *testing.T) {
	const try = `"ssh -T -p 2222 ada@far true"`
	for name, c := range map[string]struct {
		shell string // what ssh runs at the other end
		want  []string
	}{
		"prints":          {"echo; echo Welcome to far, where all is well.; exec cat >/dev/null", []string{`not libvirt's protocol: "Welcome to far, where all is well."`, try + " must work, ask nothing and print nothing"}},
		"prints and ends": {"echo Hi", []string{`not libvirt's protocol: "Hi"`, try}},
		"lacks":           {"echo sh: nc: not found >&2; exit 127", []string{"sh: nc: not found", "libvirt must be installed there"}},
	} {
		t.Run(name, func(t *testing.T) {
			r := overSSH(t, c.shell)
			r.p.link.hung = time.Minute
			err := r.Reach(t.Context())
			if err == nil {
				t.Fatal("there is a daemon")
			}
			for _, want := range c.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("got %v\nwant …%s…", err, want)
				}
			}
		})
	}
}

// Who asks next, or has waited as long, does not wait once more for who did not answer;
// later it is asked again.
func TestRemoteSilent(t *testing.T) {
	runs := filepath.Join(t.TempDir(), "runs")
	r := overSSH(t, "echo once >>"+runs+"; echo waiting for a lock >&2; exec sleep 600")
	k := r.p.link
	k.hung, k.rest = 500*time.Millisecond, time.Hour
	ran := func(want int) {
		t.Helper()
		if b, err := os.ReadFile(runs); err != nil || string(b) != strings.Repeat("once\n", want) {
			t.Errorf("ssh ran %q, %v; want %d times", b, err, want)
		}
	}
	asked := make(chan error)
	for range 3 {
		go func() { asked <- r.Networks(t.Context()) }()
	}
	for range 3 {
		err := <-asked
		for _, want := range []string{`does not answer (waited 1s; ssh printed "waiting for a lock")`, `If "ssh -T -p 2222 ada@far true" takes as long`} {
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("got %v\nwant …%s…", err, want)
			}
		}
	}
	ran(1)
	canceled, cancel := context.WithCancel(t.Context())
	cancel()
	if err := r.Networks(canceled); !errors.Is(err, context.Canceled) {
		t.Errorf("canceled: %v", err)
	}
	k.rest = 0
	if err := r.Networks(t.Context()); err == nil {
		t.Error("there is a daemon")
	}
	ran(2)
}

// overSSH returns the provider of a host where ssh runs shell.
func overSSH(t *testing.T, shell string) *Remote {
	bin := t.TempDir()
	if err := os.WriteFile(filepath.Join(bin, "ssh"), []byte("#!/bin/sh\n"+shell+"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", bin+":"+os.Getenv("PATH"))
	r := New(Config{Dirs: testDirs(t), URI: "qemu+ssh://ada@far:2222/system"}).(*Remote)
	t.Cleanup(r.Close)
	return r
}

// A pool that is not there takes nothing from a machine that runs, and gc does not remove
// what a domain names, however the path is written.
func TestRemotePool(t *testing.T) {
	t.Parallel()
	d := daemontest.StartRemote(t)
	odd := filepath.Join(d.Home, "r&d")
	if err := os.Mkdir(odd, 0o700); err != nil {
		t.Fatal(err)
	}
	d.Virsh("pool-define-as", "odd", "dir", "--target", strings.Replace(odd, "&", "&amp;", 1)) // virsh does not
	d.Virsh("pool-start", "odd")
	r := testRemote(t, "qemu+tcp://127.0.0.1:"+d.Port+"/session?pool=odd", d, testDirs(t))
	ctx := t.Context()
	spec := providers.Spec{Generation: webOne, Image: providertest.BootImage(t, false), CPUs: 1, Memory: 16 * lab.MiB, Agent: true}
	// What an interrupted upload left is neither used nor in the way.
	f, err := os.Open(spec.Image.Disk)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	digest, err := digestOf(f)
	if err != nil {
		t.Fatal(err)
	}
	files, err := r.pool(ctx)
	if err != nil {
		t.Fatal(err)
	}
	// Neither is an image that only its owner can read.
	private := imagePrefix + digest + "-0"
	for _, name := range []string{imagePrefix + digest + "-" + r.suffix(), private, private + imageWhole} {
		if err := files.make(ctx, rawVolume(name, 100)); err != nil {
			t.Fatal(err)
		}
	}
	if shared, err := files.shared(ctx, private); err != nil || shared {
		t.Errorf("an image of its owner's alone: %v, %v", shared, err)
	}
	if err := r.Create(ctx, spec); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{private, private + imageWhole} {
		if err := files.remove(ctx, name); err != nil {
			t.Fatal(err)
		}
	}
	images, err := filepath.Glob(filepath.Join(odd, imagePrefix+"*"))
	if err != nil || len(images) != 2 {
		t.Fatal(images, err)
	}
	for _, path := range images { // somebody removes them; they are sent again
		d.Virsh("vol-delete", filepath.Base(path), "--pool", "odd")
	}
	if err := r.Start(ctx, webOne); err != nil {
		t.Fatal(err)
	}
	if gone, err := r.Prune(ctx, false); err != nil || len(gone) > 0 {
		t.Errorf("pruned beside a machine: %+v, %v", gone, err)
	}
	d.Virsh("pool-destroy", "odd")
	if m, err := r.Inspect(ctx, webOne); err != nil || m.State != providers.StateRunning {
		t.Errorf("without its pool: %+v, %v", m, err)
	}
	d.Virsh("pool-start", "odd")
	if err := r.Stop(ctx, webOne, 0); err != nil {
		t.Error(err)
	}
	d.Virsh("vol-delete", r.prefix(webOne)+"disk.qcow2", "--pool", "odd")
	if m, err := r.Inspect(ctx, webOne); err != nil || m.State != providers.StateBroken || !strings.Contains(m.Reason, "is missing") {
		t.Errorf("without its disk: %+v, %v", m, err)
	}
	if err := r.Destroy(ctx, webOne); err != nil {
		t.Error(err)
	}
	if gone, err := r.Prune(ctx, false); err != nil || len(gone) != 1 {
		t.Errorf("pruned: %+v, %v", gone, err)
	}
	if left, err := os.ReadDir(odd); err != nil || len(left) > 0 {
		t.Errorf("left over: %v, %v", left, err)
	}
}

// conformRemote runs the conformance suite on a daemon whose pool is in a directory that
// is known by that name here.
func conformRemote(t *testing.T, daemon *daemontest.Daemon, uri, pool string) {
	providertest.Run(t, func(t *testing.T) providertest.Host {
		d := testDirs(t)
		r := testRemote(t, uri, daemon, d)
		domainOf := func(t *testing.T, g lab.Generation) golibvirt.Domain {
			dom, ok, err := r.p.find(t.Context(), g)
			if err != nil || !ok {
				t.Fatal(ok, err)
			}
			return dom.Domain
		}
		undefine := func(t *testing.T, g lab.Generation) {
			dom := domainOf(t, g)
			if err := r.p.link.do(t.Context(), func(l *golibvirt.Libvirt) error { return l.DomainUndefine(dom) }); err != nil {
				t.Fatal(err)
			}
		}
		pause := func(t *testing.T, m providers.Machine) {
			dom := domainOf(t, m.Generation)
			if err := r.p.link.do(t.Context(), func(l *golibvirt.Libvirt) error { return l.DomainSuspend(dom) }); err != nil {
				t.Fatal(err)
			}
		}
		return providertest.Host{
			Provider: r, Other: testRemote(t, uri, daemon, d),
			Image: providertest.BootImage(t, false), Deaf: providertest.BootImage(t, true), Memory: 16 * lab.MiB,
			Kill: func(t *testing.T, m providers.Machine) {
				if err := syscall.Kill(qemuOf(t, r, m.Generation), syscall.SIGKILL); err != nil {
					t.Fatal(err)
				}
			},
			Pause: pause,
			// That a QEMU of another host is stopped by a signal cannot be seen from here.
			Freeze: pause,
			Halve: func(t *testing.T, g lab.Generation) {
				undefine(t, g)
				if err := os.Truncate(filepath.Join(pool, r.overlays(g, nil).name(0)), 100); err != nil {
					t.Fatal(err)
				}
			},
			HalveDestroy: func(t *testing.T, g lab.Generation) {
				undefine(t, g)
				if err := local.Discard(r.p.dir(g)); err != nil {
					t.Fatal(err)
				}
			},
			ReadDisk: providertest.ReadDisk,
			Leftovers: func(t *testing.T) []string {
				left := slices.DeleteFunc(leftovers(t, d, daemon), func(path string) bool {
					return strings.HasSuffix(path, ".log") // libvirt's own, which is for its host to keep
				})
				entries, err := os.ReadDir(pool)
				if err != nil {
					t.Fatal(err)
				}
				for _, e := range entries {
					if !strings.HasPrefix(e.Name(), imagePrefix) {
						left = append(left, e.Name())
					}
				}
				return left
			},
		}
	})
}
