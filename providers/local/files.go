// SPDX-License-Identifier: Apache-2.0

// Package local keeps what a provider of this host knows of generations in their
// directories: definitions, overlays, runs and exits, logs and locks.
package local

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/labfile/lab/internal/fsutil"
)

// The files of a generation's directory.
const (
	FileDefinition = "machine.json" // what the generation is; written last, so a directory without it is half made
	FileOverlay    = "disk.qcow2"   // what the machine wrote; disk.1.qcow2 and so on lie above it
	FileChain      = "disk.json"    // which of the overlays are frozen
	FileReading    = "reading"      // held by whoever reads the disk or changes which overlays there are
	FileSeed       = "seed.img"     // its NoCloud volume, if it has one
	FileConsole    = "console.log"  // what the guest printed since its last start
	FileConsoleOld = "console.log.1"
	FileLog        = "qemu.log"   // what QEMU printed since its last start
	FilePID        = "qemu.pid"   // locked by QEMU while it lives
	FileLock       = "lock"       // held by whoever changes the generation
	FileAlive      = "alive"      // held by QEMU from before its first instruction
	FileBusy       = "console"    // held by the console's user
	FileEvents     = "events"     // prefix of QEMU's event record
	FileRun        = "run.json"   // the present or last run
	FileExit       = "exit.json"  // how the last run ended, as far as somebody saw or caused it
	TrashPrefix    = ".destroyed" // a directory being removed: .destroyed-<number>-<random>
)

// ReadJSON decodes a file into v; ok is false if there is none.
func ReadJSON(path string, v any) (ok bool, err error) {
	b, err := os.ReadFile(path)
	if Gone(err) {
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

// Gone reports whether err says that a file, or a directory above it, is absent.
func Gone(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR)
}

// WriteJSON replaces a file as a whole: readers see the old or the new one, also
// after the host lost power.
func WriteJSON(path string, v any) error {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	return fsutil.WriteFile(path, append(b, '\n'), 0o600)
}

// IgnoreGone drops the error if it says that a file is absent.
func IgnoreGone(err error) error {
	if Gone(err) {
		return nil
	}
	return err
}

// BootID names the host's present boot; empty if unknown.
func BootID() string {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}
