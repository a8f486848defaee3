// SPDX-License-Identifier: Apache-2.0

package libvirt

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/labfile/lab/internal/dirs"
	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/providers"
	"github.com/labfile/lab/providers/libvirt/daemontest"
	"github.com/labfile/lab/providers/local"
	"github.com/labfile/lab/providers/providertest"
)

var webOne = lab.Generation{Lab: "shop-00000001", Machine: "web", Number: 1}

// bench is a provider on a daemon of its own, and what tests do with them.
type bench struct {
	*testing.T
	daemon *daemontest.Daemon
	dirs   dirs.Dirs
	p      *Provider
}

func newBench(t *testing.T) *bench {
	t.Parallel()
	b := &bench{T: t, daemon: daemontest.Start(t), dirs: testDirs(t)}
	b.p = testProvider(t, b.daemon, b.dirs)
	return b
}

func (b *bench) ctx() context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	b.Cleanup(cancel)
	return ctx
}

func (b *bench) must(err error) {
	b.Helper()
	if err != nil {
		b.Fatal(err)
	}
}

func (b *bench) spec(g lab.Generation) providers.Spec {
	return providers.Spec{Generation: g, Image: providertest.BootImage(b.T, false), CPUs: 1, Memory: 16 * lab.MiB, MAC: "52:54:00:40:00:0a", Agent: true}
}

// up makes and boots web@1.
func (b *bench) up() {
	b.Helper()
	b.must(b.p.Create(b.ctx(), b.spec(webOne)))
	b.start()
}

func (b *bench) start() {
	b.Helper()
	b.must(b.p.Start(b.ctx(), webOne))
	b.console("", providertest.Banner)
}

// console types keys and waits until the console's log, from its present end (or,
// without keys, its beginning), shows want.
func (b *bench) console(keys, want string) {
	b.Helper()
	path := filepath.Join(b.dirs.Domain(webOne), local.FileConsole)
	before := 0
	if keys != "" {
		log, err := os.ReadFile(path)
		b.must(err)
		before = len(log)
		c, err := b.p.Console(b.ctx(), webOne)
		b.must(err)
		defer c.Close()
		_, err = io.WriteString(c, keys)
		b.must(err)
	}
	b.until(fmt.Sprintf("the console shows %q", want), func() bool {
		log, err := os.ReadFile(path)
		b.must(err)
		return bytes.Contains(log[before:], []byte(want))
	})
}

// until asks again and again until the answer is yes.
func (b *bench) until(what string, yes func() bool) {
	b.Helper()
	for deadline := time.Now().Add(time.Minute); !yes(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			b.Fatalf("not within a minute: %s", what)
		}
	}
}

func (b *bench) state(want providers.State, reason string) providers.Machine {
	b.Helper()
	m, err := b.p.Inspect(b.ctx(), webOne)
	b.must(err)
	if m.State != want || m.Reason != reason {
		b.Fatalf("web@1 is %s (%q), want %s (%q)", m.State, m.Reason, want, reason)
	}
	return m
}

func (b *bench) list() string {
	b.Helper()
	ms, err := b.p.List(b.ctx(), "")
	b.must(err)
	var all []string
	for _, m := range ms {
		all = append(all, fmt.Sprintf("%s/%s %s", m.Lab, m.Generation, m.State))
	}
	return strings.Join(all, ", ")
}

func (b *bench) wantList(want string) {
	b.Helper()
	if got := b.list(); got != want {
		b.Fatalf("List: %s; want %s", got, want)
	}
}

func (b *bench) destroyed() {
	b.Helper()
	b.must(b.p.Destroy(b.ctx(), webOne))
	b.wantList("")
	if left := leftovers(b.T, b.dirs, b.daemon); len(left) > 0 {
		b.Errorf("left over: %q", left)
	}
}

const one = "shop-00000001/web@1"

