// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"encoding/json"
	"fmt"
	"strings"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/providers"
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
)

// Launch is everything that shapes the command line of a machine's QEMU. All
// paths are absolute: QEMU runs in "/".
type Launch struct {
	Name   string // shown by ps, such as "shop-1f3a9c2b/web@3"
	Accel  string // "kvm" or "tcg"
	CPUs   int
	Memory lab.Bytes

	Overlay string // the machine's own disk, qcow2
	Base    string // what lies under it
	Format  string // of Base: "qcow2" or "raw"
	Seed    string // a raw volume; empty for none

	Kernel, Initrd, Append string // empty Kernel boots from the disk

	MAC         string // empty for a machine without a NIC
	NICSocket   string
	AgentSocket string // empty for a machine without the agent's port

	ConsoleSocket string
	ConsoleLog    string
	PIDFile       string
	Events        string // prefix of the event record: EVENTS.in and EVENTS.out
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
		// invtsc would block saving the machine's state.
		args = append(args, "-accel", "tcg,thread=multi", "-cpu", "max,-invtsc")
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
		// A second monitor that nobody talks to: its input is a file with the
		// one command that makes it speak, its output a file that collects the
		// events. So the reason of an exit is on disk, whoever watched.
		"-chardev", "pipe,id=events,path="+comma(l.Events),
		"-mon", "chardev=events,mode=control",

		"-chardev", "socket,id=console,path="+comma(l.ConsoleSocket)+
			",server=on,wait=off,logappend=on,logfile="+comma(l.ConsoleLog),
		"-serial", "chardev:console",

		"-blockdev", l.disk(),
		"-device", fmt.Sprintf("virtio-blk-pci,id=disk,drive=disk,bootindex=1,addr=%#x", slotDisk),
	)
	if l.Seed != "" {
		args = append(args,
			"-blockdev", encode(node{
				"driver": "raw", "node-name": "seed", "read-only": true,
				"file": node{"driver": "file", "filename": l.Seed, "read-only": true},
			}),
			"-device", fmt.Sprintf("virtio-blk-pci,id=seed,drive=seed,addr=%#x", slotSeed))
	}
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

// disk names the driver of every layer and says what lies under each, so that
// QEMU neither probes a format nor believes a backing file named in a header.
// Flushes are dropped: a machine that the host's crash may have damaged is
// replaced, not repaired, and a guest's fsync costs nothing.
func (l Launch) disk() string {
	file := node{"driver": "file", "filename": l.Base, "read-only": true}
	base := node{"driver": l.Format, "read-only": true, "file": file}
	if l.Format == "qcow2" {
		base["backing"] = nil
	}
	noFlush := node{"no-flush": true}
	return encode(node{
		"driver": "qcow2", "node-name": "disk", "discard": "unmap", "cache": noFlush,
		"file":    node{"driver": "file", "filename": l.Overlay, "discard": "unmap", "cache": noFlush},
		"backing": base,
	})
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
