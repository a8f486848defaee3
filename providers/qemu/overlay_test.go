// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/providers"
	"github.com/labfile/lab/providers/local"
	"github.com/labfile/lab/providers/providertest"
	"github.com/labfile/lab/providers/qmp"
)

// pile is a machine that runs and writes to its disk.
type pile struct {
	*testing.T
	p       *Provider
	d       *directory
	written int
}

func newPile(t *testing.T) *pile {
	p, d := testProvider(t)
	ctx := testContext(t)
	must(t, p.Create(ctx, testSpec(t)))
	def, ok, err := local.ReadDefinition(d.Generation(webOne), webOne)
	if err != nil || !ok {
		t.Fatal(ok, err)
	}
	x := &pile{T: t, p: p, d: &directory{Directory: &local.Directory{Path: d.Generation(webOne), Def: def}, monitor: d.Socket(webOne, socketMonitor)}}
	x.start()
	return x
}

func (x *pile) start() {
	x.Helper()
	must(x.T, x.p.Start(testContext(x.T), webOne))
	x.console("", providertest.Banner)
}

// console types keys and waits until the console's log, from its present end (or,
// without keys, its beginning), shows want.
func (x *pile) console(keys, want string) {
	x.Helper()
	path := filepath.Join(x.d.Path, local.FileConsole)
	before := 0
	if keys != "" {
		b, err := os.ReadFile(path)
		must(x.T, err)
		before = len(b)
		c, err := x.p.Console(testContext(x.T), webOne)
		must(x.T, err)
		defer c.Close()
		_, err = io.WriteString(c, keys)
		must(x.T, err)
	}
	for until := time.Now().Add(time.Minute); ; time.Sleep(5 * time.Millisecond) {
		b, err := os.ReadFile(path)
		must(x.T, err)
		if bytes.Contains(b[before:], []byte(want)) {
			return
		}
		if time.Now().After(until) {
			x.Fatalf("the console shows %q, not %q", b[before:], want)
		}
	}
}

// write has the guest write one more sector.
func (x *pile) write() {
	x.Helper()
	x.console(providertest.KeyWrite, providertest.KeyWrite)
	x.written++
}

// kill ends QEMU and waits until that is so.
func (x *pile) kill() {
	x.Helper()
	must(x.T, syscall.Kill(pidOf(x.T, x.p), syscall.SIGKILL))
	_, err := x.p.Wait(testContext(x.T), webOne)
	must(x.T, err)
}

func (x *pile) monitor(do func(context.Context, *qmp.Client) error) {
	x.Helper()
	ctx := testContext(x.T)
	c, err := qmp.Dial(ctx, x.d.monitor)
	must(x.T, err)
	defer c.Close()
	must(x.T, do(ctx, c))
}

// push lays an overlay on top and forgets it.
func (x *pile) push() {
	x.Helper()
	_, err := x.p.push(testContext(x.T), x.d)
	must(x.T, err)
}

// read opens the disk, sees that all is there that was written in this boot, and
// returns the number of the machine's own layers.
func (x *pile) read() int {
	x.Helper()
	disk, err := x.p.OpenDisk(testContext(x.T), webOne)
	must(x.T, err)
	b := providertest.ReadDisk(x.T, disk.Layers)
	for at := 512; at < len(b); at += 512 {
		if there := bytes.Contains(b[at:at+512], []byte(providertest.Banner)); there != (at/512 <= x.written) {
			x.Fatalf("%d sectors were written; sector %d is there: %t", x.written, at/512, there)
		}
	}
	must(x.T, disk.Release(testContext(x.T)))
	return len(disk.Layers) - 1
}

func (x *pile) want(numbers ...int) {
	x.Helper()
	if own, err := local.Overlays(x.d.Path); err != nil || !slices.Equal(own, numbers) {
		x.Fatalf("overlays %v, %v; want %v", own, err, numbers)
	}
}

// beginMerge starts a merge and goes away.
func (x *pile) beginMerge() {
	x.Helper()
	started := false
	busy, err := x.p.mergeStep(testContext(x.T), x.d, &started)
	if err != nil || !busy {
		x.Fatal(busy, err)
	}
}

