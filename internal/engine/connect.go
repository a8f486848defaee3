// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/labfile/lab/internal/fsutil"
	"github.com/labfile/lab/internal/guest"
	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/ledger"
	"github.com/labfile/lab/internal/supervise"
	"github.com/labfile/lab/providers"
)

// user returns whom to log in as: what the Labfile says, else what the box says.
func user(c ledger.Create) string {
	switch {
	case c.Spec.User != "":
		return c.Spec.User
	case c.User != "":
		return c.User
	}
	return "root"
}

// target is how to get into a machine. login overrides the recorded user unless
// it is empty.
func (l *Lab) target(name lab.Name, c ledger.Create, login string) (guest.Target, error) {
	key, err := l.labKey()
	if err != nil {
		return guest.Target{}, err
	}
	host, err := l.hostKey(name)
	if err != nil {
		return guest.Target{}, err
	}
	if login == "" {
		login = user(c)
	}
	t := guest.Target{Machine: name, User: login, Key: key.Signer, HostKey: host.Signer.PublicKey()}
	t.Port = func(ctx context.Context, port uint16) (net.Conn, error) {
		return l.dial(ctx, func(c *supervise.Client) (net.Conn, error) { return c.Dial(ctx, name, port) })
	}
	if c.Agent {
		t.Agent = func(ctx context.Context) (net.Conn, error) {
			return l.dial(ctx, func(c *supervise.Client) (net.Conn, error) { return c.Agent(ctx, name) })
		}
	}
	return t, nil
}

// targetOf is target for one generation, whether it is the present one or not.
func (l *Lab) targetOf(g lab.Generation, c ledger.Create) (guest.Target, error) {
	t, err := l.target(g.Machine, c, "")
	t.Port = func(ctx context.Context, port uint16) (net.Conn, error) {
		return l.dial(ctx, func(c *supervise.Client) (net.Conn, error) { return c.DialGeneration(ctx, g, port) })
	}
	if c.Agent {
		t.Agent = func(ctx context.Context) (net.Conn, error) {
			return l.dial(ctx, func(c *supervise.Client) (net.Conn, error) { return c.AgentGeneration(ctx, g) })
		}
	}
	return t, err
}

// dial asks the lab's supervisor for a connection, bringing it back if needed.
func (l *Lab) dial(ctx context.Context, ask func(*supervise.Client) (net.Conn, error)) (net.Conn, error) {
	c, err := l.ensure(ctx)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	conn, err := ask(c)
	if !errors.Is(err, supervise.ErrNotPlugged) || l.locked() {
		return conn, err
	}
	if err := l.replug(ctx, c); err != nil { // as in heal
		return nil, err
	}
	return ask(c)
}

// PausedError says that a machine's processors are halted: it answers nobody.
type PausedError struct {
	Machine lab.Name
	Why     string // may be empty
}

// Error implements error.
func (e *PausedError) Error() string {
	if e.Why == "" {
		return fmt.Sprintf("%s is paused", e.Machine)
	}
	return fmt.Sprintf("%s is paused: %s", e.Machine, e.Why)
}

// Unwrap returns providers.ErrNotRunning.
func (e *PausedError) Unwrap() error { return providers.ErrNotRunning }

// Hint is the next step.
func (e *PausedError) Hint() string {
	return fmt.Sprintf("\"lab up %s\" lets it go on, \"lab replace %s\" puts a new one in its place", e.Machine, e.Machine)
}

// UnreachableError says that a machine runs but cannot be reached, since its sockets are gone.
type UnreachableError struct {
	Machine lab.Name
	Why     string
}

// Error implements error.
func (e *UnreachableError) Error() string {
	return fmt.Sprintf("machine %q runs, but cannot be reached: %s", e.Machine, e.Why)
}

// Hint is the next step.
func (e *UnreachableError) Hint() string {
	return fmt.Sprintf("\"lab stop %s && lab start %[1]s\" shuts it down in order and starts it again; so does \"lab up\"", e.Machine)
}

// notRunningError says in the user's words why a machine does not run.
type notRunningError struct {
	machine lab.Name
	state   MachineState
	why     string // may be empty
}

func (e *notRunningError) Error() string {
	text := fmt.Sprintf("%s is %s", e.machine, e.state)
	switch e.state {
	case StateExited, StateFailed, StateBroken:
		text = fmt.Sprintf("%s is not running", e.machine)
	case StateMissing:
		text = fmt.Sprintf("%s is gone", e.machine)
	}
	if e.why == "" {
		return text
	}
	return text + ": " + e.why
}

func (e *notRunningError) Unwrap() error { return providers.ErrNotRunning }

