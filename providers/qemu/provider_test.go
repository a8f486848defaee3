// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/labfile/lab/internal/dirs"
	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/providers"
	"github.com/labfile/lab/providers/local"
	"github.com/labfile/lab/providers/providertest"
	"github.com/labfile/lab/providers/qcow2"
	"github.com/labfile/lab/providers/qmp"
)

var webOne = lab.Generation{Lab: "shop-1f3a9c2b", Machine: "web", Number: 1}

func testSpec(t *testing.T) providers.Spec {
	return providers.Spec{Generation: webOne, Image: providertest.BootImage(t, false), CPUs: 1, Memory: 16 * lab.MiB}
}

// testProvider returns a provider whose machines go with the test.
func testProvider(t *testing.T) (*Provider, dirs.Dirs) {
	t.Helper()
	d := testDirs(t)
	p := New(Config{Dirs: d, Accel: "tcg"})
	t.Cleanup(func() {
		ms, err := p.List(context.Background(), "")
		if err != nil {
			t.Error(err)
		}
		for _, m := range ms {
			if err := p.Destroy(context.Background(), m.Generation); err != nil {
				t.Error(err)
			}
		}
		if left := leftovers(t, d); len(left) > 0 {
			t.Errorf("left over: %q", left)
		}
	})
	return p, d
}

func must(t *testing.T, errs ...error) {
	t.Helper()
	for _, err := range errs {
		if err != nil {
			t.Fatal(err)
		}
	}
}

func pidOf(t *testing.T, p *Provider) int {
	t.Helper()
	m, err := p.Inspect(testContext(t), webOne)
	must(t, err)
	if m.PID == 0 {
		t.Fatalf("%v does not run: %+v", webOne, m)
	}
	return m.PID
}

func TestStartReportsWhatQEMUSaid(t *testing.T) {
	p, d := testProvider(t)
	ctx := testContext(t)
	must(t, p.Create(ctx, testSpec(t)))
	overlay := filepath.Join(d.Generation(webOne), local.FileOverlay)
	must(t, os.WriteFile(overlay, []byte("no qcow2 at all"), 0o600))
	err := p.Start(ctx, webOne)
	if err == nil {
		t.Fatal("a machine with a damaged disk started")
	}
	for _, want := range []string{
		`starting machine "web@1": QEMU ended at once`, "Image is not in qcow2 format", "command: /", "-nodefaults",
	} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("the error lacks %q: %v", want, err)
		}
	}
	m, err := p.Inspect(ctx, webOne)
	must(t, err)
	if m.State != providers.StateStopped || m.Exit != (providers.Exit{}) {
		t.Errorf("after a failed start: %+v", m)
	}
	// Its log says the same.
	r, err := p.OpenLog(ctx, webOne, providers.LogHypervisor)
	must(t, err)
	defer r.Close()
	if text, err := io.ReadAll(r); err != nil || !strings.Contains(string(text), "Image is not in qcow2 format") {
		t.Errorf("the log: %q, %v", text, err)
	}
	// And it can be mended and started.
	must(t, qcow2.Create(overlay, lab.MiB), p.Start(ctx, webOne))
}

func TestStartWithoutQEMU(t *testing.T) {
	p, d := testProvider(t)
	ctx := testContext(t)
	must(t, p.Create(ctx, testSpec(t)))
	err := New(Config{Dirs: d, Accel: "tcg", Binary: "qemu-none"}).Start(ctx, webOne)
	want := `starting machine "web@1": host not capable: qemu-none not found (` + installCure() + `)`
	if !errors.Is(err, providers.ErrIncapable) || err.Error() != want {
		t.Errorf("got %v\nwant %s", err, want)
	}
}