// awaitMerge waits until QEMU is done with a merge, and does nothing about it.
func (x *pile) awaitMerge() {
	x.Helper()
	x.monitor(func(ctx context.Context, c *qmp.Client) error {
		for {
			var jobs []struct{ Status, Error string }
			if err := c.Execute(ctx, "query-jobs", nil, &jobs); err != nil {
				return err
			}
			if len(jobs) == 1 && jobs[0].Status == "concluded" {
				if jobs[0].Error != "" {
					return errors.New(jobs[0].Error)
				}
				return nil
			}
			if err := local.Pause(ctx, time.Millisecond); err != nil {
				return err
			}
		}
	})
}

// Whatever a process that was killed left, the next one finds the disk whole.
func TestInterruptedChanges(t *testing.T) {
	blank := func(x *pile) { must(x.T, local.AddOverlay(x.d.Path, 1, x.d.Def.Disk)) }
	node := func(x *pile) {
		blank(x)
		x.monitor(func(ctx context.Context, c *qmp.Client) error {
			return c.Execute(ctx, "blockdev-add", overlay(x.d.Path, 1).blockdev(), nil)
		})
	}
	abandon := func(x *pile) {
		disk, err := x.p.OpenDisk(testContext(x.T), webOne)
		must(x.T, err)
		if err := disk.Release(ended()); !errors.Is(err, context.Canceled) { // gives the lock back and does no more
			x.Errorf("Release: %v", err)
		}
	}
	three := func(x *pile) {
		for range 3 {
			x.push()
			x.write()
		}
	}
	merging := func(x *pile) {
		three(x)
		x.beginMerge()
		x.write()
	}
	merged := func(x *pile) {
		merging(x)
		x.awaitMerge()
		x.want(0, 1, 2, 3)
	}
	for _, c := range []struct {
		name  string
		leave func(*pile)
	}{
		{"an overlay that QEMU never got", blank},
		{"an overlay that lies nowhere", node},
		{"an overlay without a record", (*pile).push},
		{"a disk that was never released", abandon},
		{"three overlays", three},
		{"a merge", merging},
		{"a merge that has ended", merged},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Run("the machine runs", func(t *testing.T) {
				x := newPile(t)
				x.write()
				c.leave(x)
				x.write()
				x.read()
				x.write()
				if own := x.read(); own > 2 {
					t.Errorf("%d layers remain", own)
				}
			})
			t.Run("and is frozen", func(t *testing.T) {
				x := newPile(t)
				x.write()
				c.leave(x)
				must(t, x.p.Freeze(testContext(t), webOne))
				x.write()
				x.read()
				disk, err := x.p.OpenDisk(testContext(t), webOne)
				must(t, err)
				defer disk.Release(testContext(t))
				if disk.Birth < 2 || len(disk.Layers) <= disk.Birth {
					t.Errorf("%d of %d layers are the birth", disk.Birth, len(disk.Layers))
				}
			})
			t.Run("QEMU was killed", func(t *testing.T) {
				x := newPile(t)
				x.write()
				c.leave(x)
				x.write()
				x.kill()
				x.read()
				x.start()
				x.read()
				x.read()
				if own := x.read(); own > 2 {
					t.Errorf("%d layers remain", own)
				}
			})
		})
	}
}

// ended returns a context that is over.
func ended() context.Context {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	return ctx
}

// A merged overlay hides only what is the same, at each step of its removal.
func TestMergedOverlaysGoFromBelow(t *testing.T) {
	x := newPile(t)
	must(t, x.p.Stop(testContext(t), webOne, 0))
	// What each overlay has of the megabyte: "." is nothing.
	for n, has := range []string{"111111", "22..2.", "3.3.3.", "......"} {
		if n > 0 {
			must(t, local.AddOverlay(x.d.Path, n, x.d.Def.Disk))
		}
		args := []string{"-f", "qcow2"}
		for i, c := range has {
			if c != '.' {
				args = append(args, "-c", fmt.Sprintf("write -P 0x%x %dk 64k", c, 64*(i+1)))
			}
		}
		if len(args) > 2 {
			out, err := exec.Command("qemu-io", append(args, overlay(x.d.Path, n).Path)...).CombinedOutput()
			must(t, err)
			t.Logf("%s", out)
		}
	}
	want := []byte("323131") // the topmost counts
	check := func() {
		t.Helper()
		own, err := local.Overlays(x.d.Path)
		must(t, err)
		layers := []providers.Layer{{Path: x.d.Def.Image.Disk, Format: "raw"}}
		for _, n := range own {
			layers = append(layers, providers.Layer{Path: overlay(x.d.Path, n).Path, Format: "qcow2"})
		}
		disk := providertest.ReadDisk(t, layers)
		got := make([]byte, len(want))
		for i := range got {
			got[i] = disk[(i+1)<<16]
		}
		if !bytes.Equal(got, want) {
			t.Errorf("with the overlays %v the disk reads %q, want %q", own, got, want)
		}
	}
	check()
	x.start()
	x.beginMerge()
	x.awaitMerge()
	x.kill()
	x.want(0, 1, 2, 3)
	check()
	for _, n := range []int{1, 2} {
		must(t, os.Remove(overlay(x.d.Path, n).Path))
		check()
	}
}

