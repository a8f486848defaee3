// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/labfile/lab/providers"
)

// shortName is what the serial number of a volume and the tag of a mount may be:
// nothing that QEMU's options or a guest's scripts would read otherwise. The
// lengths are those of virtio: 20 bytes for a serial number (specification 1.2,
// section 5.2.6), 31 for QEMU's mount tags.
var shortName = regexp.MustCompile(`^[A-Za-z0-9._-]+$`)

const (
	maxSerial = 20
	maxTag    = 31
)

// checkPath refuses what is not there. Relative paths would be looked for in "/".
func checkPath(path string, folder bool) error {
	if !filepath.IsAbs(path) {
		return fmt.Errorf("%q is not an absolute path", path)
	}
	fi, err := os.Stat(path)
	switch {
	case err != nil:
		return err
	case folder && !fi.IsDir():
		return fmt.Errorf("%s is not a folder", path)
	case !folder && !fi.Mode().IsRegular():
		return fmt.Errorf("%s is not a regular file", path)
	}
	return nil
}

// checkStorage looks at the volumes and mounts of a specification.
func checkStorage(s providers.Spec) error {
	if len(s.Volumes) > providers.MaxVolumes {
		return fmt.Errorf("%d volumes: a machine can have %d", len(s.Volumes), providers.MaxVolumes)
	}
	if len(s.Mounts) > providers.MaxMounts {
		return fmt.Errorf("%d mounts: a machine can have %d", len(s.Mounts), providers.MaxMounts)
	}
	seen := map[string]bool{}
	for _, v := range s.Volumes {
		if !shortName.MatchString(v.Name) || len(v.Name) > maxSerial {
			return fmt.Errorf("%q is not the name of a volume", v.Name)
		}
		if seen[v.Name] {
			return fmt.Errorf("two volumes are called %q", v.Name)
		}
		seen[v.Name] = true
		for _, path := range append([]string{v.Path}, v.Layers...) {
			if err := checkPath(path, false); err != nil {
				return fmt.Errorf("volume %q: %w", v.Name, err)
			}
		}
	}
	seen = map[string]bool{}
	for _, m := range s.Mounts {
		if !shortName.MatchString(m.Tag) || len(m.Tag) > maxTag {
			return fmt.Errorf("%q is not the tag of a mount", m.Tag)
		}
		if seen[m.Tag] {
			return fmt.Errorf("two mounts have the tag %q", m.Tag)
		}
		seen[m.Tag] = true
		if err := checkPath(m.Path, true); err != nil {
			return fmt.Errorf("mount %q: %w", m.Tag, err)
		}
	}
	return nil
}

// canMount finds out whether QEMU was built with 9p.
func (p *Provider) canMount(ctx context.Context) error {
	binary, err := p.binary()
	if err != nil {
		return err
	}
	return has9P(ctx, binary)
}

// has9P has QEMU describe the device; it fails if it has none.
func has9P(ctx context.Context, binary string) error {
	err := exec.CommandContext(ctx, binary, "-device", "virtio-9p-pci,help").Run()
	var exit *exec.ExitError
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.As(err, &exit):
		return fmt.Errorf("%w: %s cannot share folders with machines: it was built without 9p", providers.ErrIncapable, binary)
	}
	return fmt.Errorf("running %s: %w", binary, err)
}

// lockedImage is what QEMU says when another process has an image that it asks
// for itself (file-posix.c, raw_check_lock_bytes and its caller).
var lockedImage = regexp.MustCompile(`(?s)Failed to get (?:shared )?"\w+" lock.*?Is another process using the image \[(.*?)\]\?`)

// volumeInUse turns QEMU's words about a lock into an error that names the
// volume; nil if they are about something else.
func volumeInUse(volumes []providers.Volume, said string) error {
	m := lockedImage.FindStringSubmatch(said)
	if m == nil {
		return nil
	}
	for _, v := range volumes {
		if v.Path == m[1] || slices.Contains(v.Layers, m[1]) {
			who := "another process"
			if pids := openers(m[1]); len(pids) > 0 {
				who = "process " + strings.Join(pids, ", ")
			}
			return fmt.Errorf("%w: volume %q (%s) is attached to %s; stop that machine first", providers.ErrInUse, v.Name, m[1], who)
		}
	}
	return nil
}
