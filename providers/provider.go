// SPDX-License-Identifier: Apache-2.0

// Package providers is the contract between lab and what runs machines. A
// provider knows nothing of Labfiles, ledgers or networks: it keeps generations,
// each born from an image, and tells the truth about them.
package providers

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"time"

	"github.com/labfile/lab/internal/lab"
)

// Sentinel errors. Providers wrap them; callers branch with errors.Is.
var (
	// ErrNotFound says that the generation does not exist.
	ErrNotFound = errors.New("no such machine")
	// ErrNotRunning says that the generation exists but does not run.
	ErrNotRunning = errors.New("machine is not running")
	// ErrUnasked says that the guest could not be asked to shut down, so that the
	// machine runs on.
	ErrUnasked = errors.New("the guest could not be asked to shut down")
	// ErrIncapable says that this host cannot do what was asked; the error's
	// text says what is missing.
	ErrIncapable = errors.New("host not capable")
	// ErrNoNetworks is ErrIncapable, and says that only the lab's own switch can connect
	// machines.
	ErrNoNetworks = fmt.Errorf("%w", ErrIncapable)
	// ErrInUse says that a volume is attached to another machine that runs.
	ErrInUse = errors.New("volume in use")
)

// Provider runs machines. Every method may be called by several goroutines and
// several processes at once, blocks no longer than ctx allows, and is idempotent:
// asking for what is already so succeeds. A provider keeps the ownership of a
// generation (lab, machine, number) where it keeps the generation itself, so that
// List needs no other record.
type Provider interface {
	// Name is the word that selects the provider, such as "qemu".
	Name() string

	// Check finds out what the host lacks. It never changes the host, and
	// returns an error only if ctx ended.
	Check(ctx context.Context) ([]Finding, error)

	// Create makes the generation that spec describes, stopped: its overlay
	// disk and its definition. A generation that already exists with the same
	// number is left as it is. A Create that was interrupted is finished by
	// the next one, or undone by Destroy.
	Create(ctx context.Context, spec Spec) error

	// Start boots a created generation, or lets one go on that the hypervisor
	// paused, and returns once it runs (not once it is ready). ErrNotFound if it was never created; the error carries what the
	// hypervisor printed.
	Start(ctx context.Context, g lab.Generation) error

	// Stop asks the guest to shut down. If it does not obey within grace, the power
	// is cut, which Exit.Forced tells afterwards; grace 0 cuts it at once. ErrUnasked if
	// grace is positive and the guest could not even be asked: the machine runs on.
	// Stopping what does not run or exist succeeds.
	Stop(ctx context.Context, g lab.Generation, grace time.Duration) error

	// Destroy ends the generation by force and removes everything that belongs
	// to it. Destroying what is absent succeeds.
	Destroy(ctx context.Context, g lab.Generation) error

	// Inspect returns the live facts, or ErrNotFound.
	Inspect(ctx context.Context, g lab.Generation) (Machine, error)

	// List returns all generations of a lab, or of every lab of this user if id
	// is empty, sorted by lab, machine and number; half-made ones too.
	List(ctx context.Context, id lab.ID) ([]Machine, error)

	// Wait returns once the generation no longer runs, saying why as far as
	// that is known. ErrNotFound if it does not exist. It is told by the
	// kernel or the hypervisor, not by polling.
	Wait(ctx context.Context, g lab.Generation) (Exit, error)

	// Console opens the serial console, for one user at a time. Closing it
	// leaves the machine running. ErrNotRunning if it does not run.
	Console(ctx context.Context, g lab.Generation) (io.ReadWriteCloser, error)

	// OpenLog opens one of the generation's logs from its beginning. Read
	// returns io.EOF at the present end, and may return more when called again
	// later. ErrNotFound if there is no such generation; a log that nothing was
	// written to is empty. ErrIncapable if the hypervisor's is where nobody here can
	// read it.
	OpenLog(ctx context.Context, g lab.Generation, l Log) (io.ReadCloser, error)
}