// What virsh changes behind our back is seen.
func TestBehindOurBack(t *testing.T) {
	b := newBench(t)
	b.up()
	name := domainName(webOne)

	b.daemon.Virsh("suspend", name)
	b.state(providers.StatePaused, "")
	b.must(b.p.Start(b.ctx(), webOne))
	b.state(providers.StateRunning, "")

	exit := make(chan providers.Exit, 1)
	go func() {
		e, err := b.p.Wait(b.ctx(), webOne)
		if err != nil {
			t.Errorf("Wait: %v", err)
		}
		exit <- e
	}()
	b.daemon.Virsh("destroy", name)
	if e := <-exit; e.Reason != providers.ExitSignaled || e.Detail != "host-signal" {
		t.Errorf("destroyed by virsh: %+v", e)
	}
	b.state(providers.StateStopped, "")

	// Started by virsh, it finds its disk whole.
	b.start()
	for range 2 {
		b.console(providertest.KeyWrite, providertest.KeyWrite)
	}
	b.must(b.p.Freeze(b.ctx(), webOne))
	b.console(providertest.KeyWrite, providertest.KeyWrite)
	b.daemon.Virsh("destroy", name)
	b.daemon.Virsh("start", name)
	b.state(providers.StateRunning, "")
	b.console("z", "z")
	disk, err := b.p.OpenDisk(b.ctx(), webOne)
	b.must(err)
	if got := bytes.Count(providertest.ReadDisk(t, disk.Layers), []byte(providertest.Banner)); got != 4 { // the boot sector has it, too
		t.Errorf("the disk has %d sectors with the banner", got)
	}
	b.must(disk.Release(b.ctx()))
	b.destroyed()
}

// Renamed, it is the same machine, and stays renamed.
func TestRenamed(t *testing.T) {
	b := newBench(t)
	b.up()
	b.must(b.p.Stop(b.ctx(), webOne, time.Minute))
	b.daemon.Virsh("domrename", domainName(webOne), "jane")
	b.wantList(one + " stopped")
	b.start()
	b.state(providers.StateRunning, "")
	if got := b.daemon.Virsh("domstate", "jane"); got != "running" {
		t.Errorf("jane is %s", got)
	}
	b.destroyed()
}

// Undefined, it runs on; once it has ended, nothing but its directory is left.
func TestUndefined(t *testing.T) {
	b := newBench(t)
	b.up()
	b.daemon.Virsh("undefine", domainName(webOne))
	b.state(providers.StateRunning, "")
	b.must(b.p.Stop(b.ctx(), webOne, time.Minute))
	b.state(providers.StateBroken, "it has no domain: its creation was interrupted, or the domain was undefined")
	b.wantList(one + " broken")
	if err := b.p.Start(b.ctx(), webOne); !errors.Is(err, providers.ErrNotFound) {
		t.Errorf("Start of what was undefined: %v", err)
	}
	b.daemon.Virsh("define", b.foreign("jane", ""))
	b.destroyedBeside("jane")
}

// foreign writes a document of a domain that is not lab's.
func (b *bench) foreign(name, uuid string) string {
	b.Helper()
	if uuid != "" {
		uuid = "<uuid>" + uuid + "</uuid>"
	}
	path := filepath.Join(b.TempDir(), name+".xml")
	b.must(os.WriteFile(path, []byte(`<domain type="qemu"><name>`+name+`</name>`+uuid+
		`<memory>16384</memory><os><type arch="x86_64" machine="q35">hvm</type></os></domain>`), 0o600))
	return path
}

// destroyedBeside is destroyed while there is a foreign domain, which stays.
func (b *bench) destroyedBeside(foreign string) {
	b.Helper()
	b.must(b.p.Destroy(b.ctx(), webOne))
	b.wantList("")
	if got := b.daemon.Virsh("list", "--all", "--name"); got != foreign {
		b.Errorf("after Destroy there is %q", got)
	}
	b.daemon.Virsh("undefine", foreign)
	if left := leftovers(b.T, b.dirs, b.daemon); len(left) > 0 {
		b.Errorf("left over: %q", left)
	}
}

// A domain that only looks like one of lab's is nobody's business.
func TestForeignDomains(t *testing.T) {
	b := newBench(t)
	for what, uuid := range map[string]string{"name": "", "name and UUID": formatUUID(uuidOf(b.dirs.Domain(webOne)))} {
		name := domainName(webOne)
		b.daemon.Virsh("define", b.foreign(name, uuid))
		b.wantList("")
		if _, err := b.p.Inspect(b.ctx(), webOne); !errors.Is(err, providers.ErrNotFound) {
			t.Errorf("%s: Inspect: %v", what, err)
		}
		if uuid == "" {
			err := b.p.Create(b.ctx(), b.spec(webOne))
			if err == nil || !strings.Contains(err.Error(), "that lab did not make is left alone") {
				t.Errorf("%s: Create: %v", what, err)
			}
		}
		b.must(b.p.Stop(b.ctx(), webOne, 0))
		b.destroyedBeside(name)
	}
}

