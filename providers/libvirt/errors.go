// SPDX-License-Identifier: Apache-2.0

package libvirt

import (
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"syscall"
	"time"

	golibvirt "github.com/digitalocean/go-libvirt"
	"github.com/labfile/lab/providers"
)

// code returns the number of libvirt's error; ok is false if err is none.
func code(err error) (golibvirt.ErrorNumber, bool) {
	var e golibvirt.Error
	if !errors.As(err, &e) {
		return 0, false
	}
	return golibvirt.ErrorNumber(e.Code), true
}

// absent lists what libvirt says when something is not there. go-libvirt's own
// IsNotFound knows the first of these only.
var absent = []golibvirt.ErrorNumber{
	golibvirt.ErrNoDomain, golibvirt.ErrNoDomainMetadata, golibvirt.ErrNoDomainSnapshot,
	golibvirt.ErrNoNetwork, golibvirt.ErrNoStoragePool, golibvirt.ErrNoStorageVol,
}

// isNotFound reports whether libvirt says that what was asked for is not there.
func isNotFound(err error) bool {
	c, ok := code(err)
	return ok && slices.Contains(absent, c)
}

// isInvalid reports whether libvirt refuses because of the object's present state:
// starting what runs, stopping what does not.
func isInvalid(err error) bool {
	c, ok := code(err)
	return ok && c == golibvirt.ErrOperationInvalid
}

// silentEnd reports whether err is of a QEMU that ended before libvirt was connected with
// it, so that nobody asked for its last words (libvirt's qemuMonitorOpenUnixSocket).
func silentEnd(err error) bool {
	var e golibvirt.Error
	return errors.As(err, &e) && golibvirt.ErrorNumber(e.Code) == golibvirt.ErrSystemError &&
		strings.Contains(e.Message, "failed to connect to monitor socket")
}

// errHung says that the daemon took a connection or a question and said nothing.
type errHung struct {
	where string
	limit time.Duration

	ssh  string // the command that shows whether it is what comes before the daemon; empty for nothing
	said string // what ssh printed meanwhile
}

func (e *errHung) Error() string {
	if e.ssh != "" {
		waited := e.limit.String()
		if e.said != "" {
			waited += fmt.Sprintf("; ssh printed %.200q", e.said[strings.LastIndexByte(e.said, '\n')+1:])
		}
		return fmt.Sprintf("libvirt at %s does not answer (waited %s); its machines go on. If %q takes as long, then it is ssh, or what the account's shell runs when it starts; if not, see what the daemon is doing there", e.where, waited, e.ssh)
	}
	return fmt.Sprintf("libvirt at %s does not answer (waited %s); its machines go on. See what the daemon is doing, or restart it", e.where, e.limit)
}

// errLost says that the connection ended under a question, so that nobody knows
// whether it was carried out.
type errLost struct{ where string }

func (e *errLost) Error() string {
	return fmt.Sprintf("the connection to libvirt at %s was lost: the daemon ended or was restarted; its machines go on. Run the command again", e.where)
}

// errAbsent says that there is no daemon to talk to.
type errAbsent struct {
	where string
	err   error
	cure  string
}

func (e *errAbsent) Error() string {
	text := fmt.Sprintf("libvirt does not listen at %s: %v", e.where, e.err)
	if e.cure != "" {
		text += "; " + e.cure
	}
	return text
}

// Hint is the next step.
func (e *errAbsent) Hint() string {
	return "\"lab doctor --provider libvirt\" checks what libvirt needs here; \"--provider qemu\" does without it"
}

// Unwrap says that it is this host that lacks something.
func (e *errAbsent) Unwrap() []error { return []error{e.err, providers.ErrIncapable} }

// isRefused reports whether libvirt took the connection and refuses who made it.
func isRefused(err error) bool {
	c, ok := code(err)
	return ok && (c == golibvirt.ErrAuthFailed || c == golibvirt.ErrAuthCancelled || c == golibvirt.ErrAuthUnavailable)
}

// errRefused says that the daemon answers others only.
type errRefused struct {
	where string
	err   error
	cure  string
}

func (e *errRefused) Error() string {
	return fmt.Sprintf("libvirt at %s refuses this user: %v", e.where, e.err)
}

// Hint is the next step.
func (e *errRefused) Hint() string { return e.cure }

// Unwrap says that it is this host that lacks something.
func (e *errRefused) Unwrap() []error { return []error{e.err, providers.ErrIncapable} }

// unreachable reports whether err is of a daemon that is gone or deaf, rather than its
// answer.
func unreachable(err error) bool {
	var hung *errHung
	var lost *errLost
	var absent *errAbsent
	return errors.As(err, &hung) || errors.As(err, &lost) || errors.As(err, &absent)
}

// broken reports whether err is of a connection that has ended, rather than
// libvirt's answer.
func broken(err error) bool {
	if _, ok := code(err); ok || err == nil {
		return false
	}
	var op *net.OpError
	return errors.Is(err, golibvirt.ErrInterrupted) || errors.Is(err, io.EOF) || errors.Is(err, syscall.EINVAL) ||
		errors.Is(err, syscall.EPIPE) || errors.Is(err, net.ErrClosed) || errors.As(err, &op)
}
