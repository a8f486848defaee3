// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/providers"
	"github.com/labfile/lab/providers/qemu/qmp"
)

// How long each step of a shutdown may take before the next one.
const (
	commandTimeout = 2 * time.Second // a monitor command
	quitTimeout    = 3 * time.Second // QEMU's own exit, which writes out its disk
	buttonInterval = 3 * time.Second // between two presses of the power button
)

// Stop presses the power button, then tells QEMU to quit, then kills it.
func (p *Provider) Stop(ctx context.Context, g lab.Generation, grace time.Duration) error {
	if err := p.stop(ctx, g, grace); err != nil {
		return fmt.Errorf("stopping machine %q: %w", g, err)
	}
	return nil
}

func (p *Provider) stop(ctx context.Context, g lab.Generation, grace time.Duration) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := checkGeneration(g); err != nil {
		return err
	}
	dir := p.cfg.Dirs.Generation(g)
	proc, err := p.find(ctx, dir)
	if err != nil {
		return err
	}
	if proc != nil {
		defer proc.close()
		if err := p.shutDown(ctx, g, dir, proc, grace); err != nil {
			return err
		}
		p.settle(dir)
	}
	// The sockets of a killed QEMU stay behind. Whoever holds the lock for long
	// starts or destroys the machine, and removes them as well.
	limited, cancel := context.WithTimeout(ctx, commandTimeout)
	defer cancel()
	held, err := lock(limited, filepath.Join(dir, fileLock))
	if errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil {
		return nil
	}
	if err != nil {
		return ignoreGone(err)
	}
	defer held.Close()
	if pid, err := lockHolder(filepath.Join(dir, filePID)); err == nil && pid == 0 {
		p.removeSockets(g)
		os.Remove(p.cfg.Dirs.RunLab(g.Lab))
	}
	return nil
}

func ignoreGone(err error) error {
	if gone(err) {
		return nil
	}
	return err
}

// shutDown ends proc. It returns nil once the process has ended.
func (p *Provider) shutDown(ctx context.Context, g lab.Generation, dir string, proc *process, grace time.Duration) error {
	monitor := p.cfg.Dirs.Socket(g, socketMonitor)
	until := time.Now().Add(grace)
	for left := grace; left > 0; left = time.Until(until) {
		// The button is pressed again and again: a guest that is still booting
		// does not notice the first time.
		if err := command(ctx, monitor, "system_powerdown"); err != nil {
			p.log.Debug("power button", "machine", g.String(), "error", err)
			break // QEMU does not answer, so the guest cannot have heard
		}
		if ended, err := proc.waitFor(ctx, min(left, buttonInterval)); ended || err != nil {
			return err
		}
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	p.intend(dir, "stopped by force")
	if err := command(ctx, monitor, "quit"); err != nil {
		p.log.Debug("quit", "machine", g.String(), "error", err)
	} else if ended, err := proc.waitFor(ctx, quitTimeout); ended || err != nil {
		return err
	}
	if err := proc.signal(unix.SIGKILL); err != nil {
		return err
	}
	return proc.wait(ctx)
}

// command runs one monitor command on a connection of its own.
func command(ctx context.Context, monitor, name string) error {
	ctx, cancel := context.WithTimeout(ctx, commandTimeout)
	defer cancel()
	c, err := qmp.Dial(ctx, monitor)
	if err != nil {
		return err
	}
	defer c.Close()
	return c.Execute(ctx, name, nil, nil)
}

// find returns the generation's QEMU, nil if there is none. A QEMU that has just
// been started has no pid file yet but is alive: it is waited for, as long as a
// start may take.
func (p *Provider) find(ctx context.Context, dir string) (*process, error) {
	until := time.Now().Add(p.patience)
	for {
		proc, err := findProcess(filepath.Join(dir, filePID))
		if err != nil || proc != nil {
			return proc, err
		}
		if _, err := os.Stat(filepath.Join(dir, fileAlive)); err != nil {
			return nil, ignoreGone(err)
		}
		alive, free, err := tryLock(filepath.Join(dir, fileAlive))
		if err != nil {
			return nil, ignoreGone(err)
		}
		if free {
			alive.Close()
			return nil, nil
		}
		if time.Now().After(until) {
			return nil, stuck(dir, p.patience)
		}
		if err := pause(ctx, lockRetry); err != nil {
			return nil, err
		}
	}
}

// stuck describes a machine that is neither up nor down: a process has the lock
// that QEMU inherits, but no QEMU has written its pid.
func stuck(dir string, waited time.Duration) error {
	path := filepath.Join(dir, fileAlive)
	who := "an unknown process"
	if pids := openers(path); len(pids) > 0 {
		who = fmt.Sprintf("process %s (end it if it is a QEMU that hangs)", strings.Join(pids, ", "))
	}
	return fmt.Errorf("the machine has been neither up nor down for %s: %s is held by %s", waited, path, who)
}

// openers lists the processes that have the file open, as far as /proc lets this
// one see.
func openers(path string) []string {
	own, err := os.Stat(path)
	if err != nil {
		return nil
	}
	links, err := filepath.Glob("/proc/[0-9]*/fd/*")
	if err != nil {
		return nil
	}
	var pids []string
	for _, link := range links {
		pid := strings.Split(link, "/")[2]
		// By identity, for a path with symbolic links in it reads differently there.
		opened, err := os.Stat(link)
		if err == nil && os.SameFile(own, opened) && !slices.Contains(pids, pid) {
			pids = append(pids, pid)
		}
	}
	return pids
}

// kill ends the generation's QEMU by SIGKILL, if there is one.
func (p *Provider) kill(ctx context.Context, dir, why string) error {
	for {
		proc, err := p.find(ctx, dir)
		if err != nil || proc == nil {
			return err
		}
		p.intend(dir, why)
		err = proc.signal(unix.SIGKILL)
		if err == nil {
			err = proc.wait(ctx)
		}
		proc.close()
		if err != nil {
			return err
		}
	}
}

// intend records that the present run is about to be ended by lab, for a process
// that is killed cannot say so itself.
func (p *Provider) intend(dir, why string) {
	var r run
	if ok, err := readJSON(filepath.Join(dir, fileRun), &r); err != nil || !ok {
		return
	}
	rec := exitRecord{Run: r.ID, Reason: providers.ExitHost, Detail: why, At: time.Now().UTC()}
	if err := writeJSON(filepath.Join(dir, fileExit), rec); err != nil {
		p.log.Debug("recording an exit", "error", err)
	}
}
