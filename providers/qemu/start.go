// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"math"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/providers"
	"github.com/labfile/lab/providers/local"
	"github.com/labfile/lab/providers/qmp"
)

// startTimeout bounds the time from QEMU's start to its first answer, beside
// ctx. On a busy host with a cold page cache seconds are normal.
const startTimeout = 60 * time.Second

// Start launches QEMU and returns when its main loop answers: by then every
// device is made and every socket listens, but perhaps for the cable's.
func (p *Provider) Start(ctx context.Context, g lab.Generation) error {
	if err := p.start(ctx, g); err != nil {
		return fmt.Errorf("starting machine %q: %w", g, err)
	}
	return nil
}

func (p *Provider) start(ctx context.Context, g lab.Generation) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := local.CheckGeneration(g); err != nil {
		return err
	}
	dir := p.cfg.Dirs.Generation(g)
	def, ok, err := local.ReadDefinition(dir, g)
	if err != nil {
		return err
	}
	if !ok {
		return providers.ErrNotFound
	}
	if pid, err := lockHolder(filepath.Join(dir, local.FilePID)); err != nil || pid != 0 {
		if is, _ := local.Paused(dir); err == nil && is {
			return command(ctx, p.cfg.Dirs.Socket(g, socketMonitor), "cont")
		}
		return err
	}
	binary, err := p.binary()
	if err != nil {
		return err
	}
	how, err := p.prober.Accel(ctx, binary, def.Image.Kernel)
	if err != nil {
		return err
	}

	held, err := local.Lock(ctx, filepath.Join(dir, local.FileLock))
	if local.Gone(err) {
		return providers.ErrNotFound
	}
	if err != nil {
		return err
	}
	defer held.Close()
	alive, running, err := p.claim(ctx, dir)
	if err != nil || running {
		return err
	}
	defer alive.Close()

	sockets := p.cfg.Dirs.RunLab(g.Lab)
	if err := os.MkdirAll(sockets, 0o700); err != nil {
		return err
	}
	p.removeSockets(g)
	p.settle(dir)
	if err := local.FreshRecords(dir, local.FileLog); err != nil {
		return err
	}
	events, err := local.OpenEvents(dir)
	if err != nil {
		return err
	}
	if events != nil {
		defer events.Close() // QEMU has it open by the time that it answers
	}
	r := local.Run{ID: rand.Text(), Started: time.Now().UTC(), Accel: how.Name, Boot: local.BootID()}
	if err := local.WriteJSON(filepath.Join(dir, local.FileRun), r); err != nil {
		return err
	}
	l, err := p.launchOf(def, dir, how.Name)
	if err == nil {
		err = p.launch(ctx, binary, l, dir, r.ID, alive)
	}
	if err != nil {
		// It never ran, so how it ended before is still how it last ended.
		os.Remove(filepath.Join(dir, local.FileRun))
		p.removeSockets(g)
		os.Remove(sockets)
		return err
	}
	return nil
}

// claim takes the lock that QEMU inherits. If it is taken, either the machine
// runs, or a QEMU whose starter was killed is on its way up or down: that may
// take as long as a start.
func (p *Provider) claim(ctx context.Context, dir string) (alive *os.File, running bool, err error) {
	until := time.Now().Add(p.patience)
	for {
		f, ok, err := local.TryLock(filepath.Join(dir, local.FileAlive))
		if err != nil || ok {
			return f, false, err
		}
		pid, err := lockHolder(filepath.Join(dir, local.FilePID))
		if err != nil || pid != 0 {
			return nil, pid != 0, err
		}
		if time.Now().After(until) {
			return nil, false, stuck(dir, p.patience)
		}
		if err := local.Pause(ctx, local.LockRetry); err != nil {
			return nil, false, err
		}
	}
}

func (p *Provider) launchOf(d local.Definition, dir, accel string) (Launch, error) {
	own, err := local.Overlays(dir)
	if err != nil {
		return Launch{}, err
	}
	g := d.Generation()
	l := Launch{
		Name:          string(g.Lab) + "/" + g.String(),
		Accel:         accel,
		CPUs:          d.CPUs,
		Memory:        d.Memory,
		Base:          d.Image.Disk,
		Format:        d.Image.Format,
		Layers:        d.Image.Layers,
		Kernel:        d.Image.Kernel,
		Initrd:        d.Image.Initrd,
		Append:        d.CommandLine(),
		MAC:           d.MAC,
		NICSocket:     p.cfg.Dirs.Socket(g, socketNIC),
		ConsoleSocket: p.cfg.Dirs.Socket(g, socketConsole),
		ConsoleLog:    filepath.Join(dir, local.FileConsole),
		PIDFile:       filepath.Join(dir, local.FilePID),
		Events:        filepath.Join(dir, local.FileEvents),
	}
	for _, n := range own {
		l.Overlays = append(l.Overlays, overlay(dir, n))
	}
	l.Volumes, l.Mounts = d.Storage()
	if d.Seed {
		l.Seed = filepath.Join(dir, local.FileSeed)
	}
	if d.Agent {
		l.AgentSocket = p.cfg.Dirs.Socket(g, socketAgent)
	}
	return l, nil
}

