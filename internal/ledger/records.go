// SPDX-License-Identifier: Apache-2.0

package ledger

import (
	"net/netip"
	"reflect"
	"time"

	"github.com/labfile/lab/internal/lab"
)

// Type says what a record records. Types are never renamed: old ledgers are
// read for ever. Intents are in the present tense, outcomes in the past.
type Type string

// The types of records, with the type of their data.
const (
	LabOpened        Type = "lab.opened"        // Opened
	MachineCreate    Type = "machine.create"    // Create: intent
	MachineBooted    Type = "machine.booted"    // Booted: its boot steps have run
	MachineReady     Type = "machine.ready"     // Ready
	MachineFailed    Type = "machine.failed"    // Failed
	MachineChanged   Type = "machine.changed"   // Changed: applied in place
	MachineStop      Type = "machine.stop"      // intent
	MachineStopped   Type = "machine.stopped"   // Stopped
	MachineStays     Type = "machine.stays"     // Stays: it could not be asked to shut down, and runs on
	MachineProxied   Type = "machine.proxied"   // Proxied
	MachineStart     Type = "machine.start"     // intent
	MachineExited    Type = "machine.exited"    // Exited: seen by the supervisor
	MachineRestored  Type = "machine.restored"  // Restored: it was not replaced after all
	MachinePromoted  Type = "machine.promoted"  // a generation beside the present one is the present one from now on
	MachineRetired   Type = "machine.retired"   // Retired: it gave way, or never took over, and is kept
	MachineDestroy   Type = "machine.destroy"   // Destroy: intent
	MachineDestroyed Type = "machine.destroyed" //
)

// Opened is the data of LabOpened.
type Opened struct {
	Name     string `json:"name"`
	File     string `json:"file"` // absolute path of the Labfile
	Provider string `json:"provider"`
	URI      string `json:"uri,omitempty"` // of the daemon that the provider talks to, if it talks to one

	Expires time.Duration `json:"expires,omitempty"` // nanoseconds from State.Since until the lab is destroyed; 0 means never
	Expose  []Exposed     `json:"expose,omitempty"`  // sorted

	InheritProxy bool `json:"inheritProxy,omitempty"` // guests get proxy settings, which are not recorded

	Folder Folder `json:"folder,omitzero"` // the one of the Labfile; older records lack it
}

// Folder tells one folder of this host from another, wherever it is moved.
type Folder struct {
	Device uint64 `json:"device"`
	Inode  uint64 `json:"inode"`
	Born   int64  `json:"born"` // nanoseconds since 1970: inodes are used again
}

// Equal reports whether two records say the same.
func (o Opened) Equal(other Opened) bool { return reflect.DeepEqual(o, other) }

// Exposed is a port of the host that the machines reach under a name.
type Exposed struct {
	Name string `json:"name"`
	Port uint16 `json:"port"`
}

// ExposedOf returns what is recorded of the ports that a lab exposes; nil if there are none.
func ExposedOf(all []lab.Exposed) []Exposed {
	var out []Exposed
	for _, e := range all {
		out = append(out, Exposed(e))
	}
	return out
}

// Exposes returns the ports that the lab exposes.
func (o Opened) Exposes() []lab.Exposed {
	var out []lab.Exposed
	for _, e := range o.Expose {
		out = append(out, lab.Exposed(e))
	}
	return out
}

// Create is the data of MachineCreate: all that shapes the generation.
type Create struct {
	Spec    Spec       `json:"spec"`
	Address netip.Addr `json:"address"`
	Image   string     `json:"image"` // digest: the key of the last layer, or the box's
	Agent   bool       `json:"agent,omitempty"`
	User    string     `json:"user,omitempty"` // whom the box logs in
	Why     []string   `json:"why,omitempty"`

	Box    string      `json:"box,omitempty"`    // digest of the box; older records lack it, and their image is the box
	Layers []lab.Layer `json:"layers,omitempty"` // what was baked on top of the box

	From     string `json:"from,omitempty"`     // where the box came from, as the Labfile said it
	Rollback int    `json:"rollback,omitempty"` // the generation whose image and spec these are

	Vagrant bool `json:"vagrant,omitempty"` // its box lets in the published keys, until it is told others

	Direct netip.Prefix `json:"direct,omitzero"` // its address in a network where it runs, if it is in one

	Standby bool `json:"standby,omitempty"` // it stands by beside the present one until it is promoted
}

// Booted is the data of MachineBooted: every step of boot has run and succeeded. A
// generation has at most one. One that has steps and no such record never was ready.
type Booted struct {
	Digest string        `json:"digest"` // lab.BootDigest
	Steps  int           `json:"steps"`  // how many there were
	Took   time.Duration `json:"took"`   // nanoseconds
}

// Ready is the data of MachineReady.
type Ready struct {
	Took  time.Duration `json:"took"` // nanoseconds since the intent
	Ports []Port        `json:"ports,omitempty"`
}

// Failed is the data of MachineFailed.
type Failed struct {
	Stage string `json:"stage"`
	Error string `json:"error"`

	Boot *BootFailed `json:"boot,omitempty"` // the boot step that failed, if one did
}