func TestStartWithOldQEMU(t *testing.T) {
	p, d := testProvider(t)
	ctx := testContext(t)
	must(t, p.Create(ctx, testSpec(t)))
	old := filepath.Join(t.TempDir(), "qemu-5")
	must(t, os.WriteFile(old, []byte(`#!/bin/sh
if [ "$1" = --version ]; then echo "QEMU emulator version 5.2.0 (Debian 1:5.2+dfsg-11)"; exit; fi
echo "qemu: -netdev: unknown" >&2
exit 1
`), 0o700))
	err := New(Config{Dirs: d, Accel: "tcg", Binary: old}).Start(ctx, webOne)
	if !errors.Is(err, providers.ErrIncapable) ||
		!strings.Contains(err.Error(), "QEMU 5.2.0 is too old, 7.2 is needed\nqemu: -netdev: unknown\ncommand: ") {
		t.Errorf("got %v", err)
	}
}

func TestStartGivesUpWithItsContext(t *testing.T) {
	p, d := testProvider(t)
	must(t, p.Create(testContext(t), testSpec(t)))
	mute := filepath.Join(t.TempDir(), "qemu-mute")
	must(t, os.WriteFile(mute, []byte("#!/bin/sh\nexec sleep 600\n"), 0o700))
	ctx, cancel := context.WithTimeout(context.Background(), 300*time.Millisecond)
	defer cancel()
	began := time.Now()
	err := New(Config{Dirs: d, Accel: "tcg", Binary: mute}).Start(ctx, webOne)
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Start: %v", err)
	}
	if took := time.Since(began); took > 10*time.Second {
		t.Errorf("Start took %s", took)
	}
	must(t, p.Start(testContext(t), webOne)) // nothing of it is in the way
}

func TestCrashIsTold(t *testing.T) {
	p, _ := testProvider(t)
	ctx := testContext(t)
	must(t, p.Create(ctx, testSpec(t)), p.Start(ctx, webOne))
	must(t, syscall.Kill(pidOf(t, p), syscall.SIGSEGV))
	e, err := p.Wait(ctx, webOne)
	must(t, err)
	if e.Reason != providers.ExitCrashed || e.Detail != "SIGSEGV" {
		t.Errorf("Wait: %+v", e)
	}
	m, err := p.Inspect(ctx, webOne)
	must(t, err)
	if m.Exit.Reason != e.Reason || m.Exit.Detail != e.Detail {
		t.Errorf("Inspect: %+v, Wait told %+v", m.Exit, e)
	}
}

func TestSIGTERMIsTold(t *testing.T) {
	p, _ := testProvider(t)
	ctx := testContext(t)
	must(t, p.Create(ctx, testSpec(t)), p.Start(ctx, webOne))
	must(t, syscall.Kill(pidOf(t, p), syscall.SIGTERM))
	if e, err := p.Wait(ctx, webOne); err != nil || e.Reason != providers.ExitSignaled || e.Detail != "host-signal" {
		t.Errorf("Wait: %+v, %v", e, err)
	}
}

func TestPausedByMonitor(t *testing.T) {
	p, d := testProvider(t)
	ctx := testContext(t)
	must(t, p.Create(ctx, testSpec(t)), p.Start(ctx, webOne))
	for _, c := range []struct {
		command string
		want    providers.State
	}{{"stop", providers.StatePaused}, {"cont", providers.StateRunning}} {
		must(t, command(ctx, d.Socket(webOne, socketMonitor), c.command))
		m, err := p.Inspect(ctx, webOne)
		must(t, err)
		if m.State != c.want {
			t.Errorf("after %s: %s", c.command, m.State)
		}
	}
}

// filesOf returns what a process has open, by descriptor.
func filesOf(t *testing.T, pid int) map[string]string {
	t.Helper()
	dir := "/proc/" + strconv.Itoa(pid) + "/fd"
	entries, err := os.ReadDir(dir)
	must(t, err)
	open := map[string]string{}
	for _, e := range entries {
		if target, err := os.Readlink(filepath.Join(dir, e.Name())); err == nil {
			open[e.Name()] = target
		}
	}
	return open
}