// running returns the record of a machine that runs.
//
// Errors: ErrNoLab, *NoMachineError, and providers.ErrNotRunning with why, as a
// *PausedError if it is there but halted, or a *UnreachableError if it cannot be reached.
func (l *Lab) running(ctx context.Context, name lab.Name) (ledger.Machine, error) {
	m, p, err := l.known(name)
	if err != nil {
		return m, err
	}
	live, err := p.Inspect(ctx, lab.Generation{Lab: l.id, Machine: name, Number: m.Generation})
	if err != nil && !errors.Is(err, providers.ErrNotFound) {
		return m, err
	}
	if err != nil || live.State != providers.StateRunning && live.State != providers.StatePaused {
		state, why := judge(m, err == nil, live, l.locked())
		return m, &notRunningError{name, state, why}
	}
	if live.Unreachable != "" {
		return m, &UnreachableError{Machine: name, Why: live.Unreachable}
	}
	if live.State == providers.StatePaused {
		return m, &PausedError{Machine: name, Why: live.Reason}
	}
	return m, nil
}

// known returns the record of a machine and its provider.
func (l *Lab) known(name lab.Name) (ledger.Machine, providers.Provider, error) {
	if !l.book.Exists() {
		return ledger.Machine{}, nil, ErrNoLab
	}
	state, err := l.read()
	if err != nil {
		return ledger.Machine{}, nil, err
	}
	m, ok := state.Machines[name]
	if !ok || m.Phase == ledger.PhaseGone {
		return m, nil, &NoMachineError{Name: name, Known: state.Names()}
	}
	p, err := l.host.Provider(state.Opened)
	return m, p, err
}

// connectTime bounds how long a machine that runs may take to let somebody in. One that
// boots may be waited for; one whose agent says nothing is not, for ever.
const connectTime = time.Minute

// SilentError says that a machine runs but does not answer.
type SilentError struct {
	Machine lab.Name
	Waited  time.Duration
	Agent   bool // it is its agent that does not answer
}

func (e *SilentError) Error() string {
	who := string(e.Machine)
	if e.Agent {
		who = "the agent of " + who
	}
	return fmt.Sprintf("%s has not answered for %v", who, e.Waited)
}

// Hint is the next step.
func (e *SilentError) Hint() string {
	return fmt.Sprintf("\"lab console %[1]s\" and \"lab logs %[1]s\" show what it does; \"lab replace %[1]s\" puts a new one in its place", e.Machine)
}

// Silence says why a machine that was heard does not answer now.
func (l *Lab) Silence(ctx context.Context, name lab.Name) *Silence {
	m, p, err := l.known(name)
	if err != nil {
		return &Silence{Text: silentText}
	}
	return silence(ctx, p, lab.Generation{Lab: l.id, Machine: name, Number: m.Generation})
}

// Connect logs in to a machine, as login or, if that is empty, as the machine's
// own user. Errors: ErrNoLab, *NoMachineError, providers.ErrNotRunning, and those
// of guest.Connect; a *SilentError if it has not answered for a minute.
func (l *Lab) Connect(ctx context.Context, name lab.Name, login string) (*guest.Client, error) {
	m, err := l.running(ctx, name)
	if err != nil {
		return nil, err
	}
	t, err := l.enterable(ctx, name, m.Create, login)
	if err != nil {
		return nil, err
	}
	silent := &SilentError{Machine: name, Waited: connectTime, Agent: t.Agent != nil}
	limit, cancel := context.WithTimeoutCause(ctx, connectTime, silent)
	defer cancel()
	c, err := guest.Connect(limit, t)
	if err != nil && ctx.Err() == nil && context.Cause(limit) == silent {
		err = silent
	}
	return c, err
}

// DialPort connects to a TCP port of a machine.
func (l *Lab) DialPort(ctx context.Context, name lab.Name, port uint16) (net.Conn, error) {
	if _, err := l.running(ctx, name); err != nil {
		return nil, err
	}
	return l.dial(ctx, func(c *supervise.Client) (net.Conn, error) { return c.Dial(ctx, name, port) })
}

// DialSSH opens a connection that speaks the ssh protocol: to the agent if the
// machine has one, else to port 22.
func (l *Lab) DialSSH(ctx context.Context, name lab.Name) (net.Conn, error) {
	m, err := l.running(ctx, name)
	if err != nil {
		return nil, err
	}
	t, err := l.enterable(ctx, name, m.Create, "")
	if err != nil {
		return nil, err
	}
	return guest.DialSSH(ctx, t)
}

// Console opens the machine's serial console.
func (l *Lab) Console(ctx context.Context, name lab.Name) (io.ReadWriteCloser, error) {
	m, p, err := l.known(name)
	if err != nil {
		return nil, err
	}
	return p.Console(ctx, lab.Generation{Lab: l.id, Machine: name, Number: m.Generation})
}