// Contexts that end at any moment are as good as crashes, as far as the disk goes.
func TestCanceledChanges(t *testing.T) {
	x := newPile(t)
	for i := range 60 {
		ctx, cancel := context.WithTimeout(context.Background(), time.Duration(i%20)*time.Millisecond/2)
		switch i % 3 {
		case 0:
			x.p.Snapshot(ctx, webOne)
		default:
			if disk, err := x.p.OpenDisk(ctx, webOne); err == nil {
				disk.Release(ctx)
			}
		}
		cancel()
		if i%4 == 0 {
			x.write()
		}
		if i%10 == 9 {
			x.read()
		}
	}
	x.read()
}

func TestFreezeOfAHaltedQEMU(t *testing.T) {
	x := newPile(t)
	x.write()
	pid := pidOf(t, x.p)
	must(t, syscall.Kill(pid, syscall.SIGSTOP))
	ctx, cancel := context.WithTimeout(context.Background(), 200*time.Millisecond)
	defer cancel()
	if err := x.p.Freeze(ctx, webOne); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Freeze: %v", err)
	}
	must(t, syscall.Kill(pid, syscall.SIGCONT))
	x.write()
	must(t, x.p.Freeze(testContext(t), webOne))
	x.read()
}

func TestOverlayNames(t *testing.T) {
	dir := t.TempDir()
	if _, err := local.Overlays(dir); err == nil || err.Error() != filepath.Join(dir, "disk.qcow2")+" is missing" {
		t.Errorf("got %v", err)
	}
	for _, name := range []string{
		"disk.10.qcow2", "disk.qcow2", "disk.2.qcow2", "disk.0.qcow2", "disk.02.qcow2", "disk.-1.qcow2",
		"disk.x.qcow2", "disk..qcow2", ".disk-new", "disk.json", "disk.3.qcow2.bak", "mydisk.4.qcow2",
	} {
		must(t, os.WriteFile(filepath.Join(dir, name), nil, 0o600))
	}
	if own, err := local.Overlays(dir); err != nil || !slices.Equal(own, []int{0, 2, 10}) {
		t.Errorf("got %v, %v", own, err)
	}
	for _, n := range []int{0, 1, 42} {
		if got, err := overlayOf(overlay(dir, n).Node); err != nil || got != n {
			t.Errorf("overlay %d became %d, %v", n, got, err)
		}
	}
	for _, node := range []string{"", "disk-0", "disk-", "disk-01", "volume0"} {
		want := fmt.Sprintf("the machine writes to %q, which is no overlay of its own", node)
		if _, err := overlayOf(node); err == nil || err.Error() != want {
			t.Errorf("got %v, want %s", err, want)
		}
	}
}

func TestMergeNames(t *testing.T) {
	for id, want := range map[string]string{
		"merge-0-3": "0 3 true", "merge-12-40": "12 40 true", "merge-1": "1 0 false", "merge-a-2": "0 2 false", "backup": "0 0 false",
	} {
		base, top, ok := merged(id)
		if got := fmt.Sprint(base, top, ok); got != want {
			t.Errorf("%s: got %s, want %s", id, got, want)
		}
	}
}

func TestUnknownChain(t *testing.T) {
	p, d := testProvider(t)
	ctx := testContext(t)
	must(t, p.Create(ctx, testSpec(t)))
	path := filepath.Join(d.Generation(webOne), local.FileChain)
	must(t, os.WriteFile(path, []byte(`{"version": 2}`), 0o600))
	err := p.Freeze(ctx, webOne)
	want := `freezing machine "web@1": ` + path + " has version 2, this lab knows version 1"
	if err == nil || err.Error() != want {
		t.Errorf("got %v\nwant %s", err, want)
	}
	m, err := p.Inspect(ctx, webOne)
	must(t, err)
	if m.State != providers.StateBroken || m.Reason != path+" has version 2, this lab knows version 1" {
		t.Errorf("%+v", m)
	}
}

