// SPDX-License-Identifier: Apache-2.0

package libvirt

import (
	"crypto/sha1"
	"encoding/json"
	"encoding/xml"
	"fmt"
	"strings"

	golibvirt "github.com/digitalocean/go-libvirt"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/providers"
	"github.com/labfile/lab/providers/accel"
	"github.com/labfile/lab/providers/local"
)

// Where devices sit on the PCI bus: as in the QEMU provider, so that a guest finds
// the same machine whichever of the two runs it.
const (
	slotDisk   = 3
	slotNIC    = 4
	slotSerial = 5
	slotRNG    = 6
	slotSeed   = 7

	slotVolumes = 8
	slotMounts  = 20
	slotDirect  = 30
)

// mainDisk is the target of the machine's own disk.
const mainDisk = "vda"

// Domain is everything that shapes a machine's domain. All paths are absolute.
type Domain struct {
	Name      string
	UUID      golibvirt.UUID
	Directory string // of the generation
	Def       local.Definition

	KVM      bool
	Emulator string // empty for libvirt's choice

	Files  Files
	Stored *stored // on another host: the volumes that Files is about
	// Sockets. Agent may be empty for one of libvirt's choice.
	NIC   string
	Agent string

	RunAs      *Account // whom the system's daemon runs QEMU as; nil for its own choice
	Unconfined []string // the daemon's security models that leave the machine alone

	Network string // the lab's network on the daemon's host; empty if the machine is in none
}

// Account is a user of this host.
type Account struct{ UID, GID int }

// Files is where a machine's files lie on the daemon's host.
type Files struct {
	Disk           string   // of the image
	Layers         []string // of the image, lowest first
	Kernel, Initrd string
	Overlays       []string // the machine's own, lowest first; it writes to the last
	Seed           string
	ConsoleLog     string
	Events         string // prefix of QEMU's event record; empty for none
}

// filesIn is for a generation whose files lie in its directory, on this host.
func filesIn(dir string, def *local.Definition, overlays []int) Files {
	f := Files{
		Disk: def.Image.Disk, Layers: def.Image.Layers, Kernel: def.Image.Kernel, Initrd: def.Image.Initrd,
		Seed: dir + "/" + local.FileSeed, ConsoleLog: dir + "/" + local.FileConsole, Events: dir + "/" + local.FileEvents,
	}
	for _, n := range overlays {
		f.Overlays = append(f.Overlays, local.OverlayPath(dir, n))
	}
	return f
}

// far reports whether the machine is one of another host.
func (d Domain) far() bool { return d.Stored != nil }

// domainName is how virsh shows a generation. A user may rename it.
func domainName(g lab.Generation) string {
	return fmt.Sprintf("lab-%s-%s-%d", g.Lab, g.Machine, g.Number)
}

// uuidOf is the same for a generation for ever: a name-based UUID (RFC 9562, version
// 5) of its directory, which no two generations share.
func uuidOf(directory string) golibvirt.UUID {
	sum := sha1.Sum([]byte(namespace + "\x00" + directory))
	var u golibvirt.UUID
	copy(u[:], sum[:])
	u[6] = u[6]&0x0f | 0x50
	u[8] = u[8]&0x3f | 0x80
	return u
}

func formatUUID(u golibvirt.UUID) string {
	return fmt.Sprintf("%x-%x-%x-%x-%x", u[0:4], u[4:6], u[6:8], u[8:10], u[10:16])
}

