// SPDX-License-Identifier: Apache-2.0

// Package guesttest is a guest for tests: it has an agent that takes on an identity and
// logins by ssh, and starts no process.
package guesttest

import (
	"context"
	"io"
	"net"
	"sync"

	"golang.org/x/crypto/ssh"

	"github.com/labfile/lab/internal/guest/agentapi"
	"github.com/labfile/lab/internal/guest/channel"
)

// Machine is what a guest runs on: a *memory.Guest.
type Machine interface {
	io.ReadWriter // the console
	AcceptAgent() (net.Conn, error)
	PowerButton() <-chan struct{}
}

// Command is a command of a login.
type Command struct {
	Line   string    // empty for a shell
	Stdin  io.Reader // its input
	Output io.Writer // both of its streams
}

// Guest is a guest with an agent.
type Guest struct {
	Banner string // what it prints when it has booted

	// Run carries a command out and returns its exit code. ctx ends when the command gets a
	// signal, when the client leaves, and with the power.
	Run func(ctx context.Context, c Command) int

	// Hold is called before the guest answers anything, and holds the answer until it
	// returns; it may be nil. Hello says that it was asked whether it is there.
	Hold func(hello bool)

	// Introduced is called when the guest is told who it is; it may be nil.
	Introduced func(agentapi.Identity)

	off context.CancelFunc

	mu     sync.Mutex
	server *ssh.ServerConfig // nil before it has an identity
}

// Serve is what the machine runs until its power is off.
func (a *Guest) Serve(ctx context.Context, m Machine) error {
	ctx, cancel := context.WithCancel(ctx)
	var streams sync.WaitGroup
	defer streams.Wait()
	defer cancel()
	a.off = cancel
	go func() {
		select {
		case <-m.PowerButton():
			cancel()
		case <-ctx.Done():
		}
	}()
	go func() { _, _ = io.Copy(io.Discard, struct{ io.Reader }{m}) }() // what is typed; its end is the power's
	_, _ = io.WriteString(m, a.Banner+"\r\n")
	ports := make(chan net.Conn)
	go func() {
		defer close(ports)
		for {
			port, err := m.AcceptAgent() // until the power is off
			if err != nil {
				return
			}
			select {
			case ports <- port:
			case <-ctx.Done():
				port.Close()
			}
		}
	}()
	for {
		var port net.Conn
		select {
		case port = <-ports:
		case <-ctx.Done():
		}
		if port == nil {
			return nil
		}
		stop := context.AfterFunc(ctx, func() { port.Close() })
		_ = channel.Serve(ctx, port, func(c net.Conn) {
			streams.Add(1)
			defer streams.Done()
			a.stream(ctx, c)
		})
		stop()
		port.Close()
	}
}

func (a *Guest) stream(ctx context.Context, c net.Conn) {
	defer c.Close()
	h, err := agentapi.Accept(c)
	a.hold(false)
	if err != nil || agentapi.Answer(c, nil) != nil {
		return
	}
	switch h.Kind {
	case agentapi.Control:
		_ = agentapi.Serve(c, a.control)
	case agentapi.SSH:
		a.mu.Lock()
		server := a.server
		a.mu.Unlock()
		_, chans, reqs, err := ssh.NewServerConn(c, server)
		if err != nil {
			return
		}
		go func() {
			for req := range reqs { // whether it is there
				a.hold(false)
				_ = req.Reply(false, nil)
			}
		}()
		for nc := range chans {
			if ch, reqs, err := nc.Accept(); err == nil {
				go a.session(ctx, ch, reqs)
			}
		}
	}
}

func (a *Guest) hold(hello bool) {
	if a.Hold != nil {
		a.Hold(hello)
	}
}

// control takes on an identity.
func (a *Guest) control(req agentapi.Request) agentapi.Response {
	a.hold(req.Op == agentapi.OpHello)
	hello := &agentapi.Hello{Version: "test"}
	if req.Op == agentapi.OpPoweroff {
		go a.off() // the host takes the end for an answer, too
	}
	if req.Identity != nil {
		key, err := ssh.ParsePrivateKey(req.Identity.HostKey)
		if err != nil {
			return agentapi.Response{Error: err.Error()}
		}
		server := &ssh.ServerConfig{PublicKeyCallback: func(ssh.ConnMetadata, ssh.PublicKey) (*ssh.Permissions, error) { return nil, nil }}
		server.AddHostKey(key)
		a.mu.Lock()
		a.server = server
		a.mu.Unlock()
		if a.Introduced != nil {
			a.Introduced(*req.Identity)
		}
		hello.Identity = req.Identity.Lasting().Fingerprint()
	}
	return agentapi.Response{Hello: hello}
}

// session runs one command.
func (a *Guest) session(ctx context.Context, ch ssh.Channel, reqs <-chan *ssh.Request) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer ch.Close()
	begun := false
	for req := range reqs {
		a.hold(false)
		var line struct{ Text string }
		switch req.Type {
		case "exec":
			_ = ssh.Unmarshal(req.Payload, &line)
		case "shell": // it reads the end of its input
		case "signal":
			cancel()
			continue
		default:
			_ = req.Reply(req.Type == "env", nil)
			continue
		}
		if begun {
			_ = req.Reply(false, nil)
			continue
		}
		begun = true
		_ = req.Reply(true, nil)
		go func() {
			code := a.Run(ctx, Command{Line: line.Text, Stdin: ch, Output: ch})
			_, _ = ch.SendRequest("exit-status", false, ssh.Marshal(struct{ Code uint32 }{uint32(code)}))
			ch.Close()
		}()
	}
}