func TestDefinitionVersions(t *testing.T) {
	plain := testSpec(t)
	stored := plain
	stored.Mounts = []providers.Mount{{Tag: "m", Path: "/src"}}
	joined := plain
	joined.Network, joined.Direct = lab.NetworkNAT, netip.MustParseAddr("10.130.1.10")
	for _, c := range []struct {
		spec providers.Spec
		want int
	}{{plain, 1}, {stored, 2}, {joined, 3}} {
		d := local.Define(c.spec)
		if d.Version != c.want {
			t.Errorf("version %d, want %d", d.Version, c.want)
		}
		if d.SetVolumes([]providers.Volume{{Name: "v", Path: "/v"}}); d.Version != max(c.want, 2) {
			t.Errorf("with a volume version %d, was %d", d.Version, c.want)
		}
	}
	dir := t.TempDir()
	for version, want := range map[int]string{
		1: "", 2: "", 3: "", 4: filepath.Join(dir, local.FileDefinition) + " has version 4, this lab knows version 3",
		0: filepath.Join(dir, local.FileDefinition) + " has version 0, this lab knows version 3",
	} {
		d := local.Define(plain)
		d.Version = version
		must(t, local.WriteJSON(filepath.Join(dir, local.FileDefinition), d))
		_, _, err := local.ReadDefinition(dir, webOne)
		if got := fmt.Sprint(err); got != want && !(want == "" && err == nil) {
			t.Errorf("version %d: got %v, want %s", version, err, want)
		}
	}
}

func TestCommandLine(t *testing.T) {
	p, d := testProvider(t)
	ctx := testContext(t)
	spec := testSpec(t)
	spec.Image.Kernel, spec.Image.Append, spec.Append = spec.Image.Disk, "quiet", "lab.mount=a:/b"
	must(t, p.Create(ctx, spec))
	dir := d.Generation(webOne)
	def, _, err := local.ReadDefinition(dir, webOne)
	must(t, err)
	l, err := p.launchOf(def, dir, "tcg")
	must(t, err)
	if l.Append != "quiet lab.mount=a:/b" {
		t.Errorf("command line %q", l.Append)
	}
}

func TestVolumeInUse(t *testing.T) {
	path := filepath.Join(t.TempDir(), "v.qcow2")
	must(t, os.WriteFile(path, nil, 0o600))
	volumes := []providers.Volume{{Name: "other", Path: "/other"}, {Name: "v", Path: path}}
	for said, want := range map[string]string{
		"": "",
		"2026-11-23T11:00:00.1Z qemu-system-x86_64: -device virtio-blk-pci,drive=volume0: Failed to get \"write\" lock\nIs another process using the image [" + path + "]?": `volume in use: volume "v" (` + path + `) is attached to another process; stop that machine first`,
		"qemu-system-x86_64: -blockdev {}: Failed to get shared \"write\" lock\nIs another process using the image [" + path + "]?\n":                                       `volume in use: volume "v" (` + path + `) is attached to another process; stop that machine first`,
		"Failed to get \"write\" lock\nIs another process using the image [/disk.qcow2]?":                                                                                   "",
	} {
		err := local.VolumeInUse(volumes, said)
		if got := fmt.Sprint(err); got != want && !(want == "" && err == nil) {
			t.Errorf("got %v\nwant %s", err, want)
		}
		if err != nil && !errors.Is(err, providers.ErrInUse) {
			t.Errorf("%v is not ErrInUse", err)
		}
	}
}

func TestMountsWithout9P(t *testing.T) {
	_, d := testProvider(t)
	bare := filepath.Join(t.TempDir(), "qemu-bare")
	must(t, os.WriteFile(bare, []byte("#!/bin/sh\nexit 1\n"), 0o700))
	spec := testSpec(t)
	spec.Mounts = []providers.Mount{{Tag: "m", Path: t.TempDir()}}
	p := New(Config{Dirs: d, Accel: "tcg", Binary: bare})
	err := p.Create(testContext(t), spec)
	want := `creating machine "web@1": host not capable: ` + bare + " cannot share folders with machines: it was built without 9p"
	if !errors.Is(err, providers.ErrIncapable) || err.Error() != want {
		t.Errorf("got %v\nwant %s", err, want)
	}
}