// OpenLog opens a log of one of the machine's generations, of the present one if
// number is 0. Read returns io.EOF at the present end, and may return more later.
//
// Errors: ErrNoLab, *NoMachineError, and *NoGenerationError if that generation does
// not exist any more.
func (l *Lab) OpenLog(ctx context.Context, name lab.Name, number int, which providers.Log) (io.ReadCloser, error) {
	m, p, err := l.known(name)
	if err != nil {
		return nil, err
	}
	if number == 0 {
		number = m.Generation
	}
	log, err := p.OpenLog(ctx, lab.Generation{Lab: l.id, Machine: name, Number: number}, which)
	if errors.Is(err, providers.ErrNotFound) && number != m.Generation {
		e := &NoGenerationError{Machine: name, Number: number}
		for _, g := range append(slices.Clone(m.Past), m) {
			e.Known = append(e.Known, g.Generation)
		}
		slices.Sort(e.Known)
		return nil, e
	}
	return log, err
}

// SSHHost is what an ssh client needs to know of a machine.
type SSHHost struct {
	Name           lab.Name
	Lab            string // what the lab is called, which is not unique
	User           string
	KeyFile        string // the lab's private key
	KnownHostsFile string
	HostKeyAlias   string // under which KnownHostsFile has the machine's key
}

// SSHConfig returns the lab's machines as ssh hosts, sorted by name.
func (l *Lab) SSHConfig() ([]SSHHost, error) {
	if !l.book.Exists() {
		return nil, ErrNoLab
	}
	state, err := l.read()
	if err != nil {
		return nil, err
	}
	if _, err := l.labKey(); err != nil {
		return nil, err
	}
	known := filepath.Join(l.host.Dirs.Keys(l.id), "known_hosts")
	var (
		hosts []SSHHost
		lines []byte
	)
	for _, name := range state.Names() {
		key, err := l.hostKey(name)
		if err != nil {
			return nil, err
		}
		alias := string(name) + "." + string(l.id) + "." + lab.Domain
		lines = append(lines, guest.KnownHostsLine(alias, key.Signer.PublicKey())...)
		hosts = append(hosts, SSHHost{
			Name: name, Lab: state.Opened.Name, User: user(state.Machines[name].Create), KeyFile: l.keyFile(labKeyName),
			KnownHostsFile: known, HostKeyAlias: alias,
		})
	}
	if err := fsutil.WriteFile(known, lines, 0o600); err != nil {
		return nil, fmt.Errorf("writing the known hosts: %w", err)
	}
	return hosts, nil
}

// identity is what the guest is told of itself.
func (l *Lab) identity(g lab.Generation, c ledger.Create) (guest.Identity, error) {
	key, err := l.labKey()
	if err != nil {
		return guest.Identity{}, err
	}
	host, err := l.hostKey(g.Machine)
	if err != nil {
		return guest.Identity{}, err
	}
	return guest.NewIdentity(guest.IdentityConfig{
		Machine: g.Machine, Address: c.Address, Network: lab.NetworkOf(l.id), Direct: c.Direct, Kind: c.Spec.Network,
		AuthorizedKey: key.Signer.PublicKey(), HostKey: host,
		Users: []string{"lab", user(c)}, // the built-in boxes' ordinary user, and who was asked for
	})
}

const labKeyName = "id_ed25519"

// labKey is the key that opens every machine of the lab.
func (l *Lab) labKey() (guest.Key, error) { return l.key(labKeyName, "lab "+string(l.id)) }

// hostKey is the key by which a machine is known: made by us, so that the first
// connection is verified already, and kept across generations.
func (l *Lab) hostKey(name lab.Name) (guest.Key, error) {
	return l.key("host_"+string(name), string(name)+"."+lab.Domain)
}

func (l *Lab) keyFile(name string) string { return filepath.Join(l.host.Dirs.Keys(l.id), name) }

// key reads a private key of the lab, which is made if there is none.
func (l *Lab) key(name, comment string) (guest.Key, error) {
	path := l.keyFile(name)
	pem, err := os.ReadFile(path)
	if err == nil {
		return guest.ParseKey(pem)
	}
	if !errors.Is(err, os.ErrNotExist) {
		return guest.Key{}, fmt.Errorf("reading a key of the lab: %w", err)
	}
	key, err := guest.NewKey(comment)
	if err != nil {
		return guest.Key{}, err
	}
	// Two machines may ask for the lab's key at once: the first one to commit wins.
	draft, err := fsutil.NewDraft(path, 0o600)
	if err != nil {
		return guest.Key{}, fmt.Errorf("writing a key of the lab: %w", err)
	}
	defer draft.Drop()
	if _, err := draft.Write(key.PEM); err != nil {
		return guest.Key{}, fmt.Errorf("writing a key of the lab: %w", err)
	}
	if err := draft.CommitNew(); errors.Is(err, os.ErrExist) {
		return l.key(name, comment)
	} else if err != nil {
		return guest.Key{}, fmt.Errorf("writing a key of the lab: %w", err)
	}
	return key, nil
}