// Two data homes may have labs of one name on one daemon.
func TestTwoDataHomes(t *testing.T) {
	b := newBench(t)
	b.must(b.p.Create(b.ctx(), b.spec(webOne)))
	other := testProvider(t, b.daemon, testDirs(t))
	if ms, err := other.List(b.ctx(), ""); err != nil || len(ms) != 0 {
		t.Errorf("List: %v, %v", ms, err)
	}
	b.must(other.Destroy(b.ctx(), webOne))
	b.wantList(one + " stopped")
	b.destroyed()
}

// Whatever becomes of the directory, libvirt knows the machine.
func TestDirectoryLost(t *testing.T) {
	b := newBench(t)
	b.up()
	b.must(os.RemoveAll(b.dirs.Labs()))
	b.wantList(one + " broken")
	b.state(providers.StateBroken, "its directory is gone: "+b.dirs.Domain(webOne))
	b.destroyed()
}

// A daemon that is killed takes no machine with it and leaves nothing unknown.
func TestDaemonKilled(t *testing.T) {
	b := newBench(t)
	b.up()
	pid := b.state(providers.StateRunning, "").PID
	exit := make(chan providers.Exit, 1)
	go func() {
		e, err := b.p.Wait(b.ctx(), webOne)
		if err != nil {
			t.Errorf("Wait: %v", err)
		}
		exit <- e
	}()
	b.daemon.Signal(syscall.SIGKILL)
	wantAbsent := func() {
		b.Helper()
		var err error
		b.until("the loss is noticed", func() bool {
			_, err = b.p.Inspect(b.ctx(), webOne)
			return errors.Is(err, providers.ErrIncapable)
		})
		want := "libvirt does not listen at " + b.daemon.Socket + ": connection refused; start "
		if !strings.Contains(err.Error(), want) {
			t.Errorf("got %v\nwant …%s…", err, want)
		}
	}
	wantAbsent()
	b.daemon.Start()
	if got := b.state(providers.StateRunning, ""); got.PID != pid {
		t.Errorf("pid %d, before %d", got.PID, pid)
	}
	b.console("z", "z")

	// The machine ends while nobody is there to see it.
	b.daemon.Signal(syscall.SIGKILL)
	wantAbsent()
	b.must(syscall.Kill(pid, syscall.SIGTERM))
	if e := <-exit; e.Reason != providers.ExitSignaled || e.Detail != "host-signal" {
		t.Errorf("the exit: %+v", e)
	}
	b.daemon.Start()
	if m := b.state(providers.StateStopped, ""); m.Exit.Reason != providers.ExitSignaled {
		t.Errorf("the exit: %+v", m.Exit)
	}
	b.destroyed()
}

// A deaf daemon costs seconds, not for ever.
func TestDaemonDeaf(t *testing.T) {
	b := newBench(t)
	b.up()
	b.p.link.quiet, b.p.link.hung = 100*time.Millisecond, time.Second
	ctx, cancel := context.WithCancel(b.ctx())
	waited := make(chan error, 1)
	go func() {
		_, err := b.p.Wait(ctx, webOne)
		waited <- err
	}()
	b.daemon.Signal(syscall.SIGSTOP)
	deaf := func(p *Provider, limit string) {
		b.Helper()
		for doing, do := range map[string]func() error{
			"Inspect": func() error { _, err := p.Inspect(b.ctx(), webOne); return err },
			"List":    func() error { _, err := p.List(b.ctx(), ""); return err },
			"Stop":    func() error { return p.Stop(b.ctx(), webOne, time.Minute) },
			"Destroy": func() error { return p.Destroy(b.ctx(), webOne) },
		} {
			err := do()
			want := "libvirt at " + b.daemon.Socket + " does not answer (waited " + limit + "); its machines go on"
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("%s: got %v\nwant …%s…", doing, err, want)
			}
		}
	}
	deaf(b.p, "1s")
	fresh := testProvider(t, b.daemon, b.dirs) // as a new command finds it
	fresh.link.hung = time.Second
	deaf(fresh, "1s")
	b.daemon.Signal(syscall.SIGCONT)
	b.until("it answers again", func() bool { _, err := b.p.Inspect(b.ctx(), webOne); return err == nil })
	b.state(providers.StateRunning, "")
	select {
	case err := <-waited:
		t.Fatalf("Wait gave up: %v", err)
	default:
	}
	cancel()
	if err := <-waited; !errors.Is(err, context.Canceled) {
		t.Errorf("Wait: %v", err)
	}
	b.destroyed()
}