// SpecChecker is a provider that can say, before anything is made, what its Create would
// refuse.
type SpecChecker interface {
	// CheckSpec returns the error that Create would return for what spec says: its
	// powers, and the files on this host. Neither the seed nor the address need be known
	// yet. It changes nothing, and asks no daemon.
	CheckSpec(ctx context.Context, spec Spec) error
}

// MemoryCounter is a provider that knows the memory of the host that its machines run on.
type MemoryCounter interface {
	// HostMemory returns what that host has. It changes nothing.
	HostMemory(ctx context.Context) (HostMemory, error)
}

// HostMemory is the memory of a host.
type HostMemory struct {
	RAM, Swap lab.Bytes
	Unbounded bool // its kernel promises more than it has, whatever is asked for
}

// RoomCounter is a provider that knows how much room there is for the files of its machines.
type RoomCounter interface {
	// HostRoom returns what may still be written there. It changes nothing. ErrIncapable if
	// machines cannot be kept there at all, as in a storage pool that is not active.
	HostRoom(ctx context.Context) (HostRoom, error)
}

// HostRoom is what is free where the files of machines are kept.
type HostRoom struct {
	At   string    // where that is, for people; empty if nothing is known
	Free lab.Bytes // for this user
}

// Cabled is implemented by providers whose machines are plugged into the lab's
// own switch.
type Cabled interface {
	// DialNIC opens the machine's network cable: Ethernet frames, each behind
	// its length as 4 bytes, big-endian (QEMU's stream netdev). A cable has one
	// other end at a time. ErrNotRunning if the machine does not run.
	DialNIC(ctx context.Context, g lab.Generation) (net.Conn, error)
}

// AgentDialer is implemented by providers that carry a channel to lab-agent.
type AgentDialer interface {
	// DialAgent opens the host end of the agent's virtio-serial port. It has one
	// other end at a time. ErrNotRunning if the machine does not run.
	DialAgent(ctx context.Context, g lab.Generation) (net.Conn, error)
}

// Addressed is implemented by providers that run machines by way of a daemon, of
// which there may be several.
type Addressed interface {
	// URI names the daemon that this provider talks to.
	URI() string
	// Reach makes sure that the daemon can be talked to, and starts it if that is
	// for its users to do. ErrIncapable if it is not there.
	Reach(ctx context.Context) error
	// At returns the provider of the daemon at uri, or says what is wrong with
	// that. It touches nothing.
	At(uri string) (Provider, error)
	// Daemons returns the URIs of those daemons that this host remembers to have
	// machines of a lab, sorted: for when nothing else is known of it.
	Daemons(id lab.ID) ([]string, error)
}

// Pruner is implemented by providers that keep copies of images where machines run.
type Pruner interface {
	// Prune removes the copies that this user's labs made, wherever that was, and that
	// no machine is born from any more; it only lists them if dryRun is set. With an
	// error it did what it could.
	Prune(ctx context.Context, dryRun bool) ([]Copy, error)
}

// Copy is a copy of an image.
type Copy struct {
	Name string // where it is: an address and a path
	Size lab.Bytes
}

// LogTrimmer is implemented by providers whose logs would grow without bound.
type LogTrimmer interface {
	// TrimLogs cuts each log of the generation that is longer than limit down
	// to its newest part. A machine may run meanwhile.
	TrimLogs(ctx context.Context, g lab.Generation, limit lab.Bytes) error
}

