// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/providers"
)

var update = flag.Bool("update", false, "rewrite the golden files")

func tinyLaunch() Launch {
	const dir = "/home/ada/.local/share/lab/labs/shop-1f3a9c2b/machines/web/3"
	const run = "/run/user/1000/lab/shop-1f3a9c2b/web-3"
	const box = "/home/ada/.local/share/lab/boxes/blobs/sha256/"
	return Launch{
		Name: "shop-1f3a9c2b/web@3", Accel: "tcg", CPUs: 1, Memory: 256 * lab.MiB,
		Base: box + "d15c", Format: "qcow2",
		Overlays: []Overlay{{Path: dir + "/disk.qcow2", Node: "disk"}},
		Kernel:   box + "ce11", Initrd: box + "1d1d", Append: "console=ttyS0 root=/dev/vda rw quiet tsc=reliable",
		MAC: "52:54:00:40:00:0a", NICSocket: run + ".nic", AgentSocket: run + ".agt",
		ConsoleSocket: run + ".con", ConsoleLog: dir + "/console.log",
		PIDFile: dir + "/qemu.pid", Events: dir + "/events",
	}
}

func TestArgvGolden(t *testing.T) {
	disk := tinyLaunch()
	disk.Kernel, disk.Initrd, disk.Append, disk.AgentSocket = "", "", "", ""
	disk.Accel, disk.CPUs, disk.Memory, disk.Format = "kvm", 4, 2*lab.GiB, "raw"
	disk.Seed = "/home/ada/.local/share/lab/labs/shop-1f3a9c2b/machines/web/3/seed.img"
	odd := tinyLaunch()
	odd.Name, odd.MAC, odd.AgentSocket, odd.Initrd, odd.Append = "a,b/web@3", "", "", "", ""
	odd.ConsoleSocket, odd.ConsoleLog, odd.Events = "/run/a,b/con", `/data/"a",b\c/console.log`, `/data/"a",b\c/events`
	odd.Overlays[0].Path, odd.Base, odd.PIDFile = `/data/"a",b\c/disk.qcow2`, "json:{}", "/data/a,b/qemu.pid"
	stored := tinyLaunch()
	stored.Layers = []string{strings.Replace(stored.Base, "d15c", "1a1e", 1), strings.Replace(stored.Base, "d15c", "2a2e", 1)}
	for _, n := range []string{"1", "4"} {
		path := strings.TrimSuffix(stored.Overlays[0].Path, ".qcow2") + "." + n + ".qcow2"
		stored.Overlays = append(stored.Overlays, Overlay{Path: path, Node: "disk-" + n})
	}
	stored.Volumes = []providers.Volume{
		{Name: "pgdata", Path: "/home/ada/.local/share/lab/labs/shop-1f3a9c2b/volumes/pgdata.qcow2", Layers: []string{"/data/pg@1.qcow2", "/data/pg@2.qcow2"}},
		{Name: "old.data", Path: `/data/"a",b\c/old.qcow2`, ReadOnly: true},
	}
	stored.Mounts = []providers.Mount{{Tag: "m0", Path: "/home/ada/src,x"}, {Tag: "m1", Path: "/home/ada/out", Writable: true}}
	for name, l := range map[string]Launch{"tiny": tinyLaunch(), "disk": disk, "odd": odd, "stored": stored} {
		t.Run(name, func(t *testing.T) {
			got := strings.Join(l.Argv(), "\n") + "\n"
			golden := filepath.Join("testdata", "argv-"+name+".txt")
			if *update {
				if err := os.MkdirAll("testdata", 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(string(want), got); diff != "" {
				t.Errorf("argv differs from %s (-want +got):\n%s", golden, diff)
			}
		})
	}
}

func TestQuoteArgv(t *testing.T) {
	got := quoteArgv([]string{"/usr/bin/qemu", "-m", "", `{"a":1}`, "it's"})
	want := `/usr/bin/qemu -m '' '{"a":1}' 'it'\''s'`
	if got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}
