// SPDX-License-Identifier: Apache-2.0

// Package qemu runs machines as QEMU processes of the calling user: no daemon,
// no root. What it knows of a machine is in the machine's directory, and whether
// the machine lives is a lock that the kernel holds for QEMU.
package qemu

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/labfile/lab/internal/dirs"
	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/providers"
	"github.com/labfile/lab/providers/qcow2"
)

// Config is what a Provider is made with. Only Dirs is needed.
type Config struct {
	Dirs      dirs.Dirs
	Binary    string       // QEMU, a name in PATH or a path; empty for qemu-system-x86_64
	ImgBinary string       // qemu-img, which other parts of lab need; empty for qemu-img
	Accel     string       // "kvm", "tcg", or "auto" (also if empty), which probes; see AccelVariable
	KVMDevice string       // empty for /dev/kvm
	Log       *slog.Logger // debug messages; nil drops them
}

// AccelVariable is the environment variable that overrules Config.Accel; the
// program that makes the Provider reads it.
const AccelVariable = "LAB_ACCEL"

// Provider runs machines with QEMU. It keeps no state besides a cache, so any
// number of Providers in any number of processes may share one Dirs.
type Provider struct {
	cfg Config
	log *slog.Logger

	patience time.Duration // with a machine that is neither up nor down

	probing sync.Mutex // one probe at a time within the process
}

var (
	_ providers.Provider    = (*Provider)(nil)
	_ providers.Cabled      = (*Provider)(nil)
	_ providers.AgentDialer = (*Provider)(nil)
	_ providers.Freezer     = (*Provider)(nil)
	_ providers.DiskReader  = (*Provider)(nil)
)

// New returns a provider. It touches nothing.
func New(cfg Config) *Provider {
	if cfg.Binary == "" {
		cfg.Binary = "qemu-system-x86_64"
	}
	if cfg.ImgBinary == "" {
		cfg.ImgBinary = "qemu-img"
	}
	if cfg.Accel == "" {
		cfg.Accel = accelAuto
	}
	if cfg.KVMDevice == "" {
		cfg.KVMDevice = "/dev/kvm"
	}
	log := cfg.Log
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return &Provider{cfg: cfg, log: log, patience: startTimeout}
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
	if err := checkSpec(spec); err != nil {
		return err
	}
	if len(spec.Mounts) > 0 {
		if err := p.canMount(ctx); err != nil {
			return err
		}
	}
	dir := p.cfg.Dirs.Generation(spec.Generation)
	if _, ok, err := readDefinition(dir, spec.Generation); ok || err != nil {
		return err
	}
	var held *os.File
	for {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return err
		}
		var err error
		held, err = lock(ctx, filepath.Join(dir, fileLock))
		if err == nil {
			break
		}
		if !gone(err) { // else a Destroy took the directory away
			return err
		}
	}
	defer held.Close()
	if _, ok, err := readDefinition(dir, spec.Generation); ok || err != nil {
		return err
	}

	def := define(spec)
	if err := qcow2.Create(filepath.Join(dir, fileOverlay), def.Disk); err != nil {
		return fmt.Errorf("making its disk: %w", err)
	}
	if len(spec.Seed) > 0 {
		if err := os.WriteFile(filepath.Join(dir, fileSeed), spec.Seed, 0o600); err != nil {
			return fmt.Errorf("writing its seed: %w", err)
		}
	}
	return writeJSON(filepath.Join(dir, fileDefinition), def)
}

// define turns a specification into what is kept of it.
func define(s providers.Spec) definition {
	i := s.Image
	d := definition{
		Version:    definitionPlain,
		Lab:        s.Lab,
		Machine:    s.Machine,
		Generation: s.Number,
		Created:    time.Now().UTC(),
		Image: image{
			Digest: i.Digest, Arch: i.Arch, Disk: i.Disk, Format: i.Format, Layers: i.Layers, Size: i.Size,
			Kernel: i.Kernel, Initrd: i.Initrd, Append: i.Append,
		},
		CPUs: s.CPUs, Memory: s.Memory, Disk: s.Disk, MAC: s.MAC,
		Seed: len(s.Seed) > 0, Agent: s.Agent, Append: s.Append,
	}
	if d.Disk == 0 {
		d.Disk = i.Size
	}
	for _, v := range s.Volumes {
		d.Volumes = append(d.Volumes, volume(v))
	}
	for _, m := range s.Mounts {
		d.Mounts = append(d.Mounts, mount(m))
	}
	if len(i.Layers) > 0 || len(d.Volumes) > 0 || len(d.Mounts) > 0 || d.Append != "" {
		d.Version = definitionStored
	}
	return d
}