// XML renders the domain. It looks at nothing but d.
func (d Domain) XML() (string, error) {
	def := &d.Def
	definition, err := json.Marshal(def)
	if err != nil {
		return "", fmt.Errorf("writing the definition of %s: %w", d.Name, err)
	}
	var volumes *cdata
	if d.Stored != nil {
		b, err := json.Marshal(d.Stored)
		if err != nil {
			return "", fmt.Errorf("writing the definition of %s: %w", d.Name, err)
		}
		volumes = &cdata{string(b)}
	}
	g := def.Generation()
	doc := domainXML{
		Type: "qemu", QEMU: qemuNamespace, Name: d.Name, UUID: formatUUID(d.UUID),
		Title: string(g.Lab) + "/" + g.String(),
		Owner: &ownerXML{
			Namespace: namespace, Lab: string(g.Lab), Machine: string(g.Machine), Generation: g.Number,
			Directory: d.Directory, Definition: cdata{string(definition)}, Stored: volumes,
		},
		Memory: memory{"KiB", "off", int64(def.Memory / lab.KiB)},
		CPUs:   def.CPUs,
		OS: osXML{
			Type:   osType{"x86_64", "q35", "hvm"},
			Kernel: d.Files.Kernel, Initrd: d.Files.Initrd, Cmdline: def.CommandLine(),
		},
		CPU:   cpuXML{Mode: "maximum", Check: "none"},
		Clock: clock{"utc"},
		// The domain ends with its guest, whichever way that goes: lab starts it again.
		OnPowerOff: "destroy", OnReboot: "restart", OnCrash: "destroy",
		Devices: d.devices(), Labels: d.labels(),
	}
	if def.Image.Kernel == "" {
		doc.OS.Cmdline = ""
	}
	if d.KVM {
		doc.Type, doc.CPU.Mode = "kvm", "host-passthrough"
	} else {
		for _, name := range accel.Without {
			doc.CPU.Features = append(doc.CPU.Features, feature{"disable", name})
		}
	}
	if d.far() {
		// Nobody here reads QEMU's events: a panic is seen as long as QEMU is there.
		doc.OnCrash = "preserve"
	}
	for _, arg := range d.arguments() {
		doc.Arguments = append(doc.Arguments, value{arg})
	}
	return encode(doc)
}

func (d Domain) devices() devices {
	def := &d.Def
	serial := at(slotSerial)
	dev := devices{
		Emulator: d.Emulator,
		Disks:    d.disks(),
		Controllers: []controller{
			{Type: "usb", Model: "none"},
			{Type: "pci", Model: "pcie-root"},
			{Type: "virtio-serial", Address: &serial},
		},
		Serial: []chardev{{
			Type:   "pty", // libvirt opens no other console to anybody
			Target: target{Port: "0"},
		}},
		Balloon: model{"none"},
		RNG:     &rng{"virtio", model{"builtin"}, at(slotRNG)},
		// The guest's kernel reports its panic through this port.
		Panic: &model{"isa"},
	}
	if d.RunAs == nil {
		dev.Serial[0].Log = &logXML{d.Files.ConsoleLog, "on"}
	}
	if def.Agent {
		dev.Channels = []chardev{{
			Type: "unix", Source: &source{Mode: "bind", Path: d.Agent},
			Target: target{Type: "virtio", Name: providers.AgentPort},
		}}
	}
	if d.far() {
		// libvirt connects whoever opens a channel with the socket at the channel's
		// path, over whatever transport they come. The cable's netdev makes its own
		// socket in the place of that of a channel which is there for its name alone.
		if def.MAC != "" {
			dev.Channels = append(dev.Channels, chardev{
				Type: "unix", Source: &source{Mode: "bind", Path: d.NIC},
				Target: target{Type: "virtio", Name: cablePort},
			})
		}
	}
	if d.Network != "" {
		dev.Interfaces = []interfaceXML{{
			Type: "network", MAC: hardware{lab.MACOf(def.Direct)}, Source: networkSource{d.Network},
			Model: card{"virtio"}, ROM: rom{"no"}, Address: at(slotDirect),
		}}
	}
	for i, m := range def.Mounts {
		// Squashed, the guest sees the host's owners and modes, and what it makes
		// belongs to QEMU's user.
		f := filesystem{
			Type: "mount", Access: "squash", Devices: "remap",
			Source: source{Dir: m.Path}, Target: target{Dir: m.Tag}, Address: at(slotMounts + i),
		}
		if !m.Writable {
			f.ReadOnly = &struct{}{}
		}
		dev.Filesystems = append(dev.Filesystems, f)
	}
	return dev
}

// cablePort is the name of the channel by which the network cable of a machine of
// another host is reached. The guest sees a port of that name, to which nobody speaks.
const cablePort = "dev.labfile.cable.0"