// launch runs QEMU until it answers. QEMU's own -daemonize is of no use: it
// forks after the sandbox has forbidden that. So QEMU starts as a child in a
// session of its own and outlives this process; while this process lives, it
// collects the child.
func (p *Provider) launch(ctx context.Context, binary string, l Launch, dir, runID string, alive *os.File) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()

	// The monitor's socket listens before QEMU exists: connecting needs no
	// retries, and the answer to the first command is the sign of life.
	path := strings.TrimSuffix(l.ConsoleSocket, socketConsole) + socketMonitor
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return err
	}
	ln.SetUnlinkOnClose(false)
	monitor, err := ln.File()
	ln.Close()
	if err != nil {
		return err
	}
	defer monitor.Close()
	logFile, err := os.OpenFile(filepath.Join(dir, local.FileLog), os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		return err
	}
	defer logFile.Close()

	cmd := exec.Command(binary, l.Argv()...)
	cmd.Dir = "/"
	cmd.Stdout, cmd.Stderr = logFile, logFile
	cmd.ExtraFiles = []*os.File{monitor, alive} // monitorFD, aliveFD
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	// What this process itself inherited (a lock, the end of somebody's pipe)
	// must not stay open for as long as the machine runs. Kernels older than
	// 5.11 cannot do that at once, and it is no reason not to start.
	if err := unix.CloseRange(3, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC); err != nil {
		p.log.Debug("marking inherited files", "error", err)
	}
	p.log.Debug("starting QEMU", "argv", cmd.Args)
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("running %s: %w", binary, err)
	}
	ended := make(chan struct{})
	up := make(chan bool, 1) // whether the launch came to anything
	go func() {
		cmd.Wait() // its error is the status once more
		close(ended)
		if ws, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); ok && <-up {
			p.collected(dir, runID, unix.WaitStatus(ws))
		}
	}()

	answered := make(chan error, 1)
	answerCtx, giveUp := context.WithCancel(ctx)
	defer giveUp()
	go func() { answered <- awaitRunning(answerCtx, path) }()
	select {
	case err = <-answered:
	case <-ended:
		giveUp()
		<-answered
		err = errors.New("QEMU ended at once")
	}
	up <- err == nil
	if err == nil {
		return nil
	}
	if ctx.Err() != nil {
		err = ctx.Err()
	}
	cmd.Process.Kill()
	<-ended
	return p.launchError(binary, cmd.Args, l, dir, err)
}

// awaitRunning returns once QEMU's main loop has answered.
func awaitRunning(ctx context.Context, path string) error {
	c, err := qmp.Dial(ctx, path)
	if err != nil {
		return err
	}
	defer c.Close()
	return c.Execute(ctx, "query-status", nil, nil)
}

// launchError puts what QEMU printed and how it was called into the error.
func (p *Provider) launchError(binary string, argv []string, l Launch, dir string, err error) error {
	if errors.Is(err, context.Canceled) {
		return err
	}
	said, readErr := os.ReadFile(filepath.Join(dir, local.FileLog))
	if readErr != nil || len(bytes.TrimSpace(said)) == 0 {
		said = []byte("(it printed nothing)")
	}
	if inUse := local.VolumeInUse(l.Volumes, string(said)); inUse != nil {
		return inUse
	}
	if !errors.Is(err, context.DeadlineExceeded) { // an old QEMU ends at once
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		if v, vErr := versionOf(ctx, binary); vErr == nil && !v.AtLeast(minMajor, minMinor) {
			err = fmt.Errorf("%w: QEMU %s is too old, %d.%d is needed", providers.ErrIncapable, v, minMajor, minMinor)
		}
	}
	const tail = 2048
	if len(said) > tail {
		said = append([]byte("…"), said[len(said)-tail:]...)
	}
	return fmt.Errorf("%w\n%s\ncommand: %s", err, bytes.TrimSpace(said), quoteArgv(argv))
}

// quoteArgv renders a command so that it can be pasted into a shell.
func quoteArgv(argv []string) string {
	var b strings.Builder
	for i, a := range argv {
		if i > 0 {
			b.WriteByte(' ')
		}
		if a != "" && strings.Trim(a, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_=./,:@+%") == "" {
			b.WriteString(a)
			continue
		}
		b.WriteString("'" + strings.ReplaceAll(a, "'", `'\''`) + "'")
	}
	return b.String()
}
