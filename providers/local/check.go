// SPDX-License-Identifier: Apache-2.0

package local

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"regexp"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/providers"
)

// CheckGeneration refuses names that could leave the directories they stand in.
func CheckGeneration(g lab.Generation) error {
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

// CheckSpec refuses what no machine can be made of. file looks at the path of each of the
// volumes' files: CheckFile, or CheckAbsolute if they are on another host.
func CheckSpec(s providers.Spec, file func(path string) error) error {
	if err := CheckGeneration(s.Generation); err != nil {
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
		if err := CheckFile(path); err != nil {
			return fmt.Errorf("opening the image: %w", err)
		}
	}
	if s.Append != "" && i.Kernel == "" {
		return fmt.Errorf("%q cannot go to the kernel's command line: the image boots by itself", s.Append)
	}
	if err := CheckVolumes(s.Volumes, file); err != nil {
		return err
	}
	if err := checkMounts(s.Mounts); err != nil {
		return err
	}
	if s.MAC != "" {
		if m, err := net.ParseMAC(s.MAC); err != nil || len(m) != 6 || m.String() != s.MAC {
			return fmt.Errorf("%q is not a hardware address in lower case", s.MAC)
		}
	}
	return nil
}

// shortName is what the serial number of a volume and the tag of a mount may be:
// nothing that QEMU's options or a guest's scripts would read otherwise. The
// lengths are those of virtio: 20 bytes for a serial number (specification 1.2,
// section 5.2.6), 31 for QEMU's mount tags.
var shortName = regexp.MustCompile(`^[A-Za-z0-9._-]+$`)

const (
	maxSerial = 20
	maxTag    = 31
)

// CheckAbsolute refuses a path that would be looked for in "/".
func CheckAbsolute(path string) error {
	if !filepath.IsAbs(path) {
		return fmt.Errorf("%q is not an absolute path", path)
	}
	return nil
}

// CheckFile refuses what is no file of this host.
func CheckFile(path string) error { return checkPath(path, fs.FileMode.IsRegular, "regular file") }

func checkPath(path string, is func(fs.FileMode) bool, what string) error {
	if err := CheckAbsolute(path); err != nil {
		return err
	}
	fi, err := os.Stat(path)
	if err == nil && !is(fi.Mode()) {
		err = fmt.Errorf("%s is not a %s", path, what)
	}
	return err
}

// CheckVolumes looks at a machine's volumes. file is as CheckSpec's.
func CheckVolumes(volumes []providers.Volume, file func(path string) error) error {
	if len(volumes) > providers.MaxVolumes {
		return fmt.Errorf("%d volumes: a machine can have %d", len(volumes), providers.MaxVolumes)
	}
	seen := map[string]bool{}
	for _, v := range volumes {
		if !shortName.MatchString(v.Name) || len(v.Name) > maxSerial {
			return fmt.Errorf("%q is not the name of a volume", v.Name)
		}
		if seen[v.Name] {
			return fmt.Errorf("two volumes are called %q", v.Name)
		}
		seen[v.Name] = true
		for _, path := range append([]string{v.Path}, v.Layers...) {
			if err := file(path); err != nil {
				return fmt.Errorf("volume %q: %w", v.Name, err)
			}
		}
	}
	return nil
}

func checkMounts(mounts []providers.Mount) error {
	if len(mounts) > providers.MaxMounts {
		return fmt.Errorf("%d mounts: a machine can have %d", len(mounts), providers.MaxMounts)
	}
	seen := map[string]bool{}
	for _, m := range mounts {
		if !shortName.MatchString(m.Tag) || len(m.Tag) > maxTag {
			return fmt.Errorf("%q is not the tag of a mount", m.Tag)
		}
		if seen[m.Tag] {
			return fmt.Errorf("two mounts have the tag %q", m.Tag)
		}
		seen[m.Tag] = true
		if err := checkPath(m.Path, fs.FileMode.IsDir, "folder"); err != nil {
			return fmt.Errorf("mount %q: %w", m.Tag, err)
		}
	}
	return nil
}
