// SPDX-License-Identifier: Apache-2.0

package libvirt

import (
	"flag"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/providers"
	"github.com/labfile/lab/providers/local"
)

var update = flag.Bool("update", false, "rewrite the golden files")

// goldenDomains are the domains of testdata.
func goldenDomains() map[string]Domain {
	const (
		dir = "/home/ada/.local/share/lab/labs/shop-1f3a9c2b/domains/web/3"
		run = "/run/user/1000/lab/shop-1f3a9c2b/web-3."
		box = "/home/ada/.local/share/lab/boxes/blobs/sha256/"
	)
	base := func(change func(*Domain)) Domain {
		spec := providers.Spec{
			Generation: lab.Generation{Lab: "shop-1f3a9c2b", Machine: "web", Number: 3},
			Image:      providers.Image{Digest: "sha256:d15c", Arch: "amd64", Disk: box + "d15c", Format: "raw", Size: lab.GiB},
			CPUs:       1, Memory: 256 * lab.MiB, MAC: "52:54:00:40:00:0a", Agent: true,
		}
		d := Domain{
			Name: "lab-shop-1f3a9c2b-web-3", UUID: uuidOf(dir), Directory: dir, Def: local.Define(spec),
			Emulator: "/usr/bin/qemu-system-x86_64",
			NIC:      run + "nic", Agent: run + "agt",
		}
		d.Def.Created = time.Date(2026, 11, 25, 0, 0, 0, 0, time.UTC)
		change(&d)
		if d.Files.Disk == "" {
			d.Files = filesIn(d.Directory, &d.Def, []int{0})
		}
		return d
	}
	return map[string]Domain{
		"disk": base(func(d *Domain) {
			d.KVM, d.Def.CPUs, d.Def.Seed = true, 4, true
		}),
		"kernel": base(func(d *Domain) {
			i := &d.Def.Image
			i.Kernel, i.Initrd, i.Append = box+"ce11", box+"1217", "root=/dev/vda quiet"
			d.Def.Append = `lab.x="a<b>&c"`
		}),
		"bare": base(func(d *Domain) {
			d.Def.MAC, d.Def.Agent, d.Emulator = "", false, ""
		}),
		"stored": base(func(d *Domain) {
			d.Def.Image.Format, d.Def.Image.Layers = "qcow2", []string{"/layers/a.qcow2", "/layers/b.qcow2"}
			d.Files = filesIn(dir, &d.Def, []int{0, 3, 4})
			d.Def.Volumes = []local.Volume{
				{Name: "data", Path: "/volumes/data@2.qcow2", Layers: []string{"/volumes/data@1.qcow2"}},
				{Name: "shared", Path: "/volumes/shared.qcow2", ReadOnly: true},
			}
			d.Def.Mounts = []local.Mount{{Tag: "src", Path: "/src, with comma"}, {Tag: "out", Path: "/out", Writable: true}}
		}),
		"system": base(func(d *Domain) {
			d.RunAs, d.Unconfined = &Account{1000, 100}, []string{"apparmor"}
			d.Directory = "/home/ada/my, own/domains/web/3"
			d.Def.Mounts = []local.Mount{{Tag: "src", Path: "/src"}}
		}),
		"remote": base(func(d *Domain) {
			const pool = "/var/lib/libvirt/images/"
			own := pool + "lab-shop-1f3a9c2b-web-3.77b43ad8."
			d.Directory, d.Emulator, d.Agent, d.NIC = "0123456789ab:"+dir, "", "", "/var/lib/libvirt/qemu/lab-77b43ad89c415a34.nic"
			d.Def.Image.Kernel, d.Def.Seed = box+"ce11", true
			d.Stored = &stored{Disk: "lab-image-d15c-0123456789ab", Layers: []string{"lab-image-1a4e-0123456789ab"}, Kernel: "lab-image-ce11-0123456789ab"}
			d.Files = Files{
				Disk: pool + d.Stored.Disk, Layers: []string{pool + d.Stored.Layers[0]}, Kernel: pool + d.Stored.Kernel,
				Overlays: []string{own + "disk.qcow2", own + "disk.1.qcow2"}, Seed: own + "seed.img", ConsoleLog: own + "console.log",
			}
		}),
		"network": base(func(d *Domain) {
			d.Network = "lab-shop-1f3a9c2b-nat"
			d.Def.Network, d.Def.Direct = lab.NetworkNAT, netip.MustParseAddr("10.200.3.10")
		}),
		"odd": base(func(d *Domain) {
			d.Directory = `/data/"a",b\c & <d>`
			d.NIC = "/run/a,b/nic"
		}),
	}
}

func TestDomainGolden(t *testing.T) {
	for name, d := range goldenDomains() {
		got, err := d.XML()
		if err != nil {
			t.Fatal(err)
		}
		golden(t, "domain-"+name+".xml", got)
	}
}

func TestHelperGolden(t *testing.T) {
	doc := helperXML("qemu", "lab-files-0123456789ab-ABCDEFGH")
	doc.Devices.Disks = []diskXML{joined("/pool/data@top.qcow2", []string{"/pool/data@1.qcow2", "/pool/data@2.qcow2"})}
	got, err := encode(doc)
	if err != nil {
		t.Fatal(err)
	}
	golden(t, "domain-helper.xml", got)
}