// The starter of a machine is killed; the machine must not mind, and others must
// be able to watch it and to end it.
func TestMachineOutlivesItsStarter(t *testing.T) {
	if os.Getenv("LAB_TEST_STARTER") != "" {
		p := New(Config{Accel: "tcg", Dirs: dirs.Dirs{
			Data: os.Getenv("LAB_TEST_DATA"), Run: os.Getenv("LAB_TEST_RUN"), Cache: os.Getenv("LAB_TEST_CACHE"),
		}})
		must(t, p.Start(context.Background(), webOne))
		must(t, syscall.Kill(os.Getpid(), syscall.SIGKILL))
		select {}
	}
	p, d := testProvider(t)
	ctx := testContext(t)
	must(t, p.Create(ctx, testSpec(t)))
	starter := exec.Command(os.Args[0], "-test.run=^TestMachineOutlivesItsStarter$")
	starter.Env = append(os.Environ(), "LAB_TEST_STARTER=1",
		"LAB_TEST_DATA="+d.Data, "LAB_TEST_RUN="+d.Run, "LAB_TEST_CACHE="+d.Cache)
	// Like a shell's script, it has inherited a file that is none of QEMU's business.
	stray, err := os.Create(filepath.Join(t.TempDir(), "stray"))
	must(t, err)
	defer stray.Close()
	starter.ExtraFiles = []*os.File{stray, stray, stray, stray}
	// Files, because whoever inherits a pipe keeps this test waiting.
	printed, err := os.Create(filepath.Join(t.TempDir(), "printed"))
	must(t, err)
	defer printed.Close()
	starter.Stdout, starter.Stderr = printed, printed
	if err := starter.Run(); err == nil || err.Error() != "signal: killed" {
		out, _ := os.ReadFile(printed.Name())
		t.Fatalf("the starter: %v\n%s", err, out)
	}
	pid := pidOf(t, p)
	for name, target := range filesOf(t, pid) {
		if target == stray.Name() || target == printed.Name() {
			t.Errorf("QEMU inherited %s as %s", target, name)
		}
	}
	if sid, err := unix.Getsid(pid); err != nil || sid != pid {
		t.Errorf("QEMU's session is %d, its pid %d (%v)", sid, pid, err)
	}
	waited := make(chan providers.Exit, 1)
	go func() {
		e, err := p.Wait(ctx, webOne)
		if err != nil {
			t.Error(err)
		}
		waited <- e
	}()
	c, err := p.Console(ctx, webOne)
	must(t, err)
	_, err = io.WriteString(c, providertest.KeyOff)
	must(t, err, c.Close())
	if e := <-waited; e.Reason != providers.ExitGuest {
		t.Errorf("Wait: %+v", e)
	}
}

// A base image whose header names a backing file: whatever let it in, QEMU must
// not open that file.
func TestBackingFileOfABaseIsNotBelieved(t *testing.T) {
	p, _ := testProvider(t)
	ctx := testContext(t)
	tmp := t.TempDir()
	secret, base := filepath.Join(tmp, "secret"), filepath.Join(tmp, "base.qcow2")
	must(t, os.WriteFile(secret, providertest.BootDisk(false), 0o600))
	if out, err := exec.Command("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", secret, base).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	spec := testSpec(t)
	spec.Image.Disk, spec.Image.Format = base, "qcow2"
	must(t, p.Create(ctx, spec), p.Start(ctx, webOne))
	seen := false
	for _, target := range filesOf(t, pidOf(t, p)) {
		if target == secret {
			t.Error("QEMU opened the file that the base's header names")
		}
		seen = seen || target == base
	}
	if !seen {
		t.Error("QEMU did not open the base")
	}
}