// Networker is implemented by providers that can connect machines with one another where
// they run, beside the lab's own switch.
type Networker interface {
	// Networks returns ErrNoNetworks if the daemon at hand makes none. It changes
	// nothing.
	Networks(ctx context.Context) error
	// Network makes sure that a lab has a network of the kind, which is not
	// lab.NetworkSwitch, and returns it.
	Network(ctx context.Context, id lab.ID, kind lab.NetworkKind) (lab.Network, error)
	// RemoveNetworks removes the lab's networks, which no machine of it is in any more.
	// Removing what is absent succeeds.
	RemoveNetworks(ctx context.Context, id lab.ID) error
	// Networked returns the labs for which there are networks that this data home made, at
	// this daemon and at every other that the provider knows of. What it found comes with
	// an error, too.
	Networked(ctx context.Context) ([]Networked, error)
}

// Networked is a lab that has networks.
type Networked struct {
	Lab lab.ID
	URI string // of the daemon that made them
}

// PortDialer is implemented by providers that network their machines themselves.
type PortDialer interface {
	// DialPort connects to a TCP port of the guest.
	DialPort(ctx context.Context, g lab.Generation, port uint16) (net.Conn, error)
}

// Freezer is implemented by providers that can freeze a machine's disk. What is
// frozen is read-only for ever and has a fresh overlay above it; the machine may
// run, and pauses for no longer than an instant. Whoever wants what the guest has
// in its caches makes the guest sync first.
type Freezer interface {
	// Freeze makes what the machine wrote to its disk so far its birth, which
	// DiskReader shows. A generation that has its birth already is left as it is. A
	// Freeze that was interrupted is done by the next one. ErrNotFound.
	Freeze(ctx context.Context, g lab.Generation) error

	// Snapshot freezes what the machine wrote since the last Snapshot or Freeze,
	// each time anew: a layer per step of a bake. It does not make a birth. A disk on
	// another host is fetched as far as it is frozen thereby; if that fails, the
	// machine is of no more use for a bake. ErrNotFound.
	Snapshot(ctx context.Context, g lab.Generation) (Frozen, error)
}

// VolumeChanger is implemented by providers whose generations can be given other
// volumes than they were created with.
type VolumeChanger interface {
	// SetVolumes says which volumes the generation has from its next start on.
	// ErrNotFound if it was never created.
	SetVolumes(ctx context.Context, g lab.Generation, volumes []Volume) error
}

// VolumePusher is implemented by providers that can take a snapshot of a volume while
// a machine writes to it.
type VolumePusher interface {
	// PushVolume makes a machine that runs and writes to the volume v.Name write to
	// v.Path from now on, an empty file that nobody has open; v.Layers is what lies
	// below it, with what the machine has written to until now last, but for empty
	// files. From then on nobody writes to those. The machine pauses for no longer
	// than an instant. Whoever wants what the guest has in its caches makes the
	// guest sync first. With an error the machine may or may not have done so: the
	// volume reads the same. ErrNotRunning; ErrNotFound if there is no such
	// generation, or if it has no such volume.
	PushVolume(ctx context.Context, g lab.Generation, v Volume) error
}

// VolumeKeeper is implemented by providers whose machines run where files of this host
// cannot be opened: volumes lie on files that are there.
type VolumeKeeper interface {
	// VolumeFiles returns where the files of a lab's volumes are kept. ErrIncapable if
	// that is not there.
	VolumeFiles(ctx context.Context, id lab.ID) (VolumeFiles, error)
}

// VolumeFiles are the files that a lab's volumes lie on: qcow2 files that name no backing
// file. Their names are of lower-case letters, digits and "@.-". What is made comes into
// being in the place of what has that name, and may be there in part if there is an error.
type VolumeFiles interface {
	// Path is what Volume.Path and Volume.Layers call a file. It touches nothing.
	Path(name string) string

	// List returns the names of the files that there are.
	List(ctx context.Context) ([]string, error)

	// Make makes a file of a disk of the virtual size that nothing was written to.
	Make(ctx context.Context, name string, size lab.Bytes) error

	// Put makes a file of one of this host, which it may take away.
	Put(ctx context.Context, name, from string) error

	// Open returns the paths of files on this host that hold what those do: copies in
	// dir, or themselves.
	Open(ctx context.Context, names []string, dir string) (paths []string, err error)

	// Usage returns how long a file is and what it takes of its disk. fs.ErrNotExist.
	Usage(ctx context.Context, name string) (length, takes lab.Bytes, err error)

	// Commit writes what the last file of a chain says into the one below it. Nobody has
	// either open.
	Commit(ctx context.Context, chain []string) error

	// Flatten makes a file of what a chain adds up to, to which nobody writes. size is
	// that of the last file's disk.
	Flatten(ctx context.Context, chain []string, size lab.Bytes, name string) error

	// Remove removes a file. Removing what is absent succeeds.
	Remove(ctx context.Context, name string) error
}

