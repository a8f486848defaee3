// SPDX-License-Identifier: Apache-2.0

package supervise

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"syscall"
	"time"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/network"
	"github.com/labfile/lab/internal/proxy"
	"github.com/labfile/lab/providers"
)

// Sentinel errors. Callers branch with errors.Is.
var (
	// ErrNotRunning says that the lab has no supervisor.
	ErrNotRunning = errors.New("the lab's supervisor does not run")
	// ErrRunning says that the lab has a supervisor already.
	ErrRunning = errors.New("the lab has a supervisor already")
	// ErrNotPlugged says that the supervisor knows no such machine.
	ErrNotPlugged = errors.New("machine is not plugged in")
	// ErrNoAgent says that the machine was plugged in without an agent.
	ErrNoAgent = errors.New("machine has no agent")
	// ErrStale says that a newer generation of the machine is plugged in.
	ErrStale = errors.New("a newer generation is plugged in")
	// ErrBeside says that yet another generation of the machine is a standby, or
	// draining: there can be two at a time.
	ErrBeside = errors.New("another generation is plugged in beside it")
)

// Machine is what the supervisor has to know of a running machine.
type Machine struct {
	Generation lab.Generation `json:"generation"`
	Role       string         `json:"role"`
	Addr       netip.Addr     `json:"addr"`
	Direct     netip.Prefix   `json:"direct,omitzero"` // its address where it runs, if it has one there
	Agent      bool           `json:"agent"`
	Forwards   []lab.Forward  `json:"forwards"` // of a standby: not listened on before it is promoted

	// Standby asks for the generation to be plugged in beside the present one, at the
	// same address and known by no name, until it is promoted.
	Standby bool `json:"standby,omitempty"`

	// Mounts are served as soon as its agent answers, without anybody waiting for it:
	// what the machine has had before. Mount adds those that it has not.
	Mounts []Mount `json:"mounts,omitempty"`

	// Hidden keeps the machine out of the guests' name service.
	Hidden bool `json:"hidden,omitempty"`
}

// Mount is a folder of the host that a machine sees.
type Mount struct {
	From     string `json:"from"` // absolute path on the host
	To       string `json:"to"`   // absolute path in the guest
	Writable bool   `json:"writable,omitempty"`
	Owner    string `json:"owner"` // in the guest: see agentapi.Folder
}

// Phase says what a generation is to the machine's name.
type Phase string

// The phases, in their order.
const (
	PhaseStandby  Phase = "standby"  // may take over; reached only as a generation
	PhasePresent  Phase = "present"  // has the name, the address and the forwards
	PhaseDraining Phase = "draining" // gave way to the present one and keeps the connections that it has
)

// Link says how a machine's cable or agent channel is doing.
type Link string

// The states of a link.
const (
	LinkNone      Link = "none"      // the machine has no such thing
	LinkWaiting   Link = "waiting"   // for the other end to answer
	LinkConnected Link = "connected" // in use
)

// Status is what the supervisor is doing.
type Status struct {
	Version  string          `json:"version"` // of the program that runs it
	PID      int             `json:"pid"`
	Since    time.Time       `json:"since"`
	Machines []MachineStatus `json:"machines"` // sorted by name, then by generation
}

// MachineStatus is what the supervisor knows of one machine.
type MachineStatus struct {
	Generation lab.Generation   `json:"generation"`
	Phase      Phase            `json:"phase"`
	Withdrawn  bool             `json:"withdrawn,omitempty"` // its role's name leads elsewhere
	Role       string           `json:"role"`
	Addr       netip.Addr       `json:"addr"`
	Cable      Link             `json:"cable"`
	Agent      Link             `json:"agent"`
	Forwards   []lab.Forward    `json:"forwards"` // with the host ports that are listened on
	Counters   network.Counters `json:"counters"` // of the present cable

	// Open counts the connections through the supervisor: those of the host with the
	// guest, those with its agent, and, while two generations share the address, those
	// that other machines have with it.
	Open int `json:"open"`

	// LastActive is when the machine last sent or got a packet that was meant for one
	// receiver (no ARP, no DHCP), was dialed, or its agent was talked to; at first when
	// it was plugged in.
	LastActive time.Time `json:"last_active"`
}

// op names a request.
type op string

const (
	opHello    op = "hello" // keeps the supervisor alive while the connection is open
	opPlug     op = "plug"
	opStandby  op = "standby" // plug of a standby: a supervisor that knows none must refuse
	opPromote  op = "promote"
	opDrained  op = "drained"
	opWithdraw op = "withdraw"
	opMount    op = "mount"
	opUnplug   op = "unplug"
	opDial     op = "dial"  // bytes follow the reply
	opAgent    op = "agent" // bytes follow the reply
	opAnswer   op = "answer"
	opExpose   op = "expose"

	// Relays have requests of their own: a supervisor that knows none must refuse.
	opAddRelays     op = "add-relays"
	opReplaceRelays op = "replace-relays"

	opStatus   op = "status"
	opShutdown op = "shutdown"
)