func TestTrimLogs(t *testing.T) {
	p, d := testProvider(t)
	ctx := testContext(t)
	must(t, p.Create(ctx, testSpec(t)), p.Start(ctx, webOne))
	r, err := p.OpenLog(ctx, webOne, providers.LogConsole)
	must(t, err)
	defer r.Close()
	c, err := p.Console(ctx, webOne)
	must(t, err)
	defer c.Close()
	read := "" // the reader is kept open all the time
	await := func(suffix string) {
		t.Helper()
		for deadline := time.Now().Add(30 * time.Second); !strings.HasSuffix(read, suffix); time.Sleep(5 * time.Millisecond) {
			text, err := io.ReadAll(r)
			must(t, err)
			if read += string(text); time.Now().After(deadline) {
				t.Fatalf("the log ends with %q, want %q", read, suffix)
			}
		}
	}
	await(providertest.Banner + "\r\n")
	_, err = io.WriteString(c, "0123456789")
	must(t, err)
	await("0123456789")
	must(t, p.TrimLogs(ctx, webOne, 20))
	file := filepath.Join(d.Generation(webOne), local.FileConsole)
	if got, err := os.ReadFile(file); err != nil || string(got) != "0123456789" {
		t.Fatalf("the trimmed log: %q, %v", got, err)
	}
	_, err = io.WriteString(c, "abc")
	must(t, err)
	await("abc")
	if got, err := os.ReadFile(file); err != nil || string(got) != "0123456789abc" {
		t.Errorf("the log after trimming: %q, %v", got, err)
	}
	err = p.TrimLogs(ctx, lab.Generation{Lab: "shop-1f3a9c2b", Machine: "db", Number: 1}, 20)
	if !errors.Is(err, providers.ErrNotFound) {
		t.Errorf("TrimLogs of what is absent: %v", err)
	}
}

// Stale pid files and sockets, as a host's crash leaves them, are in nobody's way.
func TestStaleFiles(t *testing.T) {
	p, d := testProvider(t)
	ctx := testContext(t)
	must(t, p.Create(ctx, testSpec(t)))
	dir := d.Generation(webOne)
	must(t, os.WriteFile(filepath.Join(dir, local.FilePID), []byte(strconv.Itoa(os.Getpid())+"\n"), 0o600))
	must(t, os.MkdirAll(d.RunLab(webOne.Lab), 0o700))
	for _, kind := range []string{socketMonitor, socketConsole, socketNIC, socketAgent} {
		must(t, os.WriteFile(d.Socket(webOne, kind), nil, 0o600))
	}
	m, err := p.Inspect(ctx, webOne)
	must(t, err)
	if m.State != providers.StateStopped {
		t.Errorf("with stale files: %+v", m)
	}
	must(t, p.Start(ctx, webOne))
}

// A process that has the lock of a running machine but never becomes one is
// named, and not waited for without end.
func TestNeitherUpNorDown(t *testing.T) {
	p, d := testProvider(t)
	ctx := testContext(t)
	must(t, p.Create(ctx, testSpec(t)))
	path := filepath.Join(d.Generation(webOne), local.FileAlive)
	held, ok, err := local.TryLock(path)
	if err != nil || !ok {
		t.Fatal(ok, err)
	}
	defer held.Close()
	patience := p.patience
	p.patience = 20 * time.Millisecond
	why := fmt.Sprintf("the machine has been neither up nor down for 20ms: %s is held by process %d (end it if it is a QEMU that hangs)", path, os.Getpid())
	if err := p.Start(ctx, webOne); err == nil || err.Error() != fmt.Sprintf("starting machine %q: %s", webOne, why) {
		t.Errorf("Start: %v", err)
	}
	if err := p.Stop(ctx, webOne, 0); err == nil || err.Error() != fmt.Sprintf("stopping machine %q: %s", webOne, why) {
		t.Errorf("Stop: %v", err)
	}
	p.patience = patience
}