// Frozen is a frozen part of a disk.
type Frozen struct {
	// Layers are absolute paths of qcow2 overlays as in Image.Layers: what was
	// frozen, lowest first. It is one, or more if the disk had been opened or a
	// freeze had been interrupted before. They stay where they are until the
	// generation is destroyed (a hard link outlives that), and name nothing
	// below them. They have been given to the host's page cache: whoever keeps
	// them syncs them.
	Layers []string
	Size   lab.Bytes // virtual size of the disk
}

// DiskReader is implemented by providers whose machines' disks can be read from
// outside.
type DiskReader interface {
	// OpenDisk returns the layers of the generation's disk as it is at this
	// moment: nobody writes to them until Release. A machine that runs goes on,
	// and pauses for no longer than an instant. One caller at a time has the disk
	// open; others wait as long as ctx allows. A Release that never came because
	// its process ended is made up for by the next OpenDisk. ErrNotFound.
	OpenDisk(ctx context.Context, g lab.Generation) (Disk, error)
}

// Disk is a machine's disk, open for reading.
type Disk struct {
	Layers []Layer // from the box up
	Birth  int     // so many of the layers are the birth, the rest is drift; 0 if it was never frozen
	// Release lets go of the layers and merges them with what was written
	// meanwhile, as far as the machine runs. It must be called, once; its ctx
	// should outlive that of OpenDisk.
	Release func(context.Context) error
}

// Layer is one file of a disk. Nothing in the file says what lies below it.
type Layer struct {
	Path   string // absolute
	Format string // "qcow2" or "raw"
}

// Spec is everything a provider needs to make a generation.
type Spec struct {
	lab.Generation
	Image   Image
	CPUs    int
	Memory  lab.Bytes
	Disk    lab.Bytes       // virtual size of the overlay; 0 keeps the image's, less is an error
	MAC     string          // lower case, colons; empty for a machine without a NIC; another generation may run with the same
	Seed    []byte          // a NoCloud volume to attach read-only; empty if none
	Agent   bool            // give the machine the agent's virtio-serial port, AgentPort
	Volumes []Volume        // at most MaxVolumes; the guest meets them in this order
	Mounts  []Mount         // at most MaxMounts
	Append  string          // goes behind the image's kernel command line; an error if the image has no kernel
	Network lab.NetworkKind // that it is in besides; lab.NetworkSwitch for none
	Direct  netip.Addr      // its address in that, and none otherwise; lab.MACOf is its hardware address
}

// AgentPort is the name of the virtio-serial port that lab-agent opens.
const AgentPort = "dev.labfile.agent.0"

// How many volumes and mounts a machine can have.
const (
	MaxVolumes = 12
	MaxMounts  = 10
)

// Volume is a disk that outlives the generation. The guest's flushes reach the
// host's disk. Start returns ErrInUse if another machine has the volume and
// either of the two may write to it.
type Volume struct {
	Name     string // the disk's serial number in the guest: 1 to 20 of A-Z a-z 0-9 . _ -
	Path     string // absolute path of a qcow2 file that names no backing file
	ReadOnly bool
	Layers   []string // absolute paths of what lies below Path, lowest first: qcow2 files that nobody writes to
}

