// SPDX-License-Identifier: Apache-2.0

// Package lab holds the words of the project as types: what a lab is, what a
// machine is, what a generation is. It imports the standard library only, and
// everything else imports it.
package lab

import (
	"crypto/sha256"
	"fmt"
	"net/netip"
	"regexp"
	"strings"
	"time"
)

// ID names one running instance of a Labfile among all labs of a user, such as
// "shop-1f3a9c2b". It is a DNS label, so it can stand in file names, host names
// and domain metadata alike.
type ID string

// MaxID is the length of the longest ID, in bytes.
const MaxID = 25

// NewID returns the ID of the instance of a Labfile: name, shortened, and a hash
// of the Labfile's absolute path and the name. Two instances of one Labfile have
// two names, so they never meet.
func NewID(name, file string) ID { return NthID(name, file, 0) }

// NthID returns another ID for the same Labfile, n above 0: for when the folder that had
// the ones before was moved away with its lab, and another one is in its place. Of n 0 it
// is NewID's.
func NthID(name, file string, n int) ID {
	text := file + "\x00" + name
	if n > 0 {
		text += fmt.Sprintf("\x00%d", n)
	}
	sum := sha256.Sum256([]byte(text))
	hash := fmt.Sprintf("-%x", sum[:4])
	if len(name) > MaxID-len(hash) {
		name = strings.TrimRight(name[:MaxID-len(hash)], "-")
	}
	return ID(name + hash)
}

// Name is the name of a machine within its lab: a DNS label (RFC 1123), such as
// "db" or, for a replica, "web-2".
type Name string

// Bytes is a size in bytes.
type Bytes int64

// The units that sizes are written in.
const (
	KiB Bytes = 1 << 10
	MiB Bytes = 1 << 20
	GiB Bytes = 1 << 30
	TiB Bytes = 1 << 40
)

// String renders the size with the largest binary unit that divides it, the way
// a Labfile writes it ("512MiB").
func (b Bytes) String() string {
	for _, u := range []struct {
		size Bytes
		name string
	}{{TiB, "TiB"}, {GiB, "GiB"}, {MiB, "MiB"}, {KiB, "KiB"}} {
		if b >= u.size && b%u.size == 0 {
			return fmt.Sprintf("%d%s", b/u.size, u.name)
		}
	}
	return fmt.Sprintf("%dB", int64(b))
}

var label = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)

// ValidLabel reports whether s is a lower-case DNS label (RFC 1123, section
// 2.1): what labs and machines may be called.
func ValidLabel(s string) bool { return label.MatchString(s) }

var numeric = regexp.MustCompile(`^([0-9]+|0[xX][0-9a-fA-F]*)$`)

// Numeric reports whether s is a number in one of the forms that resolvers take for an
// IPv4 address (inet_aton(3)): "1" is 0.0.0.1, and "0x7f" 0.0.0.127. Such a name is
// never looked up.
func Numeric(s string) bool { return numeric.MatchString(s) }

// Lab is a validated Labfile: what is wanted. Replicas are already expanded and
// defaults filled in.
type Lab struct {
	Name     string
	Provider string    // name of a provider; empty means the default
	URI      string    // of the daemon that the provider talks to; empty means its default
	File     string    // absolute path of the Labfile it was read from
	Boxes    []Box     // every box the machines use, sorted by name
	Machines []Machine // in the order of the Labfile, replicas ascending

	Expires time.Duration // the lab is destroyed so long after it was opened; 0 means never
	Expose  []Exposed     // sorted by name, then by port

	InheritProxy bool // guests get the proxy settings of the host's environment
}

// Exposed is a TCP port of the host's loopback that the lab's machines reach under a
// name: http://NAME:PORT.
type Exposed struct {
	Name string
	Port uint16
}

// String is NAME:PORT.
func (e Exposed) String() string { return fmt.Sprintf("%s:%d", e.Name, e.Port) }