// checkGeneration refuses names that could leave the directories they stand in.
func checkGeneration(g lab.Generation) error {
	switch {
	case !lab.ValidLabel(string(g.Lab)) || len(g.Lab) > lab.MaxID:
		return fmt.Errorf("%q is not the id of a lab", g.Lab)
	case !lab.ValidLabel(string(g.Machine)):
		return fmt.Errorf("%q is not the name of a machine", g.Machine)
	case g.Number < 1:
		return fmt.Errorf("%d is not the number of a generation", g.Number)
	}
	return nil
}

func checkSpec(s providers.Spec) error {
	if err := checkGeneration(s.Generation); err != nil {
		return err
	}
	i := s.Image
	switch {
	case i.Arch != "amd64":
		return fmt.Errorf("%w: images for %q are not supported, only amd64", providers.ErrIncapable, i.Arch)
	case i.Format != "qcow2" && i.Format != "raw":
		return fmt.Errorf("disk format %q is not supported, only qcow2 and raw", i.Format)
	case i.Size <= 0:
		return errors.New("the image's size is not known")
	case s.Disk != 0 && s.Disk < i.Size:
		return fmt.Errorf("disk of %s is smaller than the image's %s", s.Disk, i.Size)
	case s.CPUs < 1:
		return fmt.Errorf("%d is not a number of processors", s.CPUs)
	case s.Memory < lab.MiB || s.Memory%lab.KiB != 0:
		return fmt.Errorf("memory of %s: must be at least 1MiB and whole KiB", s.Memory)
	}
	paths := append([]string{i.Disk}, i.Layers...)
	for _, path := range []string{i.Kernel, i.Initrd} {
		if path != "" {
			paths = append(paths, path)
		}
	}
	for _, path := range paths {
		if err := checkPath(path, false); err != nil {
			return fmt.Errorf("opening the image: %w", err)
		}
	}
	if s.Append != "" && i.Kernel == "" {
		return fmt.Errorf("%q cannot go to the kernel's command line: the image boots by itself", s.Append)
	}
	if err := checkStorage(s); err != nil {
		return err
	}
	if s.MAC != "" {
		if m, err := net.ParseMAC(s.MAC); err != nil || len(m) != 6 || m.String() != s.MAC {
			return fmt.Errorf("%q is not a hardware address in lower case", s.MAC)
		}
	}
	return nil
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
	if err := checkGeneration(g); err != nil {
		return err
	}
	dir := p.cfg.Dirs.Generation(g)
	if _, err := os.Stat(dir); err == nil {
		held, err := lock(ctx, filepath.Join(dir, fileLock))
		if err != nil && !gone(err) {
			return err
		}
		if err == nil {
			defer held.Close()
			if err := p.kill(ctx, dir, "destroyed"); err != nil {
				return err
			}
			p.removeSockets(g)
			trash := filepath.Join(filepath.Dir(dir), fmt.Sprintf("%s-%d-%s", trashPrefix, g.Number, rand.Text()[:8]))
			if err := os.Rename(dir, trash); err != nil && !gone(err) {
				return err
			}
		}
	} else if !gone(err) {
		return err
	}
	for _, t := range trashOf(dir) {
		if err := os.RemoveAll(t); err != nil {
			return err
		}
	}
	// These go only when empty. What else a lab's directories hold is not ours.
	os.Remove(p.cfg.Dirs.RunLab(g.Lab))
	for d := filepath.Dir(dir); d != p.cfg.Dirs.Labs(); d = filepath.Dir(d) {
		if os.Remove(d) != nil {
			break
		}
	}
	return nil
}

// trashOf returns what interrupted Destroys left of the generation in dir.
func trashOf(dir string) []string {
	entries, err := os.ReadDir(filepath.Dir(dir))
	if err != nil {
		return nil
	}
	var found []string
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), trashPrefix+"-"+filepath.Base(dir)+"-") {
			found = append(found, filepath.Join(filepath.Dir(dir), e.Name()))
		}
	}
	return found
}

// removeSockets removes what a QEMU that was killed left behind. The caller
// holds the generation's lock and QEMU is dead.
func (p *Provider) removeSockets(g lab.Generation) {
	for _, kind := range []string{socketMonitor, socketNIC, socketAgent, socketConsole} {
		os.Remove(p.cfg.Dirs.Socket(g, kind))
	}
}
