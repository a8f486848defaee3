// SPDX-License-Identifier: Apache-2.0

//go:build linux

// Package agent is what lab-agent does inside a guest: it takes on the identity the
// host hands it, keeps it over reboots, and serves control requests and ssh over
// the channel. It listens on no network port.
package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"

	"github.com/labfile/lab/internal/guest/agentapi"
	"github.com/labfile/lab/internal/guest/channel"
	"github.com/labfile/lab/internal/guest/hostfs"
	"github.com/labfile/lab/internal/guest/sshd"
)

// stateFile keeps the identity, below the agent's root.
const stateFile = "var/lib/lab-agent/identity.json"

// Machine is what an identity changes besides files. Kernel is the real one.
type Machine interface {
	SetHostname(name string) error
	SetClock(t time.Time) error
	AddEntropy(b []byte) error
	SetNetwork(id agentapi.Identity) error
	GrowRoot() error
	Sync() error
	Shutdown(reboot bool) error
}

// Agent is the agent of one guest.
type Agent struct {
	Version string
	Root    *os.Root // of the guest's files: "/"
	Machine Machine
	SFTP    []string // see sshd.Config
	Files   []string // see sshd.Config
	Folders []string // the command line that mounts a folder of the host: see hostfs.Main
	Log     *slog.Logger

	mu       sync.Mutex
	identity string // Fingerprint; empty if none is applied
	warnings []string
	ssh      sshd.Config

	folders folders
}

// Restore applies the identity of an earlier boot, if there is one.
func (a *Agent) Restore() error {
	b, err := a.Root.ReadFile(stateFile)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("reading the kept identity: %w", err)
	}
	var id agentapi.Identity
	if err := json.Unmarshal(b, &id); err != nil {
		return fmt.Errorf("reading the kept identity: %w", err)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.apply(id)
}

// Serve serves the host over the port that open returns, until ctx ends. It opens
// the port again whenever it fails.
func (a *Agent) Serve(ctx context.Context, open func(context.Context) (*os.File, error)) error {
	wait := newBackoff()
	for {
		port, err := open(ctx)
		if err == nil {
			start := time.Now()
			err = channel.Serve(ctx, port, func(c net.Conn) { a.Stream(ctx, c) })
			if time.Since(start) > time.Second {
				wait = newBackoff()
			}
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		a.Log.Debug("the channel ended", "error", err)
		if err := wait.sleep(ctx); err != nil {
			return err
		}
	}
}

// Stream serves one stream of the channel and closes it.
func (a *Agent) Stream(ctx context.Context, c net.Conn) {
	defer c.Close()
	h, err := agentapi.Accept(c)
	if err != nil {
		a.Log.Debug("a stream was not begun", "error", err)
		return
	}
	switch h.Kind {
	case agentapi.Control:
		if err = agentapi.Answer(c, nil); err == nil {
			err = agentapi.Serve(c, a.handle)
		}
	case agentapi.SSH:
		a.mu.Lock()
		cfg := a.ssh
		a.mu.Unlock()
		if cfg.HostKey == nil {
			err = agentapi.Answer(c, errors.New("this machine has not been given an identity yet"))
		} else if err = agentapi.Answer(c, nil); err == nil {
			err = sshd.Serve(ctx, c, cfg)
		}
	case agentapi.Files:
		if err = agentapi.Answer(c, nil); err == nil {
			err = listFiles(ctx, c, a.Root)
		}
	case agentapi.Mount:
		err = a.mount(ctx, c, h.Folder, hostfs.ForFiles)
	case agentapi.Cache:
		err = a.mount(ctx, c, h.Folder, hostfs.ForCache)
	default:
		err = agentapi.Answer(c, fmt.Errorf("lab-agent %s knows no such stream", a.Version))
	}
	if err != nil {
		a.Log.Debug("a stream ended", "kind", h.Kind, "error", err)
	}
}

// handle answers a control request.
func (a *Agent) handle(req agentapi.Request) agentapi.Response {
	a.mu.Lock()
	defer a.mu.Unlock()
	if err := a.do(req); err != nil {
		return agentapi.Response{Error: err.Error()}
	}
	hello := a.hello()
	if req.Op == agentapi.OpHello {
		hello.Connections = incoming(a.Root)
	}
	return agentapi.Response{Hello: hello}
}

func (a *Agent) do(req agentapi.Request) error {
	switch req.Op {
	case agentapi.OpHello, agentapi.OpPing:
		return nil
	case agentapi.OpIdentify:
		if req.Identity == nil {
			return errors.New("no identity was given")
		}
		return a.identify(*req.Identity)
	case agentapi.OpRefresh:
		return a.refresh(req.Time, req.Entropy)
	case agentapi.OpSync:
		return a.Machine.Sync()
	case agentapi.OpPoweroff, agentapi.OpReboot:
		return a.Machine.Shutdown(req.Op == agentapi.OpReboot)
	}
	return fmt.Errorf("lab-agent %s knows no such request", a.Version)
}

// hello gathers what the host wants to know. What cannot be read stays empty.
func (a *Agent) hello() *agentapi.Hello {
	h := &agentapi.Hello{Version: a.Version, Identity: a.identity, Warnings: a.warnings}
	h.Hostname, _ = os.Hostname()
	b, _ := a.Root.ReadFile("proc/sys/kernel/random/boot_id")
	h.BootID = strings.TrimSpace(string(b))
	var ts unix.Timespec
	if unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts) == nil {
		h.Uptime = time.Duration(ts.Nano())
	}
	return h
}