// A command that looks at the machine for a moment does not keep the sockets of a
// dead QEMU from being removed.
func TestStopWaitsForTheLock(t *testing.T) {
	p, d := testProvider(t)
	ctx := testContext(t)
	must(t, p.Create(ctx, testSpec(t)), os.MkdirAll(d.RunLab(webOne.Lab), 0o700))
	socket := d.Socket(webOne, socketMonitor)
	must(t, os.WriteFile(socket, nil, 0o600))
	held, ok, err := local.TryLock(filepath.Join(d.Generation(webOne), local.FileLock))
	if err != nil || !ok {
		t.Fatal(ok, err)
	}
	time.AfterFunc(50*time.Millisecond, func() { held.Close() })
	must(t, p.Stop(ctx, webOne, 0))
	if _, err := os.Stat(socket); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket: %v", err)
	}
}

func TestFilesAreThePrivateKind(t *testing.T) {
	p, d := testProvider(t)
	ctx := testContext(t)
	spec := testSpec(t)
	spec.Seed = make([]byte, 4096)
	must(t, p.Create(ctx, spec), p.Start(ctx, webOne))
	dir := d.Generation(webOne)
	entries, err := os.ReadDir(dir)
	must(t, err)
	for _, e := range entries {
		fi, err := e.Info()
		must(t, err)
		if fi.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s has mode %v", e.Name(), fi.Mode())
		}
	}
	for _, path := range []string{dir, filepath.Dir(dir), d.Lab(webOne.Lab), d.RunLab(webOne.Lab)} {
		fi, err := os.Stat(path)
		must(t, err)
		if fi.Mode().Perm() != 0o700 {
			t.Errorf("%s has mode %v", path, fi.Mode())
		}
	}
}

func TestMonitorOfALiveQEMU(t *testing.T) {
	p, d := testProvider(t)
	ctx := testContext(t)
	must(t, p.Create(ctx, testSpec(t)), p.Start(ctx, webOne))
	c, err := qmp.Dial(ctx, d.Socket(webOne, socketMonitor))
	must(t, err)
	defer c.Close()
	if !c.Version().AtLeast(minMajor, minMinor) {
		t.Errorf("version %s", c.Version())
	}
	var fds []struct {
		Name string `json:"name"`
	}
	var status struct {
		Status string `json:"status"`
	}
	must(t, c.Execute(ctx, "query-status", nil, &status))
	if status.Status != "running" {
		t.Errorf("status %q", status.Status)
	}
	f, err := os.Create(filepath.Join(t.TempDir(), "state"))
	must(t, err)
	defer f.Close()
	must(t, c.SendFile(ctx, "state", f), c.Execute(ctx, "closefd", map[string]string{"fdname": "state"}, nil))
	err = c.Execute(ctx, "closefd", map[string]string{"fdname": "state"}, &fds)
	var refused *qmp.Error
	if !errors.As(err, &refused) || refused.Class != "GenericError" ||
		err.Error() != "monitor command closefd: File descriptor named 'state' not found" {
		t.Errorf("closing twice: %v", err)
	}
	must(t, c.Execute(ctx, "stop", nil, nil))
	if e := <-c.Events(); e.Name != "STOP" || time.Since(e.At).Abs() > time.Minute {
		t.Errorf("event %+v", e)
	}
	must(t, c.Execute(ctx, "quit", nil, nil))
	<-c.Done()
	if err := c.Execute(ctx, "query-status", nil, nil); !errors.Is(err, qmp.ErrClosed) {
		t.Errorf("a command after the end: %v", err)
	}
}

func TestAccelWithoutQEMU(t *testing.T) {
	_, err := New(Config{Binary: "qemu-none"}).binary()
	if !errors.Is(err, providers.ErrIncapable) {
		t.Errorf("without QEMU: %v", err)
	}
	var notFound *exec.Error
	if errors.As(err, &notFound) {
		t.Errorf("the error speaks of exec: %v", err)
	}
}
