// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"encoding/json"
	"fmt"
	"strings"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/providers"
	"github.com/labfile/lab/providers/accel"
)

// The file descriptors that a machine's QEMU inherits.
const (
	monitorFD = 3 // the listening socket of its monitor
	aliveFD   = 4 // holds the generation's "alive" lock for as long as QEMU lives
)

// Where devices sit on the PCI bus. Fixed places keep what the guest sees (disk
// order, names of network interfaces) independent of which devices there are.
const (
	slotDisk   = 3
	slotNIC    = 4
	slotSerial = 5
	slotRNG    = 6
	slotSeed   = 7

	slotVolumes = 8  // and the following providers.MaxVolumes
	slotMounts  = 20 // and the following providers.MaxMounts; q35 has its own from 0x1f
)

// Launch is everything that shapes the command line of a machine's QEMU. All
// paths are absolute: QEMU runs in "/".
type Launch struct {
	Name   string // shown by ps, such as "shop-1f3a9c2b/web@3"
	Accel  string // "kvm" or "tcg"
	CPUs   int
	Memory lab.Bytes

	Base     string    // what the disk begins with
	Format   string    // of Base: "qcow2" or "raw"
	Layers   []string  // qcow2 overlays of the image above Base, lowest first
	Overlays []Overlay // the machine's own above those, lowest first; it writes to the last
	Seed     string    // a raw volume; empty for none
	Volumes  []providers.Volume
	Mounts   []providers.Mount

	Kernel, Initrd, Append string // empty Kernel boots from the disk

	MAC         string // empty for a machine without a NIC
	NICSocket   string
	AgentSocket string // empty for a machine without the agent's port

	ConsoleSocket string
	ConsoleLog    string
	PIDFile       string
	Events        string // prefix of the event record: EVENTS.in and EVENTS.out
}

// Overlay is a qcow2 file of the machine's own disk.
type Overlay struct {
	Path string
	Node string // the name by which the monitor knows it
}

// Argv returns the arguments of QEMU, without the program. It looks at nothing
// but l.
func (l Launch) Argv() []string {
	args := []string{
		// Nothing but what is named here: no default devices, no configuration
		// of the user's, no program started and no privilege gained by QEMU.
		"-nodefaults", "-no-user-config",
		"-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
		"-name", "guest=" + comma(l.Name),
		// With the older chipset a guest sets up an ACPI interrupt link for each
		// virtio device, a tenth of a second each under emulation.
		"-machine", "q35,dump-guest-core=off",
	}
	if l.Accel == "kvm" {
		args = append(args, "-accel", "kvm", "-cpu", "host")
	} else {
		args = append(args, "-accel", "tcg,thread=multi", "-cpu", "max,-"+strings.Join(accel.Without, ",-"))
	}
	args = append(args,
		"-smp", fmt.Sprint(l.CPUs),
		"-m", fmt.Sprintf("size=%dk", l.Memory/lab.KiB),
		"-rtc", "base=utc",
		"-display", "none",
		"-msg", "timestamp=on",
		"-pidfile", l.PIDFile,

		"-chardev", fmt.Sprintf("socket,id=monitor,fd=%d,server=on,wait=off", monitorFD),
		"-mon", "chardev=monitor,mode=control",
		// A second monitor that nobody talks to as long as the first one's socket is
		// there: its input is a FIFO, from which it reads the one command that makes
		// it speak, its output a file that collects the events. So the reason of an
		// exit is on disk even if no process watched.
		"-chardev", "pipe,id=events,path="+comma(l.Events),
		"-mon", "chardev=events,mode=control",

		"-chardev", "socket,id=console,path="+comma(l.ConsoleSocket)+
			",server=on,wait=off,logappend=on,logfile="+comma(l.ConsoleLog),
		"-serial", "chardev:console",

		"-blockdev", l.disk(),
		"-device", fmt.Sprintf("virtio-blk-pci,id=%s,drive=%s,bootindex=1,addr=%#x",
			deviceDisk, l.Overlays[len(l.Overlays)-1].Node, slotDisk),
	)
	if l.Seed != "" {
		args = append(args,
			"-blockdev", encode(node{
				"driver": "raw", "node-name": "seed", "read-only": true,
				"file": node{"driver": "file", "filename": l.Seed, "read-only": true},
			}),
			"-device", fmt.Sprintf("virtio-blk-pci,id=seed,drive=seed,addr=%#x", slotSeed))
	}
	args = append(args, l.storage()...)
	if l.MAC != "" {
		args = append(args,
			"-netdev", "stream,id=nic,server=on,addr.type=unix,addr.path="+comma(l.NICSocket),
			// No boot ROM: a machine never boots from the network.
			"-device", fmt.Sprintf("virtio-net-pci,id=nic,netdev=nic,mac=%s,romfile=,addr=%#x", l.MAC, slotNIC))
	}
	if l.AgentSocket != "" {
		args = append(args,
			"-chardev", "socket,id=agent,path="+comma(l.AgentSocket)+",server=on,wait=off",
			"-device", fmt.Sprintf("virtio-serial-pci,id=serial,addr=%#x", slotSerial),
			"-device", "virtserialport,bus=serial.0,nr=1,chardev=agent,name="+providers.AgentPort)
	}
	args = append(args,
		"-object", "rng-builtin,id=rng",
		"-device", fmt.Sprintf("virtio-rng-pci,rng=rng,addr=%#x", slotRNG),
		// The guest's kernel reports its panic through this port, and QEMU ends
		// with that as the reason.
		"-device", "pvpanic",
		"-action", "panic=shutdown",
	)
	if l.Kernel != "" {
		args = append(args, "-kernel", l.Kernel)
		if l.Initrd != "" {
			args = append(args, "-initrd", l.Initrd)
		}
		if l.Append != "" {
			args = append(args, "-append", l.Append)
		}
	}
	return args
}