// BootFailed is a boot step that failed.
type BootFailed struct {
	Step   int    `json:"step"` // counts from 1
	Of     int    `json:"of"`   // how many steps there are
	Text   string `json:"text"` // the step in a few words
	Place  string `json:"place,omitempty"`
	Code   int    `json:"code,omitempty"`   // its exit code; 0 if it did not end by itself
	Signal string `json:"signal,omitempty"` // that ended it, without SIG
}

// Changed is the data of MachineChanged: the spec that holds from now on.
type Changed struct {
	Spec  Spec   `json:"spec"`
	Ports []Port `json:"ports,omitempty"`
}

// Restored is the data of MachineRestored: an earlier generation, which is stopped,
// is the present one again, because the one that was to take its place is undone. Of a
// generation that the ledger still knows, it tells the ports alone.
type Restored struct {
	Create Create    `json:"create"`
	Born   time.Time `json:"born"`
	Ready  time.Time `json:"ready"`
	Ports  []Port    `json:"ports,omitempty"`

	Tainted []string `json:"tainted,omitempty"` // it still is
}

// Retired is the data of MachineRetired: a generation that is not the present one is
// kept on purpose, stopped, with its disk and its logs.
type Retired struct {
	Failed bool `json:"failed,omitempty"` // it never became ready
}

// Stopped is the data of MachineStopped. Older records have none.
type Stopped struct {
	Forced bool   `json:"forced,omitempty"` // its power was cut
	Why    string `json:"why,omitempty"`    // of Forced; empty if the command means to
}

// Stays is the data of MachineStays.
type Stays struct {
	Why string `json:"why"`
}

// Proxied is the data of MachineProxied: whether the guest has proxy settings that lab wrote.
// What they are is not recorded. They may have been about to be written.
type Proxied struct {
	Written bool `json:"written"`
}

// Exited is the data of MachineExited.
type Exited struct {
	Reason string `json:"reason"`
	Detail string `json:"detail,omitempty"`
}

// Destroy is the data of MachineDestroy.
type Destroy struct {
	Why []string `json:"why,omitempty"`
}

// Port is a forward as it was bound.
type Port struct {
	Host  uint16 `json:"host"`
	Guest uint16 `json:"guest"`
	UDP   bool   `json:"udp,omitempty"` // else TCP
}

// Protocol is the suffix of a UDP port, "/udp"; empty for TCP.
func (p Port) Protocol() string {
	if p.UDP {
		return "/udp"
	}
	return ""
}

// Spec is a lab.Machine as the ledger writes it.
type Spec struct {
	Role      string          `json:"role"`
	Box       string          `json:"box"`
	CPUs      int             `json:"cpus"`
	Memory    lab.Bytes       `json:"memory"`
	Disk      lab.Bytes       `json:"disk,omitempty"`
	DependsOn []lab.Name      `json:"dependsOn,omitempty"`
	Ports     []Port          `json:"ports,omitempty"`
	Ready     []Check         `json:"ready,omitempty"`
	User      string          `json:"user,omitempty"`
	UserData  string          `json:"userData,omitempty"`
	Network   lab.NetworkKind `json:"network,omitempty"`
	Tests     []lab.Test      `json:"tests,omitempty"` // the Labfile's checks on it
	Life
}

// Check is a lab.Check as the ledger writes it.
type Check struct {
	Kind     lab.CheckKind `json:"kind"`
	Port     uint16        `json:"port,omitempty"`
	Path     string        `json:"path,omitempty"`
	Status   int           `json:"status,omitempty"`
	Command  string        `json:"command,omitempty"`
	Pattern  string        `json:"pattern,omitempty"`
	Timeout  time.Duration `json:"timeout"`
	Interval time.Duration `json:"interval"`
}

// SpecOf returns m as the ledger writes it.
func SpecOf(m lab.Machine) Spec {
	s := Spec{
		Role: m.Role, Box: m.Box, CPUs: m.CPUs, Memory: m.Memory, Disk: m.Disk,
		DependsOn: m.DependsOn, User: m.User, UserData: m.UserData, Network: m.Network,
	}
	s.Tests = m.Tests
	s.Life = lifeOf(m)
	for _, f := range m.Ports {
		s.Ports = append(s.Ports, Port{f.HostPort, f.GuestPort, f.UDP})
	}
	for _, c := range m.Ready {
		s.Ready = append(s.Ready, Check(c))
	}
	return s
}

// Machine returns the machine that the spec describes.
func (s Spec) Machine(name lab.Name) lab.Machine {
	m := lab.Machine{
		Name: name, Role: s.Role, Box: s.Box, CPUs: s.CPUs, Memory: s.Memory, Disk: s.Disk,
		DependsOn: s.DependsOn, User: s.User, UserData: s.UserData, Network: s.Network,
	}
	m.Tests = s.Tests
	s.fill(&m)
	for _, p := range s.Ports {
		m.Ports = append(m.Ports, lab.Forward{HostPort: p.Host, GuestPort: p.Guest, UDP: p.UDP})
	}
	for _, c := range s.Ready {
		m.Ready = append(m.Ready, lab.Check(c))
	}
	return m
}