// Machine returns the machine called name.
func (l *Lab) Machine(name Name) (Machine, bool) {
	for _, m := range l.Machines {
		if m.Name == name {
			return m, true
		}
	}
	return Machine{}, false
}

// Box says where the image of machines comes from.
type Box struct {
	Name     string // name in the Labfile's boxes; equal to From for a box used without an entry
	From     string // reference as written: "builtin/tiny", a path (relative to the Labfile's folder), an http(s) URL, …
	Checksum string // "sha256:<hex>", "sha512:<hex>" or "file:<where sums are>" for the file From names; empty if not given
}

// Machine is a machine as the Labfile wants it, defaults filled in.
type Machine struct {
	Name      Name
	Role      string // the name in the Labfile; equal to Name unless it has replicas
	Box       string // Box.Name
	CPUs      int
	Memory    Bytes
	Disk      Bytes  // virtual size; 0 keeps the box's own
	DependsOn []Name // machines that must be ready first
	Address   int    `json:",omitempty"` // last byte of its address, FirstHost to LastHost; 0 for any
	Ports     []Forward
	Ready     []Check
	User      string      // login name; empty means the box's own
	UserData  string      // cloud-init user data, merged with what lab needs; empty if none
	Network   NetworkKind // what connects it with others besides the lab's switch

	Provision []Provision // baked into its image
	Boot      []BootStep  `json:",omitempty"` // run at the first boot of each generation
	Volumes   []Volume
	Tests     []Test // the Labfile's checks on it
	Mounts    []Mount
	Replace   Replace
	OnShell   Shell
	MaxAge    Expiry // since the generation's birth
	Idle      Expiry // since it was last used
}

// Forward makes a guest port reachable on the host's loopback.
type Forward struct {
	HostPort  uint16 // 0 lets the supervisor pick a free one
	GuestPort uint16
	UDP       bool `json:",omitempty"` // else TCP
}

// String renders the forward as a Labfile writes it.
func (f Forward) String() string {
	text := fmt.Sprintf("%d:%d", f.HostPort, f.GuestPort)
	if f.UDP {
		text += "/udp"
	}
	return text
}

// CheckKind says how readiness is found out.
type CheckKind string

// The kinds of readiness checks.
const (
	CheckSSH     CheckKind = "ssh"     // a login over ssh to the guest's own port 22 succeeds
	CheckPort    CheckKind = "port"    // the TCP port accepts a connection
	CheckHTTP    CheckKind = "http"    // GET answers with the wanted status
	CheckExec    CheckKind = "exec"    // the shell command exits with 0
	CheckConsole CheckKind = "console" // the console output since start matches the pattern
)

// Check is one condition that a machine must meet to be ready. Only the fields
// of its Kind are set, besides Timeout and Interval, which always are.
type Check struct {
	Kind     CheckKind
	Port     uint16 // port, http
	Path     string // http; begins with "/"
	Status   int    // http; 0 accepts any status from 200 to 399
	Command  string // exec; run by the guest's shell
	Pattern  string // console; RE2 syntax
	Timeout  time.Duration
	Interval time.Duration
}

// String describes the check in a few words ("http :80/healthz").
func (c Check) String() string {
	switch c.Kind {
	case CheckPort:
		return fmt.Sprintf("port %d", c.Port)
	case CheckHTTP:
		return fmt.Sprintf("http :%d%s", c.Port, c.Path)
	case CheckExec:
		return fmt.Sprintf("exec %q", c.Command)
	case CheckConsole:
		return fmt.Sprintf("console /%s/", c.Pattern)
	}
	return string(c.Kind)
}

// Generation identifies one incarnation of a machine. Numbers start at 1 and are
// never used twice within a lab.
type Generation struct {
	Lab     ID
	Machine Name
	Number  int
}

// String renders the generation as users write it: "web@3".
func (g Generation) String() string { return fmt.Sprintf("%s@%d", g.Machine, g.Number) }