// A question that was under way when the daemon died is an error; the next one, put
// to a new daemon, is answered.
func TestLost(t *testing.T) {
	b := newBench(t)
	b.up()
	b.daemon.Signal(syscall.SIGSTOP)
	asked := make(chan error, 1)
	go func() { asked <- b.p.kill(b.ctx(), domain{}) }()
	b.daemon.Signal(syscall.SIGKILL)
	err := <-asked
	var lost *errLost
	var absent *errAbsent
	if !errors.As(err, &lost) && !errors.As(err, &absent) {
		t.Errorf("got %v", err)
	}
	b.daemon.Start()
	b.state(providers.StateRunning, "")
	b.destroyed()
}

func TestCheck(t *testing.T) {
	b := newBench(t)
	found, err := b.p.Check(b.ctx())
	b.must(err)
	text := fmt.Sprint(found)
	for _, want := range []string{"{uri ok qemu:///session?socket=", "{daemon ok libvirt ", " at " + b.daemon.Socket, "{emulator ok libvirt offers ", "{acceleration warning tcg"} {
		if !strings.Contains(text, want) {
			t.Errorf("the findings lack %q: %s", want, text)
		}
	}
	b.daemon.Signal(syscall.SIGKILL)
	b.until("the loss is noticed", func() bool {
		found, err = b.p.Check(b.ctx())
		b.must(err)
		// The first to ask may find out that the connection it had is gone.
		return strings.HasPrefix(found[1].Detail, "nothing listens at ")
	})
	if want := "nothing listens at " + b.daemon.Socket + ": connection refused"; found[1].Detail != want || found[1].Cure == "" {
		t.Errorf("%+v, want %s", found[1], want)
	}
	found, err = New(Config{Dirs: b.dirs, URI: "xen:///"}).Check(b.ctx())
	b.must(err)
	if found[0].Level != providers.LevelError || found[0].Topic != "uri" {
		t.Errorf("%+v", found[0])
	}
}

// Nothing is asked of a host that has no libvirt and never had a domain.
func TestListWithoutLibvirt(t *testing.T) {
	p := New(Config{Dirs: testDirs(t), URI: "qemu:///session?socket=/nonexistent/libvirt-sock"})
	if ms, err := p.List(t.Context(), ""); err != nil || len(ms) != 0 {
		t.Errorf("List: %v, %v", ms, err)
	}
	err := p.Destroy(t.Context(), webOne)
	if !errors.Is(err, providers.ErrIncapable) {
		t.Errorf("Destroy: %v", err)
	}
	if err := p.Reach(t.Context()); !errors.Is(err, providers.ErrIncapable) {
		t.Errorf("Reach: %v", err)
	}
}

// A machine's files end with it, and so do the connections of this process.
func TestAt(t *testing.T) {
	p := New(Config{Dirs: testDirs(t), URI: "qemu:///session"})
	other, err := p.At("qemu:///session?socket=/a")
	if err != nil {
		t.Fatal(err)
	}
	again, err := other.(providers.Addressed).At("qemu:///session?socket=/a")
	if err != nil || again != other {
		t.Errorf("two providers for one daemon: %v", err)
	}
	if back, err := other.(providers.Addressed).At(p.URI()); err != nil || back != providers.Provider(p) {
		t.Errorf("two providers for one daemon: %v", err)
	}
	if _, err := p.At("session"); err == nil {
		t.Error("a URI that is none is taken")
	}
}

