// SPDX-License-Identifier: Apache-2.0

package local

import (
	"fmt"
	"net/netip"
	"path/filepath"
	"strings"
	"time"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/providers"
)

// The versions of a definition. A program reads all up to the newest that it
// knows; a Definition has the oldest that tells all of it, so that older programs
// go on reading what they can understand.
const (
	definitionPlain  = 1
	definitionStored = 2 // with layers, volumes or mounts
	definitionJoined = 3 // in a network
)

// Definition is what machine.json holds.
type Definition struct {
	Version int       `json:"version"`
	Lab     lab.ID    `json:"lab"`
	Machine lab.Name  `json:"machine"`
	Number  int       `json:"generation"`
	Created time.Time `json:"created"`
	Image   Image     `json:"image"`
	CPUs    int       `json:"cpus"`
	Memory  lab.Bytes `json:"memory"`
	Disk    lab.Bytes `json:"disk"`
	MAC     string    `json:"mac,omitempty"`
	Seed    bool      `json:"seed,omitempty"`
	Agent   bool      `json:"agent,omitempty"`
	Volumes []Volume  `json:"volumes,omitempty"`
	Mounts  []Mount   `json:"mounts,omitempty"`
	Append  string    `json:"append,omitempty"`

	Network lab.NetworkKind `json:"network,omitempty"` // that it is in besides the lab's switch
	Direct  netip.Addr      `json:"direct,omitzero"`   // its address in that
}

// Volume is a providers.Volume as it is kept.
type Volume struct {
	Name     string `json:"name"`
	Path     string `json:"path"`
	ReadOnly bool   `json:"readonly,omitempty"`

	Layers []string `json:"layers,omitempty"`
}

// Mount is a providers.Mount as it is kept.
type Mount struct {
	Tag      string `json:"tag"`
	Path     string `json:"path"`
	Writable bool   `json:"writable,omitempty"`
}

// Image is a providers.Image as it is kept.
type Image struct {
	Digest string    `json:"digest"`
	Arch   string    `json:"arch"`
	Disk   string    `json:"disk"`
	Format string    `json:"format"`
	Layers []string  `json:"layers,omitempty"`
	Size   lab.Bytes `json:"size"`
	Kernel string    `json:"kernel,omitempty"`
	Initrd string    `json:"initrd,omitempty"`
	Append string    `json:"append,omitempty"`
}

// Define turns a specification into what is kept of it.
func Define(s providers.Spec) Definition {
	i := s.Image
	d := Definition{
		Version: definitionPlain,
		Lab:     s.Lab,
		Machine: s.Machine,
		Number:  s.Number,
		Created: time.Now().UTC(),
		Image: Image{
			Digest: i.Digest, Arch: i.Arch, Disk: i.Disk, Format: i.Format, Layers: i.Layers, Size: i.Size,
			Kernel: i.Kernel, Initrd: i.Initrd, Append: i.Append,
		},
		CPUs: s.CPUs, Memory: s.Memory, Disk: s.Disk, MAC: s.MAC,
		Seed: len(s.Seed) > 0, Agent: s.Agent, Append: s.Append, Network: s.Network, Direct: s.Direct,
	}
	if d.Disk == 0 {
		d.Disk = i.Size
	}
	d.SetVolumes(s.Volumes)
	for _, m := range s.Mounts {
		d.Mounts = append(d.Mounts, Mount(m))
	}
	if len(i.Layers) > 0 || len(d.Mounts) > 0 || d.Append != "" {
		d.Version = max(d.Version, definitionStored)
	}
	if d.Network != lab.NetworkSwitch {
		d.Version = definitionJoined
	}
	return d
}

// ReadDefinition returns a generation's definition; ok is false if it was never
// finished.
func ReadDefinition(dir string, g lab.Generation) (d Definition, ok bool, err error) {
	ok, err = ReadJSON(filepath.Join(dir, FileDefinition), &d)
	if err != nil || !ok {
		return d, false, err
	}
	if err := d.Check(g); err != nil {
		return d, false, fmt.Errorf("%s %w", filepath.Join(dir, FileDefinition), err)
	}
	return d, true, nil
}

// Check refuses a definition that this program does not know or that is not of g.
// The error's text is about a subject that the caller names.
func (d *Definition) Check(g lab.Generation) error {
	if d.Version < definitionPlain || d.Version > definitionJoined {
		return fmt.Errorf("has version %d, this lab knows version %d", d.Version, definitionJoined)
	}
	if d.Generation() != g {
		return fmt.Errorf("is of %s of lab %s", d.Generation(), d.Lab)
	}
	return nil
}

// SetVolumes replaces the volumes.
func (d *Definition) SetVolumes(volumes []providers.Volume) {
	d.Volumes = nil
	for _, v := range volumes {
		d.Volumes = append(d.Volumes, Volume(v))
	}
	if len(d.Volumes) > 0 {
		d.Version = max(d.Version, definitionStored)
	}
}

// Storage returns the volumes and mounts.
func (d *Definition) Storage() (volumes []providers.Volume, mounts []providers.Mount) {
	for _, v := range d.Volumes {
		volumes = append(volumes, providers.Volume(v))
	}
	for _, m := range d.Mounts {
		mounts = append(mounts, providers.Mount(m))
	}
	return volumes, mounts
}

// CommandLine is what the kernel is told.
func (d *Definition) CommandLine() string {
	return strings.TrimSpace(d.Image.Append + " " + d.Append)
}

// Generation is whose definition it is.
func (d *Definition) Generation() lab.Generation {
	return lab.Generation{Lab: d.Lab, Machine: d.Machine, Number: d.Number}
}