// Network is a lab's address plan. Every lab has a switch of its own, so labs
// may share a subnet; they differ all the same, for the reader's sake.
type Network struct {
	Subnet  netip.Prefix // always a /24
	Gateway netip.Addr   // the switch: router, DNS and DHCP server
}

// NetworkKind says what connects a lab's machines besides its switch.
type NetworkKind string

// The kinds of networks.
const (
	NetworkSwitch   NetworkKind = ""         // nothing
	NetworkAuto     NetworkKind = "auto"     // NetworkIsolated where there can be one for the machine, else nothing; only ever wanted
	NetworkNAT      NetworkKind = "nat"      // a network where the machines run, by which they reach what that host reaches
	NetworkIsolated NetworkKind = "isolated" // such a network, by which they reach one another only
)

// DirectNetworks is how many subnets a lab's network can have that is not its switch.
const DirectNetworks = 120

// DirectNetworkOf returns one of them, a /16 in 10.128.0.0/9: which one to try first
// depends on nothing but the lab's ID and the kind, and others may be in use where the
// machines run.
func DirectNetworkOf(id ID, kind NetworkKind, attempt int) Network {
	b := [4]byte{10, 128 + byte((int(hash(string(id)+"/"+string(kind))%DirectNetworks)+attempt)%DirectNetworks), 0, 0}
	subnet := netip.PrefixFrom(netip.AddrFrom4(b), 16)
	b[3] = 1
	return Network{Subnet: subnet, Gateway: netip.AddrFrom4(b)}
}

// Direct returns one of the addresses that a machine can have in a network of that kind,
// given the one that it has at the switch. Generations that run at once have different
// slots, which count from 1 to DirectSlots.
func (n Network) Direct(machine netip.Addr, slot int) netip.Addr {
	b := n.Subnet.Addr().As4()
	b[2], b[3] = byte(slot), machine.As4()[3]
	return netip.AddrFrom4(b)
}

// DirectSlots is how many generations of a machine can be in a network at once.
const DirectSlots = 250

// DirectSlot returns the slot of an address that Direct returned.
func DirectSlot(address netip.Addr) int { return int(address.As4()[2]) }

// Domain is the DNS domain of every lab's machines: "db.lab.internal".
const Domain = "lab.internal"

// DNSPort is the port of the name server at every lab's gateway, by UDP and TCP.
const DNSPort = 53

// GatewayName is the name of every lab's gateway, in Domain.
const GatewayName = "gateway"

// FirstHost and LastHost bound the last byte of the addresses that machines get.
const (
	FirstHost = 10
	LastHost  = 250
)

// NetworkOf returns the address plan of a lab: a /24 in 10.64.0.0/10 that
// depends on nothing but the lab's ID.
func NetworkOf(id ID) Network {
	h := hash(string(id))
	b := [4]byte{10, 64 + byte(h>>8)&63, byte(h), 0}
	subnet := netip.PrefixFrom(netip.AddrFrom4(b), 24)
	b[3] = 1
	return Network{Subnet: subnet, Gateway: netip.AddrFrom4(b)}
}

// hash is FNV-1a.
func hash(s string) uint32 {
	var h uint32 = 2166136261
	for _, c := range []byte(s) {
		h = (h ^ uint32(c)) * 16777619
	}
	return h
}

// Host returns the address with the given last byte.
func (n Network) Host(last byte) netip.Addr {
	b := n.Subnet.Addr().As4()
	b[3] = last
	return netip.AddrFrom4(b)
}

// MACOf returns the hardware address that belongs to addr, in lower case. It
// is derived from the address, so that a DHCP server can know every lease
// before any machine exists.
func MACOf(addr netip.Addr) string {
	b := addr.As4()
	return fmt.Sprintf("52:54:00:%02x:%02x:%02x", b[1], b[2], b[3])
}