// The directories of several daemons' machines lie side by side. Nobody takes another's for
// a machine that has lost its domain.
func TestDaemonsSideBySide(t *testing.T) {
	b := newBench(t)
	d := daemontest.StartRemote(t)
	far := testRemote(t, "qemu+tcp://127.0.0.1:"+d.Port+"/session", d, b.dirs)
	spec := b.spec(webOne)
	b.must(far.Create(b.ctx(), spec))
	for _, p := range []interface {
		providers.Provider
		providers.Addressed
	}{b.p, far} {
		if uris, err := p.Daemons(webOne.Lab); err != nil || !slices.Equal(uris, []string{far.URI()}) {
			t.Errorf("the daemons are %q, %v", uris, err)
		}
	}
	if all, err := b.p.List(b.ctx(), webOne.Lab); err != nil || len(all) > 0 {
		t.Errorf("List: %+v, %v", all, err)
	}
	if _, err := b.p.Inspect(b.ctx(), webOne); !errors.Is(err, providers.ErrNotFound) {
		t.Errorf("Inspect: %v", err)
	}
	b.must(b.p.Destroy(b.ctx(), webOne)) // of its own there is none
	if m, err := far.Inspect(b.ctx(), webOne); err != nil || m.State != providers.StateStopped {
		t.Errorf("Inspect: %+v, %v", m, err)
	}
	// What an older lab made names no daemon, until it is started.
	b.must(os.Remove(filepath.Join(b.p.dir(webOne), fileDaemon)))
	b.must(far.Start(b.ctx(), webOne))
	if uris, err := b.p.Daemons(webOne.Lab); err != nil || !slices.Equal(uris, []string{far.URI()}) {
		t.Errorf("the daemons are %q, %v", uris, err)
	}
	b.must(far.Stop(b.ctx(), webOne, 0))
	// One that has lost its domain is its daemon's to destroy.
	d.Virsh("undefine", domainName(webOne))
	if m, err := far.Inspect(b.ctx(), webOne); err != nil || m.State != providers.StateBroken {
		t.Errorf("Inspect: %+v, %v", m, err)
	}
	b.must(b.p.Destroy(b.ctx(), webOne))
	if !exists(b.p.dir(webOne)) {
		t.Error("another daemon's directory was removed")
	}
	b.must(far.Destroy(b.ctx(), webOne))
	if exists(b.p.dir(webOne)) {
		t.Error("the directory is left")
	}
}

// virsh console works beside lab: one of the two has the console at a time.
func TestVirshConsole(t *testing.T) {
	b := newBench(t)
	b.up()
	console := func() (*exec.Cmd, io.WriteCloser, *tail) {
		// script(1) makes the terminal that virsh insists on.
		cmd := exec.CommandContext(b.ctx(), "script", "-qfec", "virsh -c 'qemu+unix:///session?socket="+b.daemon.Socket+"' console "+domainName(webOne), "/dev/null")
		cmd.Env = append(os.Environ(), b.daemon.Env()...)
		in, err := cmd.StdinPipe()
		b.must(err)
		out := &tail{}
		cmd.Stdout, cmd.Stderr = out, out
		b.must(cmd.Start())
		return cmd, in, out
	}
	says := func(out *tail, want string) {
		t.Helper()
		for !strings.Contains(out.String(), want) {
			if err := pause(b.ctx(), time.Millisecond*10); err != nil {
				t.Fatalf("virsh console says %q, not %q: %v", out, want, err)
			}
		}
	}
	cmd, in, out := console()
	says(out, "Escape character")
	io.WriteString(in, "z")
	says(out, "z")
	if _, err := b.p.Console(b.ctx(), webOne); err == nil || !strings.Contains(err.Error(), "Active console session exists") {
		t.Errorf("beside virsh: %v", err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	b.until("virsh is left", func() bool {
		io.WriteString(in, "\x1d") // its escape character; it throws away what comes before it is ready
		select {
		case err := <-ended:
			b.must(err)
			return true
		case <-time.After(100 * time.Millisecond): // script ends in a pause only
			return false
		}
	})
	c, err := b.p.Console(b.ctx(), webOne)
	b.must(err)
	cmd, _, out = console()
	says(out, "Active console session exists")
	cmd.Wait() // virsh fails
	b.must(c.Close())
	b.destroyed()
}