// node is a blockdev node as JSON. encoding/json sorts the keys, so the same
// node is always the same text.
type node map[string]any

// deviceDisk is the id of the device that the machine's disk is attached to.
const deviceDisk = "disk"

// disk names the driver of every layer and says what lies under each, so that
// QEMU neither probes a format nor believes a backing file named in a header.
func (l Launch) disk() string {
	below := node{"driver": l.Format, "read-only": true, "file": node{"driver": "file", "filename": l.Base, "read-only": true}}
	if l.Format == "qcow2" {
		below["backing"] = nil
	}
	for _, path := range l.Layers {
		below = node{
			"driver": "qcow2", "read-only": true, "backing": below,
			"file": node{"driver": "file", "filename": path, "read-only": true},
		}
	}
	for i, o := range l.Overlays {
		n := o.blockdev()
		if i < len(l.Overlays)-1 {
			// Only a merge writes to what lies below the topmost. It opens the
			// file anew for that.
			n["read-only"] = true
			n["file"].(node)["auto-read-only"] = true
		}
		n["backing"] = below
		below = n
	}
	return encode(below)
}

// blockdev is the overlay as a node with nothing below it. Flushes are dropped: a
// machine that the host's crash may have damaged is replaced, not repaired, and a
// guest's fsync costs nothing.
func (o Overlay) blockdev() node {
	noFlush := node{"no-flush": true}
	return node{
		"driver": "qcow2", "node-name": o.Node, "discard": "unmap", "cache": noFlush, "backing": nil,
		"file": node{"driver": "file", "filename": o.Path, "discard": "unmap", "cache": noFlush},
	}
}

// storage attaches volumes and mounts. Volumes outlive the machine, so flushes
// reach the host's disk.
func (l Launch) storage() []string {
	var args []string
	for i, v := range l.Volumes {
		file := node{"driver": "file", "filename": v.Path, "discard": "unmap"}
		n := node{
			"driver": "qcow2", "node-name": fmt.Sprintf("volume%d", i), "discard": "unmap",
			"backing": nil, "file": file,
		}
		for _, path := range v.Layers {
			n["backing"] = node{
				"driver": "qcow2", "read-only": true, "backing": n["backing"],
				"file": node{"driver": "file", "filename": path, "read-only": true},
			}
		}
		if v.ReadOnly {
			n["read-only"], file["read-only"] = true, true
		}
		args = append(args, "-blockdev", encode(n),
			"-device", fmt.Sprintf("virtio-blk-pci,id=volume%d,drive=volume%d,serial=%s,addr=%#x", i, i, v.Name, slotVolumes+i))
	}
	for i, m := range l.Mounts {
		// Without a mapping the guest sees the host's owners and modes, and what it
		// makes belongs to QEMU's user: "passthrough" would insist on the guest's
		// user, and the mapped models keep the mode where the host's tools do not
		// look for it.
		fs := fmt.Sprintf("local,id=mount%d,path=%s,security_model=none,multidevs=remap", i, comma(m.Path))
		if !m.Writable {
			fs += ",readonly=on"
		}
		args = append(args, "-fsdev", fs,
			"-device", fmt.Sprintf("virtio-9p-pci,id=mount%d,fsdev=mount%d,mount_tag=%s,addr=%#x", i, i, m.Tag, slotMounts+i))
	}
	return args
}

func encode(n node) string {
	b, err := json.Marshal(n)
	if err != nil {
		panic("a blockdev node holds strings, booleans and nodes only: " + err.Error())
	}
	return string(b)
}

// comma escapes a value within QEMU's comma-separated options.
func comma(s string) string { return strings.ReplaceAll(s, ",", ",,") }
