// SPDX-License-Identifier: Apache-2.0

//go:build linux

package agent

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/labfile/lab/internal/guest/agentapi"
)

// diskTime is how long the disk of a volume may take to show up: the driver is there
// before the root file system is, so that it is a matter of moments.
const diskTime = 10 * time.Second

// MountVolumes mounts the volumes that the kernel's command line names, and goes on
// if it can't mount one. What is mounted already stays.
func (k Kernel) MountVolumes() error {
	line, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return err
	}
	all, err := agentapi.VolumesOf(string(line))
	errs := []error{err}
	for _, v := range all {
		if err := k.mountVolume(v); err != nil {
			errs = append(errs, fmt.Errorf("mounting volume %s at %s: %w", v.Serial, v.Path, err))
		}
	}
	return errors.Join(errs...)
}

func (Kernel) mountVolume(v agentapi.Volume) error {
	disk, err := diskOf(v.Serial)
	if err != nil {
		return err
	}
	mounts, err := os.ReadFile("/proc/mounts")
	if err != nil {
		return err
	}
	if strings.Contains("\n"+string(mounts), "\n"+disk+" ") {
		return nil
	}
	if err := os.MkdirAll(v.Path, 0o755); err != nil {
		return err
	}
	if v.ReadOnly {
		err := unix.Mount(disk, v.Path, "ext4", unix.MS_RDONLY, "")
		if err != nil { // a snapshot of a volume in use has a journal to replay
			err = unix.Mount(disk, v.Path, "ext4", unix.MS_RDONLY, "noload")
		}
		return err
	}
	// It is filled where nobody sees it, and what is to fill it lies below v.Path.
	stage := filepath.Join("/run/lab/volumes", v.Serial)
	if err := os.MkdirAll(stage, 0o700); err != nil {
		return err
	}
	defer os.Remove(stage)
	if err := unix.Mount(disk, stage, "ext4", 0, ""); err != nil {
		return err
	}
	err = fillVolume(stage, v.Path)
	if err := errors.Join(err, unix.Unmount(stage, 0)); err != nil {
		return err
	}
	return unix.Mount(disk, v.Path, "ext4", 0, "")
}

// diskOf waits for the virtio disk with the serial number.
func diskOf(serial string) (string, error) {
	for deadline := time.Now().Add(diskTime); ; {
		files, err := filepath.Glob("/sys/block/*/serial")
		if err != nil {
			return "", err
		}
		for _, file := range files {
			if b, err := os.ReadFile(file); err == nil && strings.TrimSpace(string(b)) == serial {
				return "/dev/" + filepath.Base(filepath.Dir(file)), nil
			}
		}
		if time.Now().After(deadline) {
			return "", fmt.Errorf("no disk has the serial number %s", serial)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// A volume is new as long as it holds what mke2fs leaves, and nothing else. One that
// is being filled holds the second file, too.
const (
	lostAndFound = "lost+found"
	filling      = ".lab-filling"
)

// fillVolume gives a new volume, mounted at root, what the image has in the folder at
// which it is to be mounted, with owner and mode of that folder. What was interrupted
// is done anew.
func fillVolume(root, from string) error {
	there, err := os.ReadDir(root)
	if err != nil {
		return err
	}
	fresh, half := false, false
	for _, e := range there {
		fresh = fresh || e.Name() == lostAndFound
		half = half || e.Name() == filling
	}
	if !fresh || len(there) > 1 && !half {
		return nil
	}
	for _, e := range there {
		if name := e.Name(); name != lostAndFound && name != filling {
			if err := os.RemoveAll(filepath.Join(root, name)); err != nil {
				return err
			}
		}
	}
	mark := filepath.Join(root, filling)
	if err := os.WriteFile(mark, nil, 0o600); err != nil {
		return err
	}
	if out, err := exec.Command("cp", "-a", from+"/.", root+"/").CombinedOutput(); err != nil {
		return fmt.Errorf("copying what the image has there: %s (%w)", strings.TrimSpace(string(out)), err)
	}
	var st unix.Stat_t
	if err := unix.Stat(from, &st); err != nil {
		return err
	}
	unix.Sync()
	// In this order: it is no longer new once the folder is gone.
	err = errors.Join(
		os.Chown(root, int(st.Uid), int(st.Gid)), unix.Chmod(root, st.Mode&0o7777),
		os.Remove(mark), os.RemoveAll(filepath.Join(root, lostAndFound)),
	)
	unix.Sync()
	return err
}
