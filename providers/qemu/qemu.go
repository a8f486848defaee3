// SPDX-License-Identifier: Apache-2.0

// Package qemu runs machines as QEMU processes of the calling user: no daemon,
// no root. What it knows of a machine is in the machine's directory, and whether
// the machine lives is a lock that the kernel holds for QEMU.
package qemu

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/labfile/lab/internal/dirs"
	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/providers"
	"github.com/labfile/lab/providers/accel"
	"github.com/labfile/lab/providers/local"
)

// Config is what a Provider is made with. Only Dirs is needed.
type Config struct {
	Dirs      dirs.Dirs
	Binary    string       // QEMU, a name in PATH or a path; empty for qemu-system-x86_64
	ImgBinary string       // qemu-img, which other parts of lab need; empty for qemu-img
	Accel     string       // "kvm", "tcg", or "auto" (also if empty), which probes
	KVMDevice string       // empty for /dev/kvm
	Log       *slog.Logger // debug messages; nil drops them
}

// Provider runs machines with QEMU. It keeps no state besides a cache, so any
// number of Providers in any number of processes may share one Dirs.
type Provider struct {
	cfg Config
	log *slog.Logger

	patience time.Duration // with a machine that is neither up nor down

	prober *accel.Prober
}

var (
	_ providers.Provider    = (*Provider)(nil)
	_ providers.Cabled      = (*Provider)(nil)
	_ providers.AgentDialer = (*Provider)(nil)
	_ providers.Freezer     = (*Provider)(nil)
	_ providers.DiskReader  = (*Provider)(nil)

	_ providers.SpecChecker   = (*Provider)(nil)
	_ providers.MemoryCounter = (*Provider)(nil)
	_ providers.RoomCounter   = (*Provider)(nil)
)

// New returns a provider. It touches nothing.
func New(cfg Config) *Provider {
	if cfg.Binary == "" {
		cfg.Binary = "qemu-system-x86_64"
	}
	if cfg.ImgBinary == "" {
		cfg.ImgBinary = "qemu-img"
	}
	log := cfg.Log
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return &Provider{
		cfg: cfg, log: log, patience: startTimeout,
		prober: &accel.Prober{Wanted: cfg.Accel, Device: cfg.KVMDevice, Cache: cfg.Dirs.Cache, Log: log},
	}
}

// Name returns "qemu".
func (p *Provider) Name() string { return "qemu" }

// binary finds QEMU.
func (p *Provider) binary() (string, error) {
	path, err := exec.LookPath(p.cfg.Binary)
	if err != nil {
		return "", fmt.Errorf("%w: %s not found (%s)", providers.ErrIncapable, p.cfg.Binary, installCure())
	}
	return filepath.Abs(path)
}

// Create makes the generation's directory: overlay, seed and, last, definition.
func (p *Provider) Create(ctx context.Context, spec providers.Spec) error {
	if err := p.create(ctx, spec); err != nil {
		return fmt.Errorf("creating machine %q: %w", spec.Generation, err)
	}
	return nil
}

func (p *Provider) create(ctx context.Context, spec providers.Spec) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := p.check(ctx, spec); err != nil {
		return err
	}
	dir := p.cfg.Dirs.Generation(spec.Generation)
	defined := func() (bool, error) {
		_, ok, err := local.ReadDefinition(dir, spec.Generation)
		return ok, err
	}
	return local.Make(ctx, dir, spec, defined, func(def local.Definition) error {
		return local.WriteJSON(filepath.Join(dir, local.FileDefinition), def)
	})
}

// CheckSpec says what Create would refuse, and whether there is a QEMU to start.
func (p *Provider) CheckSpec(ctx context.Context, spec providers.Spec) error {
	if _, err := p.binary(); err != nil {
		return err
	}
	return p.check(ctx, spec)
}

func (p *Provider) check(ctx context.Context, spec providers.Spec) error {
	if err := local.CheckSpec(spec, local.CheckFile); err != nil {
		return err
	}
	if spec.Network != lab.NetworkSwitch {
		return fmt.Errorf("%w: QEMU alone has no networks", providers.ErrIncapable)
	}
	if len(spec.Mounts) > 0 {
		return p.canMount(ctx)
	}
	return nil
}

// HostMemory returns the memory of this host.
func (p *Provider) HostMemory(context.Context) (providers.HostMemory, error) {
	return local.HostMemory()
}

// HostRoom returns what is free where the labs are kept.
func (p *Provider) HostRoom(context.Context) (providers.HostRoom, error) {
	return local.HostRoom(p.cfg.Dirs.Labs())
}

// Destroy kills QEMU, moves the directory out of the way in one step and then
// removes it, so that an interrupted Destroy leaves only what the next one removes.
func (p *Provider) Destroy(ctx context.Context, g lab.Generation) error {
	if err := p.destroy(ctx, g); err != nil {
		return fmt.Errorf("destroying machine %q: %w", g, err)
	}
	return nil
}

func (p *Provider) destroy(ctx context.Context, g lab.Generation) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := local.CheckGeneration(g); err != nil {
		return err
	}
	dir := p.cfg.Dirs.Generation(g)
	if _, err := os.Stat(dir); err == nil {
		held, err := local.Lock(ctx, filepath.Join(dir, local.FileLock))
		if err != nil && !local.Gone(err) {
			return err
		}
		if err == nil {
			defer held.Close()
			if err := p.kill(ctx, dir, "destroyed"); err != nil {
				return err
			}
			p.removeSockets(g)
			if err := local.Discard(dir); err != nil {
				return err
			}
		}
	} else if !local.Gone(err) {
		return err
	}
	return local.Sweep(dir, p.cfg.Dirs.Labs(), p.cfg.Dirs.RunLab(g.Lab))
}

// removeSockets removes what a QEMU that was killed left behind. The caller
// holds the generation's lock and QEMU is dead.
func (p *Provider) removeSockets(g lab.Generation) {
	for _, path := range p.sockets(g) {
		os.Remove(path)
	}
}

// sockets are the paths of all sockets that a generation may have.
func (p *Provider) sockets(g lab.Generation) []string {
	var paths []string
	for _, kind := range []string{socketMonitor, socketNIC, socketAgent, socketConsole} {
		paths = append(paths, p.cfg.Dirs.Socket(g, kind))
	}
	return paths
}
