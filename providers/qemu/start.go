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
	"github.com/labfile/lab/providers/qemu/qmp"
)

// startTimeout bounds the time from QEMU's start to its first answer, beside
// ctx. On a busy host with a cold page cache seconds are normal.
const startTimeout = 60 * time.Second

// Start launches QEMU and returns when its main loop answers: by then every
// device is made and every socket listens.
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
	if err := checkGeneration(g); err != nil {
		return err
	}
	dir := p.cfg.Dirs.Generation(g)
	def, ok, err := readDefinition(dir, g)
	if err != nil {
		return err
	}
	if !ok {
		return providers.ErrNotFound
	}
	if pid, err := lockHolder(filepath.Join(dir, filePID)); err != nil || pid != 0 {
		if is, _ := paused(dir); err == nil && is {
			return command(ctx, p.cfg.Dirs.Socket(g, socketMonitor), "cont")
		}
		return err
	}
	binary, err := p.binary()
	if err != nil {
		return err
	}
	accel, err := p.accelFor(ctx, binary, def.Image)
	if err != nil {
		return err
	}

	held, err := lock(ctx, filepath.Join(dir, fileLock))
	if gone(err) {
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
	if err := freshRecords(dir); err != nil {
		return err
	}
	r := run{ID: rand.Text(), Started: time.Now().UTC(), Accel: accel.Name, Boot: bootID()}
	if err := writeJSON(filepath.Join(dir, fileRun), r); err != nil {
		return err
	}
	l, err := p.launchOf(def, dir, accel.Name)
	if err == nil {
		err = p.launch(ctx, binary, l, dir, r.ID, alive)
	}
	if err != nil {
		// It never ran, so how it ended before is still how it last ended.
		os.Remove(filepath.Join(dir, fileRun))
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
		f, ok, err := tryLock(filepath.Join(dir, fileAlive))
		if err != nil || ok {
			return f, false, err
		}
		pid, err := lockHolder(filepath.Join(dir, filePID))
		if err != nil || pid != 0 {
			return nil, pid != 0, err
		}
		if time.Now().After(until) {
			return nil, false, stuck(dir, p.patience)
		}
		if err := pause(ctx, lockRetry); err != nil {
			return nil, false, err
		}
	}
}

// freshRecords empties what a run leaves behind: logs and events are of one run.
func freshRecords(dir string) error {
	console := filepath.Join(dir, fileConsole)
	if fi, err := os.Stat(console); err == nil && fi.Size() > 0 {
		if err := os.Rename(console, filepath.Join(dir, fileConsoleOld)); err != nil {
			return err
		}
	}
	// New files instead of truncated ones: a reader of the old keeps it whole.
	for name, content := range map[string]string{
		fileConsole:         "",
		fileLog:             "",
		fileEvents + ".in":  `{"execute":"qmp_capabilities"}` + "\n",
		fileEvents + ".out": "",
	} {
		path := filepath.Join(dir, name)
		if err := os.Remove(path); err != nil && !gone(err) {
			return err
		}
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			return err
		}
	}
	return nil
}

func (p *Provider) launchOf(d definition, dir, accel string) (Launch, error) {
	own, err := overlays(dir)
	if err != nil {
		return Launch{}, err
	}
	g := d.generation()
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
		Append:        d.Image.Append,
		MAC:           d.MAC,
		NICSocket:     p.cfg.Dirs.Socket(g, socketNIC),
		ConsoleSocket: p.cfg.Dirs.Socket(g, socketConsole),
		ConsoleLog:    filepath.Join(dir, fileConsole),
		PIDFile:       filepath.Join(dir, filePID),
		Events:        filepath.Join(dir, fileEvents),
	}
	for _, n := range own {
		l.Overlays = append(l.Overlays, overlay(dir, n))
	}
	if d.Append != "" {
		l.Append = strings.TrimSpace(l.Append + " " + d.Append)
	}
	for _, v := range d.Volumes {
		l.Volumes = append(l.Volumes, providers.Volume(v))
	}
	for _, m := range d.Mounts {
		l.Mounts = append(l.Mounts, providers.Mount(m))
	}
	if d.Seed {
		l.Seed = filepath.Join(dir, fileSeed)
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
	logFile, err := os.OpenFile(filepath.Join(dir, fileLog), os.O_WRONLY|os.O_APPEND, 0)
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
	said, readErr := os.ReadFile(filepath.Join(dir, fileLog))
	if readErr != nil || len(bytes.TrimSpace(said)) == 0 {
		said = []byte("(it printed nothing)")
	}
	if inUse := volumeInUse(l.Volumes, string(said)); inUse != nil {
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