// Mount is a folder of the host that the guest can mount, by 9p. The guest sees
// the owners and modes of the host; what its root writes belongs to the calling
// user, and a change of owner is refused. Create returns ErrIncapable if the host
// cannot do that; whether the guest's kernel can is not known before.
type Mount struct {
	Tag      string // the name to mount it by: 1 to 31 of A-Z a-z 0-9 . _ -
	Path     string // absolute
	Writable bool
}

// Image is what machines are born from, as files on the host that nothing will
// ever change or move. They have been inspected: opening them is safe.
type Image struct {
	Digest string // what the ledger and the provider's definition record
	Arch   string // Go's name: "amd64"
	Disk   string // absolute path
	Format string // of Disk: "qcow2" or "raw"
	// Layers are absolute paths of qcow2 overlays above Disk, lowest first: what
	// was baked. They name no backing file.
	Layers []string
	Size   lab.Bytes // virtual size, of the topmost layer if there are any
	Kernel string    // absolute path; empty to boot from the disk
	Initrd string    // absolute path; empty if none
	Append string    // kernel command line
}

// State says what a generation is doing, as the provider sees it.
type State string

// The states of a generation.
const (
	StateBroken  State = "broken"  // half made: only Create and Destroy make sense
	StateStopped State = "stopped" // exists, does not run
	StateRunning State = "running"
	StatePaused  State = "paused" // its processors are halted
)

// Machine is what a provider knows of a generation.
type Machine struct {
	lab.Generation
	State   State
	Image   string    // Image.Digest
	PID     int       // of the hypervisor process on this host; 0 if none
	Since   time.Time // when it was last started; zero if it does not run
	Accel   string    // "kvm", "tcg", …; empty if it does not run
	Disk    lab.Bytes // bytes that its overlays take on the host
	Written lab.Bytes // of those, what was written since its birth, about; 0 if it was never frozen
	Exit    Exit      // how it last ended; zero if it runs or never ran
	Reason  string    // what is wrong, if State is StateBroken, or why it is paused; may be empty
	// Unreachable says why nothing can be plugged into a machine that runs: its sockets
	// are gone. Empty if they are there.
	Unreachable string
	Volumes     []Volume // that it has, or will have from its next start on; none if State is StateBroken
}

// Exit says how a machine's last run ended.
type Exit struct {
	Reason ExitReason
	Detail string // in the hypervisor's words, or the signal; may be empty
	At     time.Time
}

// DetailForced is the Exit.Detail of a machine whose power was cut by Stop.
const DetailForced = "stopped by force"

// Forced reports whether Stop cut the power.
func (e Exit) Forced() bool { return e.Reason == ExitHost && e.Detail == DetailForced }

// ExitReason is why a machine no longer runs.
type ExitReason string

// The reasons for an exit.
const (
	ExitUnknown  ExitReason = ""         // it was seen by nobody
	ExitGuest    ExitReason = "guest"    // the guest shut itself down
	ExitPanic    ExitReason = "panic"    // the guest's kernel panicked
	ExitHost     ExitReason = "host"     // lab asked for it
	ExitCrashed  ExitReason = "crashed"  // the hypervisor died of an error
	ExitSignaled ExitReason = "signaled" // somebody else killed the hypervisor
)

// Log names one of a generation's logs.
type Log string

// The logs of a generation.
const (
	LogConsole    Log = "console"    // what the guest printed on its serial console
	LogHypervisor Log = "hypervisor" // what the hypervisor printed
)

// Finding is one fact about the host.
type Finding struct {
	Topic  string // what was looked at: "qemu", "acceleration"
	Level  Level
	Detail string // what was found
	Cure   string // the command or step that helps; empty if none is needed
}

// Level says how bad a finding is.
type Level string

// The levels of findings.
const (
	LevelOK      Level = "ok"
	LevelWarning Level = "warning" // works, worse than it could
	LevelError   Level = "error"   // machines cannot run
)
