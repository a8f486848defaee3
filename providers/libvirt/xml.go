// SPDX-License-Identifier: Apache-2.0

package libvirt

import (
	"encoding/xml"
	"fmt"
)

// The parts of libvirt's documents that lab writes and reads
// (https://libvirt.org/formatdomain.html). Elements come in the order of libvirt's
// own output. encoding/xml writes a prefix that stands in a name as it is.

const (
	// namespace marks what lab keeps in a domain's metadata.
	namespace = "https://labfile.dev/libvirt/1"
	// qemuNamespace is libvirt's for what it hands on to QEMU.
	qemuNamespace = "http://libvirt.org/schemas/domain/qemu/1.0"
)

type domainXML struct {
	XMLName    xml.Name  `xml:"domain"`
	Type       string    `xml:"type,attr"`
	QEMU       string    `xml:"xmlns:qemu,attr"`
	Name       string    `xml:"name"`
	UUID       string    `xml:"uuid,omitempty"`
	Title      string    `xml:"title,omitempty"`
	Owner      *ownerXML `xml:"metadata>lab:machine"`
	Memory     memory    `xml:"memory"`
	CPUs       int       `xml:"vcpu"`
	OS         osXML     `xml:"os"`
	ACPI       struct{}  `xml:"features>acpi"`
	APIC       struct{}  `xml:"features>apic"`
	CPU        cpuXML    `xml:"cpu"`
	Clock      clock     `xml:"clock"`
	OnPowerOff string    `xml:"on_poweroff"`
	OnReboot   string    `xml:"on_reboot"`
	OnCrash    string    `xml:"on_crash"`
	Devices    devices   `xml:"devices"`
	Labels     []label   `xml:"seclabel"`
	Arguments  []value   `xml:"qemu:commandline>qemu:arg,omitempty"`
}

// label says what one of the daemon's security models does with a domain.
type label struct {
	Type    string `xml:"type,attr"`
	Model   string `xml:"model,attr"`
	Relabel string `xml:"relabel,attr,omitempty"`
	Label   string `xml:"label,omitempty"`
}

// ownerXML says whose machine a domain is. It stays with the domain whatever it is
// called.
type ownerXML struct {
	Namespace  string `xml:"xmlns:lab,attr"`
	Lab        string `xml:"lab,attr"`
	Machine    string `xml:"name,attr"`
	Generation int    `xml:"generation,attr"`
	Directory  string `xml:"directory,attr"` // of the generation: two data homes may know labs of one name
	Definition cdata  `xml:"lab:definition"` // local.Definition as JSON
	Stored     *cdata `xml:"lab:stored"`     // of a machine of another host, stored as JSON
}

// cdata is text that stays readable.
type cdata struct {
	Text string `xml:",cdata"`
}

type memory struct {
	Unit     string `xml:"unit,attr"`
	DumpCore string `xml:"dumpCore,attr"`
	Size     int64  `xml:",chardata"`
}

type osXML struct {
	Type    osType `xml:"type"`
	Kernel  string `xml:"kernel,omitempty"`
	Initrd  string `xml:"initrd,omitempty"`
	Cmdline string `xml:"cmdline,omitempty"`
}

type osType struct {
	Arch    string `xml:"arch,attr"`
	Machine string `xml:"machine,attr"`
	Type    string `xml:",chardata"`
}

type cpuXML struct {
	Mode     string    `xml:"mode,attr"`
	Check    string    `xml:"check,attr"`
	Features []feature `xml:"feature"`
}

type feature struct {
	Policy string `xml:"policy,attr"`
	Name   string `xml:"name,attr"`
}

type clock struct {
	Offset string `xml:"offset,attr"`
}

type value struct {
	Value string `xml:"value,attr"`
}

type devices struct {
	Emulator    string         `xml:"emulator,omitempty"`
	Disks       []diskXML      `xml:"disk"`
	Controllers []controller   `xml:"controller"`
	Filesystems []filesystem   `xml:"filesystem"`
	Interfaces  []interfaceXML `xml:"interface"`
	Serial      []chardev      `xml:"serial"`
	Channels    []chardev      `xml:"channel"`
	Balloon     model          `xml:"memballoon"`
	RNG         *rng           `xml:"rng"`
	Panic       *model         `xml:"panic"`
}

type diskXML struct {
	Type     string    `xml:"type,attr"`
	Device   string    `xml:"device,attr"`
	Driver   driver    `xml:"driver"`
	Source   source    `xml:"source"`
	Backing  *backing  `xml:"backingStore"`
	Target   target    `xml:"target"`
	ReadOnly *struct{} `xml:"readonly"`
	Serial   string    `xml:"serial,omitempty"`
	Boot     *boot     `xml:"boot"`
	Address  pci       `xml:"address"`
}

