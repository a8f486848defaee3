// SPDX-License-Identifier: Apache-2.0

package libvirt

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"os"
	"slices"
	"syscall"
	"testing"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/providers/local"
	"github.com/labfile/lab/providers/providertest"
)

// pile is a machine that runs and writes to its disk.
type pile struct {
	*bench
	written int
}

func (x *pile) write() {
	x.Helper()
	x.console(providertest.KeyWrite, providertest.KeyWrite)
	x.written++
}

// with opens the directory for what an interrupted process would have done.
func (x *pile) with(do func(*directory)) {
	x.Helper()
	d, err := x.p.openDirectory(x.ctx(), webOne)
	x.must(err)
	defer d.Close()
	do(d)
}

func (x *pile) push() {
	x.Helper()
	x.with(func(d *directory) {
		_, err := x.p.push(x.ctx(), d)
		x.must(err)
	})
}

// read opens the disk, sees that all is there that was written, and returns the
// number of the machine's own layers.
func (x *pile) read() int {
	x.Helper()
	disk, err := x.p.OpenDisk(x.ctx(), webOne)
	x.must(err)
	b := providertest.ReadDisk(x.T, disk.Layers)
	for at := 512; at < len(b); at += 512 {
		if there := bytes.Contains(b[at:at+512], []byte(providertest.Banner)); there != (at/512 <= x.written) {
			x.Fatalf("%d sectors were written; sector %d is there: %t", x.written, at/512, there)
		}
	}
	x.must(disk.Release(x.ctx()))
	return len(disk.Layers) - 1
}

// Whatever a process that was killed left, the next one finds the disk whole.
func TestInterruptedChanges(t *testing.T) {
	b := newBench(t)
	blank := func(x *pile) { x.must(local.AddOverlay(x.dirs.Domain(webOne), 1, lab.MiB)) }
	abandon := func(x *pile) {
		disk, err := x.p.OpenDisk(x.ctx(), webOne)
		x.must(err)
		ended, cancel := context.WithCancel(context.Background())
		cancel()
		if err := disk.Release(ended); !errors.Is(err, context.Canceled) { // gives the lock back and does no more
			x.Errorf("Release: %v", err)
		}
	}
	merging := func(x *pile) {
		for range 3 {
			x.push()
			x.write()
		}
		x.with(func(d *directory) {
			started := false
			if busy, err := x.p.mergeStep(x.ctx(), d, &started); err != nil || !busy {
				x.Fatal(busy, err)
			}
		})
		x.write()
	}
	merged := func(x *pile) {
		merging(x)
		x.with(func(d *directory) {
			x.until("libvirt is done with the merge", func() bool {
				_, document, err := x.p.disk(x.ctx(), d)
				x.must(err)
				files, err := chainOf(document)
				x.must(err)
				return !slices.Contains(files, local.OverlayPath(d.Path, 2))
			})
		})
	}
	for _, c := range []struct {
		name  string
		leave func(*pile)
	}{
		{"an overlay that QEMU never got", blank},
		{"an overlay without a record", (*pile).push},
		{"a disk that was never released", abandon},
		{"a merge under way", merging},
		{"a merge that is done", merged},
	} {
		for _, then := range []struct {
			name string
			do   func(*pile)
		}{
			{"goes on", func(*pile) {}},
			{"is killed and started", func(x *pile) {
				pid := findQEMU(x.dirs.Domain(webOne))
				x.must(syscall.Kill(pid, syscall.SIGKILL))
				_, err := x.p.Wait(x.ctx(), webOne)
				x.must(err)
				x.start()
			}},
		} {
			t.Run(c.name+", the machine "+then.name, func(t *testing.T) {
				x := &pile{bench: &bench{T: t, daemon: b.daemon, dirs: b.dirs, p: b.p}}
				defer x.destroyed()
				x.up()
				x.write()
				c.leave(x)
				then.do(x)
				x.read()
				x.read()
				if n := x.read(); n > 2 {
					t.Errorf("%d overlays below the one that is written to", n)
				}
			})
		}
	}
}

// libvirt writes into headers what lies below; a frozen layer names nothing.
func TestFrozenLayersNameNothing(t *testing.T) {
	x := &pile{bench: newBench(t)}
	x.up()
	for range 4 { // merged again and again
		x.write()
		x.read()
	}
	named := 0
	backing := func(path string) bool {
		b, err := os.ReadFile(path)
		x.must(err)
		return binary.BigEndian.Uint64(b[8:]) != 0
	}
	own, err := local.Overlays(x.dirs.Domain(webOne))
	x.must(err)
	for _, n := range own {
		if backing(local.OverlayPath(x.dirs.Domain(webOne), n)) {
			named++
		}
	}
	if named == 0 {
		t.Error("libvirt names backing files no more: qcow2.ForgetBacking may go")
	}
	frozen, err := x.p.Snapshot(x.ctx(), webOne)
	x.must(err)
	if len(frozen.Layers) == 0 {
		t.Error("nothing was frozen")
	}
	x.write()
	for _, path := range frozen.Layers {
		if backing(path) {
			t.Errorf("%s names what lies below it", path)
		}
	}
	x.read()
	x.destroyed()
}
