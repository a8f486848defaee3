// SPDX-License-Identifier: Apache-2.0

// Package agentapi is what the host and lab-agent say to each other: how a stream
// of the channel begins, and the requests of control streams.
//
// A stream begins with one line of JSON from the host that names what the stream is
// for, and one line of JSON from the agent that accepts or refuses. On an "ssh"
// stream the ssh protocol follows; on a "mount" stream sftp, of which the host is the
// server; on a "cache" stream foldercache; on a "files" stream the agent sends a list, which drift.ReadManifest reads.
// On a "control" stream the host sends requests,
// one line each, and the agent answers each with one line, in order; for requests at
// the same time the host opens more streams.
package agentapi

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"time"
)

// Port is the name of the virtio-serial port, the same as providers.AgentPort; said
// again here because the agent is to stay small.
const Port = "dev.labfile.agent.0"

// UnsetVariable is set by an ssh client of the agent for its session to do without some of
// the variables that /etc/environment sets: their names, with spaces between them. The agent does not
// pass it on.
const UnsetVariable = "LAB_UNSET"

// Kind says what a stream is for.
type Kind string

// The kinds of streams.
const (
	Control Kind = "control"
	SSH     Kind = "ssh"
	Files   Kind = "files" // the agent lists the files of the root file system, and closes
	Mount   Kind = "mount" // Header.Folder says what and where
	Cache   Kind = "cache" // foldercache, of a folder that is mounted: Header.Folder
)

// The longest lines that are read, in bytes.
const (
	maxHeader  = 16 << 10
	maxMessage = 1 << 20
)

// Op names a request.
type Op string

// The requests.
const (
	OpHello    Op = "hello"    // who are you?
	OpIdentify Op = "identify" // become Request.Identity, now and on every boot
	OpRefresh  Op = "refresh"  // take Request.Time and Request.Entropy
	OpPing     Op = "ping"     // are you there?
	OpSync     Op = "sync"     // write everything to the disk
	OpPoweroff Op = "poweroff" // shut down; answered before it begins
	OpReboot   Op = "reboot"   // the same, but come back
)

// Request is what the host asks on a control stream.
type Request struct {
	Op       Op        `json:"op"`
	Identity *Identity `json:"identity,omitempty"`
	Time     time.Time `json:"time,omitzero"`
	Entropy  []byte    `json:"entropy,omitempty"`
}

// Response is the agent's answer. Hello is set in the answer to every request that
// succeeded.
type Response struct {
	Error string `json:"error,omitempty"`
	Hello *Hello `json:"hello,omitempty"`
}

// Hello says who the guest is at the moment.
type Hello struct {
	Version  string        `json:"version"` // of the agent
	BootID   string        `json:"bootID"`  // random, made by the kernel at boot
	Uptime   time.Duration `json:"uptime"`
	Hostname string        `json:"hostname"`
	Identity string        `json:"identity,omitempty"` // Identity.Fingerprint of the applied one; empty if none
	Warnings []string      `json:"warnings,omitempty"` // what could not be applied although the rest could

	// Connections are how many TCP connections others have with the guest, by its address
	// that they are with; only in the answer to OpHello.
	Connections map[netip.Addr]int `json:"connections,omitempty"`
}

// Identity is what makes a machine this machine. Applying the same one twice
// changes nothing.
type Identity struct {
	Hostname       string       `json:"hostname"`
	Domain         string       `json:"domain,omitempty"`
	MAC            string       `json:"mac,omitempty"` // of the interface that gets Address; empty for no network
	Address        netip.Prefix `json:"address,omitzero"`
	Gateway        netip.Addr   `json:"gateway,omitzero"`
	DNS            []netip.Addr `json:"dns,omitempty"`
	Direct         *Direct      `json:"direct,omitempty"` // a second interface, if there is one
	HostKey        []byte       `json:"hostKey"`          // ed25519 private key, OpenSSH PEM
	AuthorizedKeys []string     `json:"authorizedKeys"`   // lines of authorized_keys(5)
	Users          []string     `json:"users,omitempty"`  // who get the keys, besides root; those unknown to the guest are passed over

	// For this moment only: neither is kept.
	Time    time.Time `json:"time,omitzero"`     // sets the clock
	Entropy []byte    `json:"entropy,omitempty"` // stirred into the kernel's
}

// Direct is the interface by which a machine reaches others where it runs.
type Direct struct {
	MAC     string       `json:"mac"`
	Address netip.Prefix `json:"address"`
	Gateway netip.Addr   `json:"gateway,omitzero"` // takes the place of the identity's for what is outside
}

// Lasting returns the identity without what is for the moment only.
func (id Identity) Lasting() Identity {
	id.Time, id.Entropy = time.Time{}, nil
	return id
}

