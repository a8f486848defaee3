// SPDX-License-Identifier: Apache-2.0

// Package accel decides how machines of this host are run: by KVM only if it was
// seen to run guest code, else by emulation.
package accel

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/labfile/lab/providers"
	"github.com/labfile/lab/providers/local"
)

// What can be asked for, and what is decided.
const (
	Auto = "auto"
	KVM  = "kvm"
	TCG  = "tcg"
)

// Without are the features of a processor, by the names that QEMU and libvirt give them,
// that an emulated one does without, though QEMU could emulate them. invtsc blocks saving
// the machine's state. With erms a guest clears and copies memory by byte (rep stosb, rep
// movsb), which real processors are fast at; emulated, by eight bytes is several times faster.
var Without = []string{"invtsc", "erms"}

// Variable is the environment variable that says which acceleration is wanted;
// the program that makes the provider reads it.
const Variable = "LAB_ACCEL"

// Prober makes the decision and remembers what it saw.
type Prober struct {
	Wanted string // KVM, TCG, or Auto (also if empty), which probes
	Device string // empty for /dev/kvm
	Cache  string // directory of what is remembered
	Log    *slog.Logger

	probing sync.Mutex // one probe at a time within the process
}

// Accel is a decision about acceleration.
type Accel struct {
	Name   string // "kvm" or "tcg"
	Reason string // why, in words for the user
	Cure   string // what would make it faster; empty if nothing is known to
}

// Accel decides how the QEMU called binary runs machines. With Auto that is KVM
// only if it was seen to run guest code, which a probe finds out once and
// remembers. The probe runs kernel; if that is empty it runs firmware alone, which
// shows less.
func (p *Prober) Accel(ctx context.Context, binary, kernel string) (Accel, error) {
	switch p.Wanted {
	case TCG, KVM:
		return Accel{Name: p.Wanted, Reason: "as configured"}, nil
	case Auto, "":
	default:
		return Accel{}, fmt.Errorf("acceleration %q: must be auto, kvm or tcg", p.Wanted)
	}
	if runtime.GOARCH != "amd64" {
		return Accel{Name: TCG, Reason: "this host is " + runtime.GOARCH + ", the machines are amd64"}, nil
	}
	dev := p.device()
	f, err := os.OpenFile(dev, os.O_RDWR, 0)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return Accel{
			Name: TCG, Reason: "this host has no " + dev,
			Cure: "enable virtualization in the firmware, or nested virtualization if the host is itself a virtual machine",
		}, nil
	case errors.Is(err, fs.ErrPermission):
		return Accel{
			Name: TCG, Reason: "no permission to open " + dev,
			Cure: "sudo usermod -aG kvm $USER, then log in again",
		}, nil
	case err != nil:
		return Accel{Name: TCG, Reason: "opening " + dev + ": " + unwrapPath(err)}, nil
	}
	f.Close()
	return p.probed(ctx, binary, kernel)
}

func (p *Prober) device() string {
	if p.Device == "" {
		return "/dev/kvm"
	}
	return p.Device
}

func unwrapPath(err error) string {
	var pe *os.PathError
	if errors.As(err, &pe) {
		return pe.Err.Error()
	}
	return err.Error()
}

// verdict is what the cache holds: the outcome of the last probe.
type verdict struct {
	Key    string `json:"key"`    // the host and the QEMU that it is about
	Kernel bool   `json:"kernel"` // a real kernel was run, not firmware alone
	Usable bool   `json:"usable"`
	Reason string `json:"reason"`

	TimedOut bool      `json:"timed_out"` // KVM may work when the host is less busy
	At       time.Time `json:"at"`
}

// timeoutTTL is how long a probe's timeout is believed.
const timeoutTTL = 24 * time.Hour

// settles reports whether the verdict answers a question at the time now. A
// kernel's word counts for firmware too, and what firmware cannot do a kernel
// cannot.
func (v verdict) settles(key string, kernel bool, now time.Time) bool {
	if age := now.Sub(v.At); v.TimedOut && (age < 0 || age > timeoutTTL) {
		return false
	}
	return v.Key == key && (v.Kernel || !kernel || !v.Usable)
}

