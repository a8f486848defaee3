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
)

// Machine is what the supervisor has to know of a running machine.
type Machine struct {
	Generation lab.Generation `json:"generation"`
	Role       string         `json:"role"`
	Addr       netip.Addr     `json:"addr"`
	Agent      bool           `json:"agent"`
	Forwards   []lab.Forward  `json:"forwards"`
}

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
	Machines []MachineStatus `json:"machines"` // sorted by name
}

// MachineStatus is what the supervisor knows of one machine.
type MachineStatus struct {
	Generation lab.Generation   `json:"generation"`
	Role       string           `json:"role"`
	Addr       netip.Addr       `json:"addr"`
	Cable      Link             `json:"cable"`
	Agent      Link             `json:"agent"`
	Forwards   []lab.Forward    `json:"forwards"` // with the host ports that are listened on
	Counters   network.Counters `json:"counters"` // of the present cable
}

// op names a request.
type op string

const (
	opHello    op = "hello" // keeps the supervisor alive while the connection is open
	opPlug     op = "plug"
	opUnplug   op = "unplug"
	opDial     op = "dial"  // bytes follow the reply
	opAgent    op = "agent" // bytes follow the reply
	opStatus   op = "status"
	opShutdown op = "shutdown"
)

// request is the one line that begins a connection.
type request struct {
	Op         op              `json:"op"`
	Machine    *Machine        `json:"machine,omitempty"`    // plug
	Generation *lab.Generation `json:"generation,omitempty"` // unplug
	Name       lab.Name        `json:"name,omitempty"`       // dial, agent
	Port       uint16          `json:"port,omitempty"`       // dial
}

// reply is the one line that answers it.
type reply struct {
	Error    *wireError    `json:"error,omitempty"`
	Version  string        `json:"version,omitempty"`  // hello
	PID      int           `json:"pid,omitempty"`      // hello
	Forwards []lab.Forward `json:"forwards,omitempty"` // plug
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
