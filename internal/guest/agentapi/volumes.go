// SPDX-License-Identifier: Apache-2.0

package agentapi

import (
	"fmt"
	"net/url"
	"path"
	"strings"
)

// Volume is a disk that lab-agent mounts early in the boot, before the services that
// want what is on it. It is named on the kernel's command line, so that it is there
// again when the guest restarts by itself.
type Volume struct {
	Serial   string // of the virtio disk
	Path     string // absolute; where it is mounted
	ReadOnly bool
}

// VolumeParam is the kernel parameter that names a volume:
// lab.volume=SERIAL,rw|ro,PATH with what is special in PATH percent-encoded.
const VolumeParam = "lab.volume="

// Param returns the word for the kernel's command line.
func (v Volume) Param() string {
	access := "rw"
	if v.ReadOnly {
		access = "ro"
	}
	var b strings.Builder
	for _, c := range []byte(v.Path) {
		switch {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', strings.IndexByte("/._-+", c) >= 0:
			b.WriteByte(c)
		default:
			fmt.Fprintf(&b, "%%%02X", c)
		}
	}
	return VolumeParam + v.Serial + "," + access + "," + b.String()
}

// VolumesOf returns the volumes that a kernel command line names.
func VolumesOf(cmdline string) ([]Volume, error) {
	var all []Volume
	for _, word := range strings.Fields(cmdline) {
		value, ok := strings.CutPrefix(word, VolumeParam)
		if !ok {
			continue
		}
		parts := strings.SplitN(value, ",", 3)
		if len(parts) != 3 || parts[0] == "" || parts[1] != "rw" && parts[1] != "ro" {
			return nil, fmt.Errorf("the kernel parameter %q is not %sSERIAL,rw|ro,PATH", word, VolumeParam)
		}
		at, err := url.PathUnescape(parts[2])
		if err != nil || !path.IsAbs(at) || strings.ContainsRune(at, 0) {
			return nil, fmt.Errorf("the kernel parameter %q names no absolute path", word)
		}
		all = append(all, Volume{Serial: parts[0], Path: at, ReadOnly: parts[1] == "ro"})
	}
	return all, nil
}
