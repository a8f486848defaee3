// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/providers"
	"github.com/labfile/lab/providers/local"
	"github.com/labfile/lab/providers/qmp"
)

// How long each step of a shutdown may take before the next one.
const (
	commandTimeout = 2 * time.Second // a monitor command
	quitTimeout    = 3 * time.Second // QEMU's own exit, which writes out its disk
	buttonInterval = 3 * time.Second // between two presses of the power button
	endTime        = time.Second     // the end of a QEMU that no longer answers
)

// Stop presses the power button, then tells QEMU to quit, then kills it. ErrUnasked if
// QEMU cannot be told about the button, or the machine is paused.
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
	if err := local.CheckGeneration(g); err != nil {
		return err
	}
	dir := p.cfg.Dirs.Generation(g)
	proc, err := p.find(ctx, dir)
	if err != nil {
		return err
	}
	if proc != nil {
		defer proc.Close()
		if err := p.shutDown(ctx, g, dir, proc, grace); err != nil {
			return err
		}
		p.settle(dir)
	}
	// The sockets of a killed QEMU stay behind. Whoever holds the lock for long
	// starts or destroys the machine, and removes them as well.
	limited, cancel := context.WithTimeout(ctx, commandTimeout)
	defer cancel()
	held, err := local.Lock(limited, filepath.Join(dir, local.FileLock))
	if errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil {
		return nil
	}
	if err != nil {
		return local.IgnoreGone(err)
	}
	defer held.Close()
	if pid, err := lockHolder(filepath.Join(dir, local.FilePID)); err == nil && pid == 0 {
		p.removeSockets(g)
		os.Remove(p.cfg.Dirs.RunLab(g.Lab))
	}
	return nil
}

// shutDown ends proc. It returns nil once the process has ended.
func (p *Provider) shutDown(ctx context.Context, g lab.Generation, dir string, proc *local.Process, grace time.Duration) error {
	if is, why := paused(dir, proc.PID); is && grace > 0 {
		// QEMU would take the request, and the guest would never see it.
		if why != "" {
			why = ": " + why
		}
		return fmt.Errorf("%w: it is paused%s", providers.ErrUnasked, why)
	}
	monitor := p.cfg.Dirs.Socket(g, socketMonitor)
	until := time.Now().Add(grace)
	asked := false
	for left := grace; left > 0; left = time.Until(until) {
		// The button is pressed again and again: a guest that is still booting
		// does not notice the first time.
		wait := buttonInterval
		err := press(ctx, monitor, dir)
		if err != nil {
			p.log.Debug("power button", "machine", g.String(), "error", err)
			wait = endTime // it may be about to end
		}
		if ended, err := proc.WaitFor(ctx, min(left, wait)); ended || err != nil {
			return err
		}
		if asked = asked || err == nil; !asked {
			return fmt.Errorf("%w: %w", providers.ErrUnasked, err)
		}
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	p.note(local.Intend(dir, providers.DetailForced))
	if err := command(ctx, monitor, "quit"); err != nil {
		p.log.Debug("quit", "machine", g.String(), "error", err)
	} else if ended, err := proc.WaitFor(ctx, quitTimeout); ended || err != nil {
		return err
	}
	if err := proc.Signal(unix.SIGKILL); err != nil {
		return err
	}
	return proc.Wait(ctx)
}

// press presses the power button, by way of the machine's directory if the monitor's
// socket is gone.
func press(ctx context.Context, monitor, dir string) error {
	err := command(ctx, monitor, "system_powerdown")
	if err == nil || !local.Gone(err) {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, commandTimeout)
	defer cancel()
	if perr := local.Press(ctx, dir); perr != nil {
		return fmt.Errorf("%w; %w", err, perr)
	}
	return nil
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
func (p *Provider) find(ctx context.Context, dir string) (*local.Process, error) {
	until := time.Now().Add(p.patience)
	for {
		proc, err := findProcess(filepath.Join(dir, local.FilePID))
		if err != nil || proc != nil {
			return proc, err
		}
		if _, err := os.Stat(filepath.Join(dir, local.FileAlive)); err != nil {
			return nil, local.IgnoreGone(err)
		}
		alive, free, err := local.TryLock(filepath.Join(dir, local.FileAlive))
		if err != nil {
			return nil, local.IgnoreGone(err)
		}
		if free {
			alive.Close()
			return nil, nil
		}
		if time.Now().After(until) {
			return nil, stuck(dir, p.patience)
		}
		if err := local.Pause(ctx, local.LockRetry); err != nil {
			return nil, err
		}
	}
}

// stuck describes a machine that is neither up nor down: a process has the lock
// that QEMU inherits, but no QEMU has written its pid.
func stuck(dir string, waited time.Duration) error {
	path := filepath.Join(dir, local.FileAlive)
	who := "an unknown process"
	if pids := local.Openers(path); len(pids) > 0 {
		who = fmt.Sprintf("process %s (end it if it is a QEMU that hangs)", strings.Join(pids, ", "))
	}
	return fmt.Errorf("the machine has been neither up nor down for %s: %s is held by %s", waited, path, who)
}

// kill ends the generation's QEMU by SIGKILL, if there is one.
func (p *Provider) kill(ctx context.Context, dir, why string) error {
	for {
		proc, err := p.find(ctx, dir)
		if err != nil || proc == nil {
			return err
		}
		p.note(local.Intend(dir, why))
		err = proc.Signal(unix.SIGKILL)
		if err == nil {
			err = proc.Wait(ctx)
		}
		proc.Close()
		if err != nil {
			return err
		}
	}
}