func (d Domain) disks() []diskXML {
	def := &d.Def
	below := end()
	below = below.under(def.Image.Format, d.Files.Disk)
	for _, path := range d.Files.Layers {
		below = below.under("qcow2", path)
	}
	last := len(d.Files.Overlays) - 1
	for _, path := range d.Files.Overlays[:last] {
		below = below.under("qcow2", path)
	}
	disks := []diskXML{{
		Type: "file", Device: "disk",
		// Flushes are dropped: a machine that the host's crash may have damaged is
		// replaced, not repaired.
		Driver:  driver{"qemu", "qcow2", "unsafe", "unmap"},
		Source:  source{File: d.Files.Overlays[last]},
		Backing: below, Target: target{Dev: mainDisk, Bus: "virtio"}, Boot: &boot{1}, Address: at(slotDisk),
	}}
	for i, v := range def.Volumes {
		below := end()
		for _, path := range v.Layers {
			below = below.under("qcow2", path)
		}
		disk := diskXML{
			Type: "file", Device: "disk",
			// Volumes outlive the machine, so flushes reach the host's disk.
			Driver: driver{"qemu", "qcow2", "writeback", "unmap"},
			Source: source{File: v.Path}, Backing: below,
			Target: target{Dev: volumeDisk(i), Bus: "virtio"}, Serial: v.Name, Address: at(slotVolumes + i),
		}
		if v.ReadOnly {
			disk.ReadOnly = &struct{}{}
		}
		disks = append(disks, disk)
	}
	if def.Seed {
		disks = append(disks, diskXML{
			Type: "file", Device: "disk", Driver: driver{Name: "qemu", Type: "raw"},
			Source: source{File: d.Files.Seed}, Backing: end(),
			Target: target{Dev: "vdz", Bus: "virtio"}, ReadOnly: &struct{}{}, Address: at(slotSeed),
		})
	}
	return disks
}

// volumeDisk is what libvirt calls the disk of the i-th volume.
func volumeDisk(i int) string { return fmt.Sprintf("vd%c", 'b'+i) }

// end is what lies below the lowest file: nothing.
func end() *backing { return &backing{} }

// under puts a file on top of what b describes.
func (b *backing) under(format, path string) *backing {
	return &backing{Type: "file", Format: &formatIs{format}, Source: &source{File: path}, Below: b}
}

// arguments is what libvirt has no words for. libvirt 9.0 knows no stream netdev,
// by which the lab's own switch plugs in. The second monitor is one that nobody
// talks to: its input is a file with the one command that makes it speak, its output
// a file that collects the events. So the reason of an exit is on disk, whether the
// daemon lived to see it or not.
func (d Domain) arguments() []string {
	var args []string
	if d.Files.Events != "" {
		args = []string{
			"-chardev", "pipe,id=labevents,path=" + comma(d.Files.Events),
			"-mon", "chardev=labevents,mode=control",
		}
	}
	if d.Def.MAC != "" {
		args = append(args,
			"-netdev", "stream,id=labnic,server=on,addr.type=unix,addr.path="+comma(d.NIC),
			// No boot ROM: a machine never boots from the network.
			"-device", fmt.Sprintf("virtio-net-pci,id=labnic,netdev=labnic,mac=%s,romfile=,addr=%#x", d.Def.MAC, slotNIC))
	}
	if d.RunAs != nil {
		// The system's virtlogd would write a log of root's, and a new one every 2 MiB.
		// QEMU's own is the caller's. (-set takes a value as it is, commas too.)
		args = append(args,
			"-set", "chardev.charserial0.logfile="+d.Files.ConsoleLog,
			"-set", "chardev.charserial0.logappend=on")
	}
	return args
}

// labels has the system's daemon run QEMU as the caller, and leave the owners of all
// files as they are. The profiles that libvirt writes for AppArmor and SELinux know
// nothing of what goes to QEMU as arguments.
func (d Domain) labels() []label {
	var all []label
	if d.RunAs != nil {
		// With a "+" it is a number, never a name.
		all = append(all, label{"static", modelDAC, "no", fmt.Sprintf("+%d:+%d", d.RunAs.UID, d.RunAs.GID)})
	}
	for _, model := range d.Unconfined {
		all = append(all, label{Type: "none", Model: model})
	}
	return all
}

// comma escapes a value within QEMU's comma-separated options.
func comma(s string) string { return strings.ReplaceAll(s, ",", ",,") }

// snapshot asks for an overlay, which is there already, on top of one of the machine's
// disks and for nothing of the others, as they stand in the live document.
func snapshot(document, disk, overlay string) (string, error) {
	var s seen
	if err := xml.Unmarshal([]byte(document), &s); err != nil {
		return "", fmt.Errorf("reading a domain's document: %w", err)
	}
	var doc snapshotXML
	for _, d := range s.Disks {
		one := snapshotDisk{Name: d.Target.Dev, Snapshot: "no"}
		if d.Target.Dev == disk {
			one = snapshotDisk{
				Name: disk, Snapshot: "external", Type: "file",
				Driver: &driver{Type: "qcow2"}, Source: &source{File: overlay},
			}
		}
		doc.Disks = append(doc.Disks, one)
	}
	return encode(doc)
}
