// SPDX-License-Identifier: Apache-2.0

// Package guest is the way into a machine from the host: who it is to be, commands,
// shells and files over ssh, and finding out whether it is ready. To a machine with
// lab-agent it goes through the agent's channel, to any other through ssh on port
// 22; what is done there is the same, only the dialling differs.
package guest

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/labfile/lab/internal/guest/agentapi"
	"github.com/labfile/lab/internal/lab"
)

// Identity is what makes a machine this machine.
type Identity = agentapi.Identity

// Hello is what the agent says of its guest.
type Hello = agentapi.Hello

// RefusedError is the agent's reason to refuse what it was asked.
type RefusedError = agentapi.RefusedError

// Dialers open connections to a machine.
type Dialers struct {
	// Agent opens a new stream to lab-agent; nil if the machine has none.
	Agent func(ctx context.Context) (net.Conn, error)
	// Port connects to a TCP port of the guest.
	Port func(ctx context.Context, port uint16) (net.Conn, error)
}

// Target is a machine to log in to.
type Target struct {
	Dialers
	Machine lab.Name
	User    string
	Key     ssh.Signer    // the lab's
	HostKey ssh.PublicKey // the machine's: any other is refused
	Env     []string      // NAME=VALUE, of everything that is run there
	Unset   []string      // names that logins of the guest set, and that hold only if Env has them

	// LoggedIn is told of each login, before it is used; may be nil. It must not wait.
	LoggedIn func(*Client)
}

// IdentityConfig is what an Identity is made of.
type IdentityConfig struct {
	Machine       lab.Name
	Address       netip.Addr // zero for a machine without a network
	Network       lab.Network
	Direct        netip.Prefix    // in a network where it runs; zero if it is in none
	Kind          lab.NetworkKind // of that
	AuthorizedKey ssh.PublicKey
	HostKey       Key
	Users         []string // who get the key besides root, where they exist
}

// NewIdentity returns the identity of a machine of a lab.
func NewIdentity(c IdentityConfig) (Identity, error) {
	id := Identity{
		Hostname:       string(c.Machine),
		Domain:         lab.Domain,
		HostKey:        c.HostKey.PEM,
		AuthorizedKeys: []string{AuthorizedKey(c.AuthorizedKey)},
		Users:          c.Users,
	}
	if len(id.Users) == 0 {
		id.Users = []string{"lab"} // the built-in boxes' ordinary user
	}
	if c.Address.IsValid() && !c.Address.Is4() {
		return Identity{}, fmt.Errorf("identity: %s is not an IPv4 address", c.Address)
	}
	if c.Address.IsValid() {
		id.MAC = lab.MACOf(c.Address)
		id.Address = netip.PrefixFrom(c.Address, c.Network.Subnet.Bits())
		id.Gateway = c.Network.Gateway
		id.DNS = []netip.Addr{c.Network.Gateway}
	}
	if c.Direct.IsValid() {
		id.Direct = &agentapi.Direct{MAC: lab.MACOf(c.Direct.Addr()), Address: c.Direct}
		if c.Kind == lab.NetworkNAT {
			id.Direct.Gateway = c.Direct.Masked().Addr().Next()
		}
	}
	return id, id.Validate()
}

// Identify makes the guest take on an identity, over a new stream to its agent. It
// adds the present time and fresh entropy. Asking for what is already so changes
// nothing.
func Identify(ctx context.Context, conn net.Conn, id Identity) error {
	_, err := IdentifyHello(ctx, conn, id)
	return err
}

// IdentifyHello is Identify for whoever wants to know what the agent says then: it
// may have warnings.
func IdentifyHello(ctx context.Context, conn net.Conn, id Identity) (Hello, error) {
	id.Entropy = entropy()
	id.Time = time.Now()
	return control(ctx, conn, agentapi.Request{Op: agentapi.OpIdentify, Identity: &id})
}

// Refresh sets the guest's clock and adds entropy, as is needed after it was
// suspended.
func Refresh(ctx context.Context, conn net.Conn) error {
	_, err := control(ctx, conn, agentapi.Request{Op: agentapi.OpRefresh, Entropy: entropy(), Time: time.Now()})
	return err
}

// SayHello asks the agent who it is, over a new stream to it.
func SayHello(ctx context.Context, conn net.Conn) (Hello, error) {
	return control(ctx, conn, agentapi.Request{Op: agentapi.OpHello})
}

// Sync makes the guest write everything to its disks.
func Sync(ctx context.Context, conn net.Conn) error {
	_, err := control(ctx, conn, agentapi.Request{Op: agentapi.OpSync})
	return err
}

// Poweroff makes the guest begin to shut down, over a new stream to its agent. It
// does not wait for the end.
func Poweroff(ctx context.Context, conn net.Conn) error {
	_, err := control(ctx, conn, agentapi.Request{Op: agentapi.OpPoweroff})
	return err
}

// Reboot makes the guest begin to reboot.
func Reboot(ctx context.Context, conn net.Conn) error {
	_, err := control(ctx, conn, agentapi.Request{Op: agentapi.OpReboot})
	return err
}

// entropy is as much as the kernel's generator takes in.
func entropy() []byte {
	b := make([]byte, 64)
	_, _ = rand.Read(b) // never fails: see crypto/rand
	return b
}

func control(ctx context.Context, conn net.Conn, req agentapi.Request) (Hello, error) {
	if err := agentapi.Begin(ctx, conn, agentapi.Control); err != nil {
		return Hello{}, err
	}
	resp, err := agentapi.Call(ctx, conn, req)
	if err != nil {
		return Hello{}, err
	}
	if resp.Hello == nil {
		return Hello{}, fmt.Errorf("asking the agent for %q: it said nothing", req.Op)
	}
	return *resp.Hello, nil
}

// sshPort is where a guest's own ssh server listens.
const sshPort = 22

// DialSSH opens a connection to the machine that speaks the ssh protocol: through
// the agent if there is one, or else to port 22.
func DialSSH(ctx context.Context, t Target) (net.Conn, error) {
	if t.Agent == nil {
		return dialPort(ctx, t, sshPort)
	}
	conn, err := t.Agent(ctx)
	if err != nil {
		return nil, fmt.Errorf("reaching the agent of machine %q: %w", t.Machine, err)
	}
	if err := agentapi.Begin(ctx, conn, agentapi.SSH); err != nil {
		conn.Close()
		return nil, fmt.Errorf("reaching the ssh server of machine %q: %w", t.Machine, err)
	}
	return conn, nil
}

func dialPort(ctx context.Context, t Target, port uint16) (net.Conn, error) {
	if t.Port == nil {
		return nil, fmt.Errorf("reaching port %d of machine %q: %w", port, t.Machine, errors.ErrUnsupported)
	}
	conn, err := t.Port(ctx, port)
	if err != nil {
		return nil, fmt.Errorf("reaching port %d of machine %q: %w", port, t.Machine, err)
	}
	return conn, nil
}