// request is the one line that begins a connection.
type request struct {
	Op         op              `json:"op"`
	Machine    *Machine        `json:"machine,omitempty"`    // plug, standby
	Generation *lab.Generation `json:"generation,omitempty"` // unplug, promote, drained, withdraw, mount, answer; dial and agent without a name
	Name       lab.Name        `json:"name,omitempty"`       // dial, agent
	Port       uint16          `json:"port,omitempty"`       // dial
	Forwards   []lab.Forward   `json:"forwards,omitempty"`   // promote
	Drain      time.Duration   `json:"drain,omitempty"`      // promote; nanoseconds
	Mounts     []Mount         `json:"mounts,omitempty"`     // mount
	Exposed    []lab.Exposed   `json:"exposed,omitempty"`    // expose
	Relays     []proxy.Relay   `json:"relays,omitempty"`     // add-relays, replace-relays
}

// reply is the one line that answers it.
type reply struct {
	Error    *wireError    `json:"error,omitempty"`
	Version  string        `json:"version,omitempty"`  // hello
	PID      int           `json:"pid,omitempty"`      // hello
	Forwards []lab.Forward `json:"forwards,omitempty"` // plug, promote
	Status   *Status       `json:"status,omitempty"`   // status
}

// maxLine bounds a request and a reply, in bytes: a lab has at most some 240
// machines.
const maxLine = 1 << 20

// wireError carries an error over the socket so that errors.Is and errors.As see
// the same on the other side.
type wireError struct {
	Text  string `json:"text"`
	Code  string `json:"code,omitempty"`
	Port  uint16 `json:"port,omitempty"`
	Errno int    `json:"errno,omitempty"`
}

// codes are the errors that callers branch on.
var codes = []struct {
	code string
	err  error
}{
	{"not-plugged", ErrNotPlugged},
	{"not-plugged", network.ErrUnplugged},
	{"no-agent", ErrNoAgent},
	{"stale", ErrStale},
	{"beside", ErrBeside},
	{"not-running", providers.ErrNotRunning},
	{"not-found", providers.ErrNotFound},
	{"refused", syscall.ECONNREFUSED},
	{"deadline", context.DeadlineExceeded},
	{"canceled", context.Canceled},
}

func toWire(err error) *wireError {
	w := &wireError{Text: err.Error()}
	var pe *network.PortError
	if errors.As(err, &pe) {
		w.Code, w.Port = "port", pe.Port
		var no syscall.Errno
		if errors.As(pe.Err, &no) {
			w.Errno = int(no)
		}
		return w
	}
	for _, c := range codes {
		if errors.Is(err, c.err) {
			w.Code = c.code
			break
		}
	}
	return w
}

func (w *wireError) err() error {
	e := &remoteError{text: w.Text}
	if w.Code == "port" {
		e.cause = &network.PortError{Port: w.Port, Err: syscall.Errno(w.Errno)}
		return e
	}
	for _, c := range codes {
		if c.code == w.Code {
			e.cause = c.err
			break
		}
	}
	return e
}

// remoteError is an error that happened in the supervisor.
type remoteError struct {
	text  string
	cause error // may be nil
}

func (e *remoteError) Error() string { return e.text }
func (e *remoteError) Unwrap() error { return e.cause }

// writeLine sends v as one line.
func writeLine(w io.Writer, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	_, err = w.Write(append(b, '\n'))
	return err
}

// readLine reads one line into v, and not a byte more than r buffers.
func readLine(r *bufio.Reader, v any) error {
	var line []byte
	for {
		part, err := r.ReadSlice('\n')
		line = append(line, part...)
		if len(line) > maxLine {
			return fmt.Errorf("a line of more than %d bytes", maxLine)
		}
		if err == nil {
			return json.Unmarshal(line, v)
		}
		if !errors.Is(err, bufio.ErrBufferFull) {
			if len(line) > 0 && errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return err
		}
	}
}

// lineConn is a connection behind its first line: the reader may have buffered
// what follows.
type lineConn struct {
	net.Conn
	r *bufio.Reader
}

func (c *lineConn) Read(p []byte) (int, error) { return c.r.Read(p) }

// CloseWrite tells the other side that no more will come; reading goes on.
func (c *lineConn) CloseWrite() error {
	h, ok := c.Conn.(interface{ CloseWrite() error })
	if !ok {
		return errors.ErrUnsupported
	}
	return h.CloseWrite()
}
