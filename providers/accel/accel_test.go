// SPDX-License-Identifier: Apache-2.0

package accel

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/labfile/lab/providers/providertest"
)

func qemuBinary(t *testing.T) string {
	t.Helper()
	path, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		t.Fatal(err)
	}
	return path
}

func testContext(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

// Emulation runs everything, so the probe must say so of it.
func TestProbeFirmware(t *testing.T) {
	tmp := t.TempDir()
	usable, reason, err := probe(testContext(t), qemuBinary(t), []string{"-accel", "tcg"}, "", tmp)
	if err != nil || !usable || reason != "guest code ran" {
		t.Fatalf("probe: %v, %q, %v", usable, reason, err)
	}
	if left, err := os.ReadDir(tmp); err != nil || len(left) != 0 {
		t.Errorf("the probe left %v, %v", left, err)
	}
}

func TestProbeRefused(t *testing.T) {
	usable, reason, err := probe(testContext(t), qemuBinary(t), []string{"-accel", "tcg", "-cpu", "pentium99"}, "", t.TempDir())
	if err != nil || usable || !strings.Contains(reason, "pentium99") {
		t.Fatalf("probe: %v, %q, %v", usable, reason, err)
	}
}

func TestProbeCanceled(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, _, err := probe(ctx, qemuBinary(t), []string{"-accel", "tcg"}, "", t.TempDir()); !errors.Is(err, context.Canceled) {
		t.Fatalf("probe: %v", err)
	}
}

// Whatever this host's KVM does, the answer comes in time, is remembered, and
// leaves no process behind.
func TestAccelAuto(t *testing.T) {
	cache := filepath.Join(t.TempDir(), "cache")
	p := &Prober{Cache: cache, Log: slog.New(slog.DiscardHandler)}
	began := time.Now()
	a, err := p.Accel(testContext(t), qemuBinary(t), "")
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%+v in %s", a, time.Since(began))
	if took := time.Since(began); took > Firmware.Limit+5*time.Second {
		t.Errorf("the decision took %s", took)
	}
	if a.Name != KVM && a.Name != TCG || a.Reason == "" {
		t.Errorf("Accel: %+v", a)
	}
	began = time.Now()
	again, err := (&Prober{Cache: cache}).Accel(testContext(t), qemuBinary(t), "")
	if err != nil || again != a {
		t.Errorf("Accel again: %+v, %v; before %+v", again, err, a)
	}
	if took := time.Since(began); took > time.Second {
		t.Errorf("the remembered decision took %s", took)
	}
	if left := providertest.Hypervisors(t, cache); len(left) > 0 {
		t.Errorf("left over: %q", left)
	}
}

func TestAccelChoices(t *testing.T) {
	dir := t.TempDir()
	forbidden := filepath.Join(dir, "kvm")
	if err := os.Mkdir(forbidden, 0o700); err != nil { // cannot be opened for writing, not even by root
		t.Fatal(err)
	}
	for _, c := range []struct {
		p    *Prober
		want Accel
	}{
		{&Prober{Wanted: "tcg"}, Accel{Name: "tcg", Reason: "as configured"}},
		{&Prober{Wanted: "kvm"}, Accel{Name: "kvm", Reason: "as configured"}},
		{&Prober{Device: filepath.Join(dir, "none")}, Accel{
			Name: "tcg", Reason: "this host has no " + filepath.Join(dir, "none"),
			Cure: "enable virtualization in the firmware, or nested virtualization if the host is itself a virtual machine",
		}},
		{&Prober{Device: forbidden}, Accel{Name: "tcg", Reason: "opening " + forbidden + ": is a directory"}},
	} {
		got, err := c.p.Accel(testContext(t), qemuBinary(t), "")
		if err != nil || got != c.want {
			t.Errorf("got %+v, %v\nwant %+v", got, err, c.want)
		}
	}
	_, err := (&Prober{Wanted: "magic"}).Accel(testContext(t), qemuBinary(t), "")
	if err == nil || err.Error() != `acceleration "magic": must be auto, kvm or tcg` {
		t.Errorf("Accel: %v", err)
	}
}

func TestVerdictSettles(t *testing.T) {
	now := time.Now()
	for _, c := range []struct {
		v      verdict
		kernel bool
		want   bool
	}{
		{verdict{Key: "k", Kernel: true, Usable: true}, true, true},
		{verdict{Key: "k", Kernel: true, Usable: true}, false, true},
		{verdict{Key: "k", Kernel: true}, false, true},
		{verdict{Key: "k", Usable: true}, false, true},
		{verdict{Key: "k", Usable: true}, true, false}, // firmware ran, a kernel may still hang
		{verdict{Key: "k"}, true, true},
		{verdict{Key: "other", Kernel: true, Usable: true}, false, false},
		{verdict{Key: "k", TimedOut: true, At: now.Add(-23 * time.Hour)}, true, true},
		{verdict{Key: "k", TimedOut: true, At: now.Add(-25 * time.Hour)}, true, false}, // the host may have been busy
		{verdict{Key: "k", TimedOut: true, At: now.Add(time.Hour)}, true, false},       // the clock was wrong
	} {
		if got := c.v.settles("k", c.kernel, now); got != c.want {
			t.Errorf("%+v settles kernel=%v: %v", c.v, c.kernel, got)
		}
	}
}

func TestTimedOutVerdictSaysHowToTryAgain(t *testing.T) {
	got := verdict{TimedOut: true, Reason: (&slowError{Kernel.Limit}).Error()}.accel("/c/accel.json")
	want := Accel{
		Name: "tcg", Reason: "KVM does not work here: guest code did not get through in 10s",
		Cure: "use a host with working (nested) virtualization; if the host was only busy, remove /c/accel.json" +
			" to have KVM tried again, which happens after a day anyway",
	}
	if got != want {
		t.Errorf("\n got %+v\nwant %+v", got, want)
	}
}
