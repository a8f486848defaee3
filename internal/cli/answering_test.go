// SPDX-License-Identifier: Apache-2.0

package cli_test

import (
	"context"
	"io"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"

	"golang.org/x/crypto/ssh"

	"github.com/labfile/lab/boxes"
	"github.com/labfile/lab/internal/guest/agentapi"
	"github.com/labfile/lab/internal/guest/channel"
	"github.com/labfile/lab/providers"
	"github.com/labfile/lab/providers/memory"
)

// newAnsweringDesk is newDesk with a box "answering", whose machines run an agent that
// takes logins: see answering.
func newAnsweringDesk(t *testing.T, labfile string) *desk {
	t.Helper()
	mute := newHush()
	d := newDeskOn(t, labfile, memory.Config{
		Program: func(providers.Spec) memory.Program {
			return func(ctx context.Context, g *memory.Guest) error { return (&answering{mute: mute}).serve(ctx, g) }
		},
	})
	d.mute = mute
	store, err := boxes.Open(d.host.Dirs.Boxes())
	if err != nil {
		t.Fatal(err)
	}
	disk := filepath.Join(t.TempDir(), "disk.raw")
	if err := os.WriteFile(disk, []byte(strings.Repeat("y", 4096)), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err = store.Ingest(t.Context(), boxes.Ingredients{Config: boxes.Config{Architecture: "amd64", Agent: true}, Disk: disk}, "answering")
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// hush makes guests silent.
type hush struct {
	mu   sync.Mutex
	over chan struct{} // nil: they answer

	heard chan struct{} // has something once a guest was asked whether it is there, or runs "wait"
}

func newHush() *hush { return &hush{heard: make(chan struct{}, 1)} }

func (h *hush) hears() {
	select {
	case h.heard <- struct{}{}:
	default:
	}
}

func (h *hush) set(silent bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case silent && h.over == nil:
		h.over = make(chan struct{})
	case !silent && h.over != nil:
		close(h.over)
		h.over = nil
	}
}

// wait waits until guests may answer.
func (h *hush) wait() {
	h.mu.Lock()
	over := h.over
	h.mu.Unlock()
	if over != nil {
		<-over
	}
}

// answering is a guest with an agent. It starts no process: of a command, only
// "exit N", "echo TEXT" and "wait" are carried out, which must be its last.
type answering struct {
	off  context.CancelFunc
	mute *hush

	mu     sync.Mutex
	server *ssh.ServerConfig // nil before it has an identity
}

func (a *answering) serve(ctx context.Context, g *memory.Guest) error {
	ctx, cancel := context.WithCancel(ctx)
	var streams sync.WaitGroup
	defer streams.Wait()
	defer cancel()
	a.off = cancel
	go func() {
		select {
		case <-g.PowerButton():
			cancel()
		case <-ctx.Done():
		}
	}()
	go func() { _, _ = io.Copy(io.Discard, struct{ io.Reader }{g}) }() // what is typed; its end is the power's
	_, _ = io.WriteString(g, memory.Banner+"\r\n")
	ports := make(chan net.Conn)
	go func() {
		defer close(ports)
		for {
			port, err := g.AcceptAgent() // until the power is off
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
			a.stream(c)
		})
		stop()
		port.Close()
	}
}

func (a *answering) stream(c net.Conn) {
	defer c.Close()
	h, err := agentapi.Accept(c)
	a.mute.wait()
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
				a.mute.wait()
				_ = req.Reply(false, nil)
			}
		}()
		for nc := range chans {
			if ch, reqs, err := nc.Accept(); err == nil {
				go session(ch, reqs, a.mute)
			}
		}
	}
}

// control takes on an identity.
func (a *answering) control(req agentapi.Request) agentapi.Response {
	if req.Op == agentapi.OpHello {
		a.mute.hears()
	}
	a.mute.wait()
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
		hello.Identity = req.Identity.Lasting().Fingerprint()
	}
	return agentapi.Response{Hello: hello}
}

var (
	exits  = regexp.MustCompile(`exit ([0-9]+)'?\s*$`)
	echoes = regexp.MustCompile(`echo ([^';]*)`)
)

func session(ch ssh.Channel, reqs <-chan *ssh.Request, mute *hush) {
	defer ch.Close()
	for req := range reqs {
		mute.wait()
		var line struct{ Text string }
		switch req.Type {
		case "exec":
			_ = ssh.Unmarshal(req.Payload, &line)
		case "shell": // it reads the end of its input
		default:
			_ = req.Reply(req.Type == "env", nil)
			continue
		}
		_ = req.Reply(true, nil)
		if strings.Contains(line.Text, "wait") {
			mute.hears()
			ssh.DiscardRequests(reqs) // until the host has enough of it
			return
		}
		if m := echoes.FindStringSubmatch(line.Text); m != nil {
			_, _ = io.WriteString(ch, m[1]+"\n")
		}
		code := 0
		if m := exits.FindStringSubmatch(line.Text); m != nil {
			code, _ = strconv.Atoi(m[1])
		}
		_, _ = ch.SendRequest("exit-status", false, ssh.Marshal(struct{ Code uint32 }{uint32(code)}))
		return
	}
}