// accel is the decision that follows from the verdict, which is kept in file.
func (v verdict) accel(file string) Accel {
	if v.Usable {
		return Accel{Name: KVM, Reason: v.Reason}
	}
	a := Accel{
		Name: TCG, Reason: "KVM does not work here: " + v.Reason,
		Cure: "use a host with working (nested) virtualization",
	}
	if v.TimedOut {
		a.Cure += "; if the host was only busy, remove " + file + " to have KVM tried again, which happens after a day anyway"
	}
	return a
}

// probed returns the cached verdict, or makes one.
func (p *Prober) probed(ctx context.Context, binary, kernel string) (Accel, error) {
	key, err := p.hostKey(binary)
	if err != nil {
		return Accel{}, err
	}
	file := filepath.Join(p.Cache, "accel.json")
	cached := func() (Accel, bool) {
		var v verdict
		if ok, err := local.ReadJSON(file, &v); err != nil || !ok || !v.settles(key, kernel != "", time.Now()) {
			return Accel{}, false
		}
		return v.accel(file), true
	}
	if a, ok := cached(); ok {
		return a, nil
	}
	// Machines start in parallel; one probe is enough for all.
	p.probing.Lock()
	defer p.probing.Unlock()
	if err := os.MkdirAll(p.Cache, 0o700); err != nil {
		return Accel{}, err
	}
	held, err := local.Lock(ctx, filepath.Join(p.Cache, "accel.lock"))
	if err != nil {
		return Accel{}, err
	}
	defer held.Close()
	if a, ok := cached(); ok {
		return a, nil
	}
	v := verdict{Key: key, Kernel: kernel != ""}
	v.Usable, v.Reason, err = probe(ctx, binary, []string{"-accel", "kvm", "-cpu", "host"}, kernel, p.Cache)
	var slow *slowError
	switch {
	case errors.As(err, &slow):
		v.TimedOut, v.Reason = true, slow.Error()
	case err != nil:
		return Accel{}, fmt.Errorf("probing for KVM: %w", err)
	}
	v.At = time.Now().UTC()
	p.Log.Debug("probed KVM", "usable", v.Usable, "reason", v.Reason)
	if err := local.WriteJSON(file, v); err != nil {
		return Accel{}, err
	}
	return v.accel(file), nil
}

// hostKey identifies everything that the verdict depends on: QEMU's program
// (asking it for its version would cost 20 ms at each start), the host's kernel,
// its processor and the device.
func (p *Prober) hostKey(binary string) (string, error) {
	program, err := os.Stat(binary)
	if err != nil {
		return "", err
	}
	dev, err := os.Stat(p.device())
	if err != nil {
		return "", err
	}
	var rdev uint64
	if st, ok := dev.Sys().(*syscall.Stat_t); ok {
		rdev = st.Rdev
	}
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return "", err
	}
	return fmt.Sprintf("%s %d %d; %s; %s; %s %#x", binary, program.Size(), program.ModTime().UnixNano(),
		unix.ByteSliceToString(u.Release[:]), cpuModel(), p.device(), rdev), nil
}

// cpuModel describes the first processor the way /proc/cpuinfo does.
func cpuModel() string {
	b, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return "unknown processor"
	}
	first, _, _ := bytes.Cut(b, []byte("\n\n"))
	var parts []string
	for line := range strings.Lines(string(first)) {
		k, v, _ := strings.Cut(line, ":")
		switch strings.TrimSpace(k) {
		case "model name", "stepping", "microcode":
			parts = append(parts, strings.TrimSpace(v))
		}
	}
	return strings.Join(parts, "/")
}

// Check tells what was decided, as a finding about the host.
func (p *Prober) Check(ctx context.Context, binary string) providers.Finding {
	f := providers.Finding{Topic: "acceleration"}
	a, err := p.Accel(ctx, binary, "")
	switch {
	case err != nil:
		f.Level, f.Detail = providers.LevelError, err.Error()
	case a.Name == TCG:
		f.Level, f.Cure = providers.LevelWarning, a.Cure
		f.Detail = "tcg, pure emulation, some ten times slower: " + a.Reason
		if p.Wanted == TCG {
			f.Cure = "set " + Variable + "=auto to have KVM tried"
		}
	default:
		f.Level, f.Detail = providers.LevelOK, a.Name+": "+a.Reason
	}
	return f
}