// copyXML is where a disk is copied to.
type copyXML struct {
	XMLName xml.Name `xml:"disk"`
	Type    string   `xml:"type,attr"`
	Driver  driver   `xml:"driver"`
	Source  source   `xml:"source"`
}

type driver struct {
	Name    string `xml:"name,attr,omitempty"`
	Type    string `xml:"type,attr"`
	Cache   string `xml:"cache,attr,omitempty"`
	Discard string `xml:"discard,attr,omitempty"`
}

type source struct {
	File string `xml:"file,attr,omitempty"`
	Dir  string `xml:"dir,attr,omitempty"`
	Mode string `xml:"mode,attr,omitempty"`
	Path string `xml:"path,attr,omitempty"`
}

// backing is one file below another. An empty one ends the chain, so that libvirt
// neither probes a format nor follows what stands in a header.
type backing struct {
	Type   string    `xml:"type,attr,omitempty"`
	Format *formatIs `xml:"format"`
	Source *source   `xml:"source"`
	Below  *backing  `xml:"backingStore"`
}

type formatIs struct {
	Type string `xml:"type,attr"`
}

type target struct {
	Dev  string `xml:"dev,attr,omitempty"`
	Dir  string `xml:"dir,attr,omitempty"`
	Bus  string `xml:"bus,attr,omitempty"`
	Type string `xml:"type,attr,omitempty"`
	Name string `xml:"name,attr,omitempty"`
	Port string `xml:"port,attr,omitempty"`
}

type boot struct {
	Order int `xml:"order,attr"`
}

type pci struct {
	Type     string `xml:"type,attr"`
	Domain   string `xml:"domain,attr"`
	Bus      string `xml:"bus,attr"`
	Slot     string `xml:"slot,attr"`
	Function string `xml:"function,attr"`
}

func at(slot int) pci { return pci{"pci", "0x0000", "0x00", fmt.Sprintf("0x%02x", slot), "0x0"} }

type interfaceXML struct {
	Type    string        `xml:"type,attr"`
	MAC     hardware      `xml:"mac"`
	Source  networkSource `xml:"source"`
	Model   card          `xml:"model"`
	ROM     rom           `xml:"rom"`
	Address pci           `xml:"address"`
}

// card is the model of a network card.
type card struct {
	Type string `xml:"type,attr"`
}

type hardware struct {
	Address string `xml:"address,attr"`
}

type networkSource struct {
	Network string `xml:"network,attr"`
}

// rom says whether the card has one to boot from.
type rom struct {
	Enabled string `xml:"enabled,attr"`
}

type controller struct {
	Type    string `xml:"type,attr"`
	Index   int    `xml:"index,attr"`
	Model   string `xml:"model,attr,omitempty"`
	Address *pci   `xml:"address"`
}

type filesystem struct {
	Type     string    `xml:"type,attr"`
	Access   string    `xml:"accessmode,attr"`
	Devices  string    `xml:"multidevs,attr"`
	Source   source    `xml:"source"`
	Target   target    `xml:"target"`
	ReadOnly *struct{} `xml:"readonly"`
	Address  pci       `xml:"address"`
}

type chardev struct {
	Type   string  `xml:"type,attr"`
	Source *source `xml:"source"`
	Log    *logXML `xml:"log"`
	Target target  `xml:"target"`
}

type logXML struct {
	File   string `xml:"file,attr"`
	Append string `xml:"append,attr"`
}

type model struct {
	Model string `xml:"model,attr"`
}

type rng struct {
	Model   string `xml:"model,attr"`
	Backend model  `xml:"backend"`
	Address pci    `xml:"address"`
}

// snapshotXML is what a snapshot of disks is asked for by.
type snapshotXML struct {
	XMLName xml.Name       `xml:"domainsnapshot"`
	Disks   []snapshotDisk `xml:"disks>disk"`
}

type snapshotDisk struct {
	Name     string  `xml:"name,attr"`
	Snapshot string  `xml:"snapshot,attr"`
	Type     string  `xml:"type,attr,omitempty"`
	Driver   *driver `xml:"driver"`
	Source   *source `xml:"source"`
}

// encode renders a document.
func encode(doc any) (string, error) {
	b, err := xml.MarshalIndent(doc, "", "  ")
	if err != nil {
		return "", fmt.Errorf("writing a document for libvirt: %w", err)
	}
	return string(b) + "\n", nil
}