func (a *Agent) refresh(t time.Time, entropy []byte) error {
	if len(entropy) > 0 {
		if err := a.Machine.AddEntropy(entropy); err != nil {
			return err
		}
	}
	if !t.IsZero() {
		return a.Machine.SetClock(t)
	}
	return nil
}

// identify applies an identity and keeps it for the next boot.
func (a *Agent) identify(id agentapi.Identity) error {
	if err := id.Validate(); err != nil {
		return err
	}
	// The clock first, so that everything below is written at the right time.
	if err := a.refresh(id.Time, id.Entropy); err != nil {
		return err
	}
	id = id.Lasting()
	if a.identity == id.Fingerprint() && len(a.warnings) == 0 {
		return nil
	}
	if err := a.apply(id); err != nil {
		return err
	}
	b, err := json.Marshal(id)
	if err != nil {
		return err
	}
	if err := a.mkdir(path.Dir(stateFile), 0o700); err != nil {
		return err
	}
	return a.write(stateFile, append(b, '\n'), 0o600)
}

// apply makes the guest the machine that id says. It goes as far as it can: what
// stands in nobody's way becomes a warning.
func (a *Agent) apply(id agentapi.Identity) error {
	host, err := ssh.ParsePrivateKey(id.HostKey)
	if err != nil {
		return fmt.Errorf("reading the host key: %w", err)
	}
	var keys []ssh.PublicKey
	for i, line := range id.AuthorizedKeys {
		k, _, _, _, err := ssh.ParseAuthorizedKey([]byte(line))
		if err != nil {
			return fmt.Errorf("reading authorized key %s: %w", strconv.Itoa(i+1), err)
		}
		keys = append(keys, k)
	}
	a.warnings = nil
	warn := func(what string, err error) {
		if err != nil {
			a.warnings = append(a.warnings, what+": "+err.Error())
			a.Log.Warn(what, "error", err)
		}
	}
	if err := a.Machine.SetHostname(id.Hostname); err != nil {
		return fmt.Errorf("setting the host name: %w", err)
	}
	if err := a.Machine.SetNetwork(id); err != nil {
		return fmt.Errorf("setting up the network: %w", err)
	}
	if err := a.files(id, host, warn); err != nil {
		return err
	}
	warn("growing the root file system", a.Machine.GrowRoot())
	a.ssh = sshd.Config{
		HostKey: host, Authorized: keys, Etc: filepath.Join(a.Root.Name(), "etc"), SFTP: a.SFTP, Files: a.Files, Log: a.Log,
	}
	a.identity = id.Fingerprint()
	return nil
}