func TestSnapshotGolden(t *testing.T) {
	d := goldenDomains()["stored"]
	document, err := d.XML()
	if err != nil {
		t.Fatal(err)
	}
	got, err := snapshot(document, mainDisk, local.OverlayPath(d.Directory, 5))
	if err != nil {
		t.Fatal(err)
	}
	golden(t, "domainsnapshot-stored.xml", got)
}

func TestVolumeGolden(t *testing.T) {
	for name, v := range map[string]volumeXML{
		"image":   imageVolume("lab-image-d15c-0123456789ab", 413<<20),
		"overlay": overlayVolume("lab-shop-1f3a9c2b-web-3.77b43ad8.disk.qcow2", lab.GiB),
	} {
		got, err := encode(v)
		if err != nil {
			t.Fatal(err)
		}
		golden(t, "storagevol-"+name+".xml", got)
	}
}

// golden compares a document with the one in testdata.
func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("%s (-want +got):\n%s", name, diff)
	}
}

// libvirt's own schemas accept what lab writes. The schema's kind is the document's.
func TestSchemas(t *testing.T) {
	files, err := filepath.Glob("testdata/*.xml")
	if err != nil || len(files) < 6 {
		t.Fatal(files, err)
	}
	for _, file := range files {
		kind, _, _ := strings.Cut(filepath.Base(file), "-")
		if out, err := exec.Command("virt-xml-validate", file, kind).CombinedOutput(); err != nil {
			t.Errorf("%s: %v: %s", file, err, out)
		}
	}
}

func TestChainOf(t *testing.T) {
	d := goldenDomains()["stored"]
	document, err := d.XML()
	if err != nil {
		t.Fatal(err)
	}
	got, err := chainOf(document)
	want := []string{
		local.OverlayPath(d.Directory, 4), local.OverlayPath(d.Directory, 3), local.OverlayPath(d.Directory, 0),
		"/layers/b.qcow2", "/layers/a.qcow2", d.Def.Image.Disk,
	}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("got %q, %v\nwant %q", got, err, want)
	}
	if _, err := chainOf("<domain/>"); err == nil || err.Error() != "the machine has no disk vda" {
		t.Errorf("a domain without disks: %v", err)
	}
}

// What is written into the metadata is read back whole.
func TestOwner(t *testing.T) {
	for name, d := range goldenDomains() {
		document, err := d.XML()
		if err != nil {
			t.Fatal(err)
		}
		_, rest, _ := strings.Cut(document, "<metadata>")
		text, _, _ := strings.Cut(rest, "</metadata>")
		o, err := parseOwner(text)
		if err != nil {
			t.Fatal(err)
		}
		got, err := o.definition()
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(d.Def, got, cmpopts.EquateComparable(netip.Addr{})); diff != "" || o.Directory != d.Directory {
			t.Errorf("%s: directory %q, definition (-want +got):\n%s", name, o.Directory, diff)
		}
	}
	for text, want := range map[string]string{
		`<machine generation="x"/>`: `reading a domain's metadata: `,
		`<machine`:                  `reading a domain's metadata: `,
		`<machine lab="a" name="b" generation="1"><definition>{</definition></machine>`:             `reading a domain's metadata: `,
		`<machine lab="a" name="b" generation="1"><definition>{"version":9}</definition></machine>`: `the metadata of the domain of b@1 has version 9, this lab knows version 3`,
		`<machine lab="a" name="b" generation="1"><definition>{"version":1}</definition></machine>`: `the metadata of the domain of b@1 is of `,
	} {
		o, err := parseOwner(text)
		if err == nil {
			_, err = o.definition()
		}
		if err == nil || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("%s: got %v, want %s…", text, err, want)
		}
	}
}

func TestUUID(t *testing.T) {
	got := formatUUID(uuidOf("/a"))
	if got == formatUUID(uuidOf("/b")) || len(got) != 36 || got[14] != '5' || !strings.ContainsRune("89ab", rune(got[19])) {
		t.Errorf("UUID %s", got)
	}
}

func TestLastWords(t *testing.T) {
	for _, c := range []struct{ log, want string }{
		{"", ""},
		{"2026-11-25 04:17:55.705+0000: starting up libvirt version: 9.0.0\n/usr/bin/qemu-system-x86_64 \\\n-name guest=x \\\n-msg timestamp=on\n" +
			"2026-11-25 04:17:55.705+0000: Domain id=2 is tainted: custom-argv\n", ""},
		{"2026-11-25T04:17:57.024103Z qemu-system-x86_64: terminating on signal 15 from pid 8860 (bash)\n", ""},
		{"2026-11-25T04:17:57.024103Z qemu-system-x86_64: warning: no\nqemu-system-x86_64: ../x.c:12: f: Assertion `a' failed.\n" +
			"2026-11-25 04:17:58.841+0000: shutting down, reason=crashed\n", "../x.c:12: f: Assertion `a' failed."},
		{"qemu-system-x86_64: old\n2026-11-25 04:17:55.705+0000: starting up libvirt version: 9.0.0\n", ""},
	} {
		if got := lastWords([]byte(c.log)); got != c.want {
			t.Errorf("%q: got %q, want %q", c.log, got, c.want)
		}
	}
}
