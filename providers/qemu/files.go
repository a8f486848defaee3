// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/providers"
)

// The files of a generation's directory.
const (
	fileDefinition = "machine.json" // what the generation is; written last, so a directory without it is half made
	fileOverlay    = "disk.qcow2"   // what the machine wrote; disk.1.qcow2 and so on lie above it
	fileChain      = "disk.json"    // which of the overlays are frozen
	fileReading    = "reading"      // held by whoever reads the disk or changes which overlays there are
	fileSeed       = "seed.img"     // its NoCloud volume, if it has one
	fileConsole    = "console.log"  // what the guest printed since its last start
	fileConsoleOld = "console.log.1"
	fileLog        = "qemu.log"   // what QEMU printed since its last start
	filePID        = "qemu.pid"   // locked by QEMU while it lives
	fileLock       = "lock"       // held by whoever changes the generation
	fileAlive      = "alive"      // held by QEMU from before its first instruction
	fileBusy       = "console"    // held by the console's user
	fileEvents     = "events"     // prefix of QEMU's event record
	fileRun        = "run.json"   // the present or last run
	fileExit       = "exit.json"  // how the last run ended, as far as somebody saw or caused it
	trashPrefix    = ".destroyed" // a directory being removed: .destroyed-<number>-<random>
)

// The kinds of sockets, as dirs.Socket names them.
const (
	socketMonitor = "qmp"
	socketNIC     = "nic"
	socketAgent   = "agt"
	socketConsole = "con"
)

// The versions of a definition. A program reads all up to the newest that it
// knows; a definition has the oldest that tells all of it, so that older programs
// go on reading what they can understand.
const (
	definitionPlain  = 1
	definitionStored = 2 // with layers, volumes or mounts
)

// definition is what machine.json holds.
type definition struct {
	Version    int       `json:"version"`
	Lab        lab.ID    `json:"lab"`
	Machine    lab.Name  `json:"machine"`
	Generation int       `json:"generation"`
	Created    time.Time `json:"created"`
	Image      image     `json:"image"`
	CPUs       int       `json:"cpus"`
	Memory     lab.Bytes `json:"memory"`
	Disk       lab.Bytes `json:"disk"`
	MAC        string    `json:"mac,omitempty"`
	Seed       bool      `json:"seed,omitempty"`
	Agent      bool      `json:"agent,omitempty"`
	Volumes    []volume  `json:"volumes,omitempty"`
	Mounts     []mount   `json:"mounts,omitempty"`
	Append     string    `json:"append,omitempty"`
}

type volume struct {
	Name     string `json:"name"`
	Path     string `json:"path"`
	ReadOnly bool   `json:"readonly,omitempty"`

	Layers []string `json:"layers,omitempty"`
}

type mount struct {
	Tag      string `json:"tag"`
	Path     string `json:"path"`
	Writable bool   `json:"writable,omitempty"`
}

type image struct {
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

// run is what run.json holds: written before QEMU starts, removed if it fails to.
type run struct {
	ID      string    `json:"id"` // random; tells one run from the next
	Started time.Time `json:"started"`
	Accel   string    `json:"accel"`
	Boot    string    `json:"boot"` // the host's boot id
}

// exitRecord is what exit.json holds.
type exitRecord struct {
	Run    string               `json:"run"`
	Reason providers.ExitReason `json:"reason"`
	Detail string               `json:"detail,omitempty"`
	At     time.Time            `json:"at,omitzero"`
}

func (e exitRecord) exit() providers.Exit {
	return providers.Exit{Reason: e.Reason, Detail: e.Detail, At: e.At}
}

// readJSON decodes a file into v; ok is false if there is none.
func readJSON(path string, v any) (ok bool, err error) {
	b, err := os.ReadFile(path)
	if gone(err) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	if err := json.Unmarshal(b, v); err != nil {
		return false, fmt.Errorf("reading %s: %w", path, err)
	}
	return true, nil
}

// gone reports whether err says that a file, or a directory above it, is absent.
func gone(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR)
}

// writeJSON replaces a file as a whole: readers see the old or the new one, also
// after the host lost power.
func writeJSON(path string, v any) error {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	dir := filepath.Dir(path)
	f, err := os.CreateTemp(dir, "."+filepath.Base(path)+"-*") // mode 0600
	if err != nil {
		return err
	}
	_, err = f.Write(append(b, '\n'))
	if err == nil {
		err = f.Sync()
	}
	if e := f.Close(); err == nil {
		err = e
	}
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		os.Remove(f.Name())
		return err
	}
	return syncDir(dir)
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// readDefinition returns a generation's definition; ok is false if it was never
// finished.
func readDefinition(dir string, g lab.Generation) (d definition, ok bool, err error) {
	ok, err = readJSON(filepath.Join(dir, fileDefinition), &d)
	if err != nil || !ok {
		return d, false, err
	}
	if d.Version < definitionPlain || d.Version > definitionStored {
		return d, false, fmt.Errorf("%s has version %d, this lab knows version %d",
			filepath.Join(dir, fileDefinition), d.Version, definitionStored)
	}
	if d.generation() != g {
		return d, false, fmt.Errorf("%s is of %s of lab %s", filepath.Join(dir, fileDefinition), d.generation(), d.Lab)
	}
	return d, true, nil
}

func (d definition) generation() lab.Generation {
	return lab.Generation{Lab: d.Lab, Machine: d.Machine, Number: d.Generation}
}

// bootID names the host's present boot; empty if unknown.
func bootID() string {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}
