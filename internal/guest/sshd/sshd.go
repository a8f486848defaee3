// SPDX-License-Identifier: Apache-2.0

//go:build linux

// Package sshd is the ssh server inside lab-agent: one connection per stream of the
// channel, logins by key as any account of the guest, commands, shells, file
// transfer, and forwarding of ports (ssh -L and -R) and of the client's agent (ssh -A).
//
// It starts processes itself, without PAM or logind: limits, session scopes and
// messages of the day of an ordinary login do not happen. /etc/environment it reads itself.
package sshd

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"net"
	"sync"
	"time"

	"golang.org/x/crypto/ssh"
)

// Config is what a connection is served with.
type Config struct {
	HostKey    ssh.Signer
	Authorized []ssh.PublicKey
	Etc        string   // directory of passwd, group and environment; empty means /etc
	SFTP       []string // argv of a program that serves sftp on its standard input and output: see ServeSFTP
	Files      []string // the same for filestream.Serve
	Log        *slog.Logger
}

// loginTime bounds how long a client may take to log in; under emulation a slow one
// needs a second or two.
const loginTime = 2 * time.Minute

func (c Config) server() *ssh.ServerConfig {
	sc := &ssh.ServerConfig{
		// Only keys: nothing can be guessed, and a client may have many.
		MaxAuthTries:  -1,
		ServerVersion: "SSH-2.0-lab-agent",
		PublicKeyCallback: func(conn ssh.ConnMetadata, key ssh.PublicKey) (*ssh.Permissions, error) {
			if _, err := c.account(conn.User()); err != nil {
				return nil, err
			}
			for _, k := range c.Authorized {
				if k.Type() == key.Type() && string(k.Marshal()) == string(key.Marshal()) {
					return nil, nil
				}
			}
			return nil, errors.New("key is not authorized")
		},
	}
	// One round of arithmetic that is quick under emulation too. The stream never
	// leaves the host, so a quantum computer has nothing to record.
	sc.KeyExchanges = []string{"curve25519-sha256", "curve25519-sha256@libssh.org"}
	sc.AddHostKey(c.HostKey)
	return sc
}

// Serve serves one client over conn until it leaves or ctx ends, and closes conn.
// Processes that the client had running get SIGHUP then; Serve does not wait until
// they have ended.
func Serve(ctx context.Context, conn net.Conn, c Config) error {
	defer conn.Close()
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	if err := conn.SetDeadline(time.Now().Add(loginTime)); err != nil {
		return err
	}
	sc, chans, reqs, err := ssh.NewServerConn(conn, c.server())
	if err != nil {
		return fmt.Errorf("logging a client in: %w", err)
	}
	if err := conn.SetDeadline(time.Time{}); err != nil {
		return err
	}
	acc, err := c.account(sc.User())
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	listeners := &listeners{conn: sc, acc: acc, open: map[bound]net.Listener{}}
	defer listeners.close()
	defer cancel() // first: what a listener accepted ends with it
	for nc := range inOrder(chans, reqs, func(req *ssh.Request) { listeners.handle(ctx, req) }) {
		switch nc.ChannelType() {
		case "session":
			ch, reqs, err := nc.Accept()
			if err != nil {
				return err
			}
			s := &session{Config: c, acc: acc, conn: sc, ch: ch, log: c.Log.With("user", acc.name)}
			wg.Go(func() { s.serve(ctx, reqs) })
		case "direct-tcpip":
			wg.Go(func() { connect(ctx, nc) })
		default:
			_ = nc.Reject(ssh.UnknownChannelType, "lab-agent does not offer "+nc.ChannelType())
		}
	}
	return nil
}

// inOrder yields the channels that a client opens. Requests that came before a channel are
// handled before it is yielded: a client asks for a port and runs what uses it without
// waiting for the answer.
func inOrder(chans <-chan ssh.NewChannel, reqs <-chan *ssh.Request, handle func(*ssh.Request)) iter.Seq[ssh.NewChannel] {
	return func(yield func(ssh.NewChannel) bool) {
		for {
			select {
			case req, ok := <-reqs:
				if !ok {
					reqs = nil
					continue
				}
				handle(req)
			case nc, ok := <-chans:
				if !ok {
					return
				}
				for range len(reqs) {
					if req, ok := <-reqs; ok {
						handle(req)
					}
				}
				if !yield(nc) {
					return
				}
			}
		}
	}
}