// Validate says what is wrong with the identity.
func (id Identity) Validate() error {
	switch {
	case id.Hostname == "" || len(id.Hostname) > 64:
		return errors.New("identity: hostname must have 1 to 64 bytes")
	case id.MAC != "" && !(id.Address.IsValid() && id.Address.Addr().Is4()):
		return errors.New("identity: address must be an IPv4 prefix")
	case id.Direct != nil && !(id.Direct.MAC != "" && id.Direct.Address.IsValid() && id.Direct.Address.Addr().Is4()):
		return errors.New("identity: the second interface must have a hardware address and an IPv4 prefix")
	case len(id.HostKey) == 0:
		return errors.New("identity: host key is missing")
	}
	for _, s := range append([]string{id.Hostname, id.Domain}, id.AuthorizedKeys...) {
		if bytes.ContainsAny([]byte(s), "\n\r\x00") {
			return fmt.Errorf("identity: %q is more than one line", s)
		}
	}
	return nil
}

// RefusedError is the agent's reason to refuse a stream or a request.
type RefusedError struct {
	What   string // the kind of the stream, or the request
	Reason string
}

func (e *RefusedError) Error() string {
	return fmt.Sprintf("the agent refused %q: %s", e.What, e.Reason)
}

// Header is how a stream begins.
type Header struct {
	Kind   Kind    `json:"kind"`
	Folder *Folder `json:"folder,omitempty"` // of a "mount" stream
}

type verdict struct {
	Error string `json:"error,omitempty"`
}

// Begin names the kind of a stream that was just opened and waits until the agent
// accepts it. A refusal is a *RefusedError. Begin closes conn if ctx ends, and
// only then.
func Begin(ctx context.Context, conn net.Conn, k Kind) error {
	return begin(ctx, conn, Header{Kind: k})
}

// BeginMount is Begin for a folder of the host.
func BeginMount(ctx context.Context, conn net.Conn, f Folder) error {
	return begin(ctx, conn, Header{Kind: Mount, Folder: &f})
}

// BeginCache is Begin for the second stream of a folder that is mounted.
func BeginCache(ctx context.Context, conn net.Conn, f Folder) error {
	return begin(ctx, conn, Header{Kind: Cache, Folder: &f})
}

func begin(ctx context.Context, conn net.Conn, h Header) error {
	var v verdict
	err := during(ctx, conn, func() error {
		if err := writeLine(conn, h); err != nil {
			return err
		}
		return readLine(conn, maxHeader, &v)
	})
	if err != nil {
		return fmt.Errorf("beginning a stream for %q: %w", h.Kind, err)
	}
	if v.Error != "" {
		return &RefusedError{What: string(h.Kind), Reason: v.Error}
	}
	return nil
}

// Accept reads what conn is to be.
func Accept(conn net.Conn) (Header, error) {
	var h Header
	if err := readLine(conn, maxHeader, &h); err != nil {
		return Header{}, fmt.Errorf("reading what a stream is for: %w", err)
	}
	return h, nil
}

// Answer accepts the stream, or refuses it if reason is not nil.
func Answer(conn net.Conn, reason error) error {
	var v verdict
	if reason != nil {
		v.Error = reason.Error()
	}
	return writeLine(conn, v)
}

// Call sends a request on a control stream and waits for the answer. An answer that
// carries an error is a *RefusedError. Call closes conn if ctx ends, and only then.
func Call(ctx context.Context, conn net.Conn, req Request) (Response, error) {
	var resp Response
	err := during(ctx, conn, func() error {
		if err := writeLine(conn, req); err != nil {
			return err
		}
		return readLine(conn, maxMessage, &resp)
	})
	if err != nil {
		return Response{}, fmt.Errorf("asking the agent for %q: %w", req.Op, err)
	}
	if resp.Error != "" {
		return Response{}, &RefusedError{What: string(req.Op), Reason: resp.Error}
	}
	return resp, nil
}

// Serve answers the requests on a control stream by calling handle, until the host
// closes it.
func Serve(conn net.Conn, handle func(Request) Response) error {
	for {
		var req Request
		if err := readLine(conn, maxMessage, &req); err != nil {
			if errors.Is(err, io.EOF) {
				return nil
			}
			return fmt.Errorf("reading a request: %w", err)
		}
		if err := writeLine(conn, handle(req)); err != nil {
			return fmt.Errorf("answering %q: %w", req.Op, err)
		}
	}
}

// during runs f, whose reads and writes of conn end when ctx does.
func during(ctx context.Context, conn net.Conn, f func() error) error {
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	err := f()
	if !stop() {
		return context.Cause(ctx)
	}
	return err
}

func writeLine(w io.Writer, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	_, err = w.Write(append(b, '\n'))
	return err
}

// readLine reads one line and not a byte more: what follows is somebody else's.
func readLine(r io.Reader, most int, v any) error {
	var line []byte
	b := make([]byte, 1)
	for {
		if _, err := io.ReadFull(r, b); err != nil {
			if err == io.EOF && len(line) > 0 {
				err = io.ErrUnexpectedEOF
			}
			return err
		}
		if b[0] == '\n' {
			return json.Unmarshal(line, v)
		}
		if line = append(line, b[0]); len(line) > most {
			return fmt.Errorf("a line of more than %d bytes", most)
		}
	}
}
