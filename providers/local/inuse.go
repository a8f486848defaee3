// SPDX-License-Identifier: Apache-2.0

package local

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/labfile/lab/providers"
)

// lockedImage is what QEMU says when another process has an image that it asks
// for itself (file-posix.c, raw_check_lock_bytes and its caller).
var lockedImage = regexp.MustCompile(`(?s)Failed to get (?:shared )?"\w+" lock.*?Is another process using the image \[(.*?)\]\?`)

// VolumeInUse turns QEMU's words about a lock into an error that names the
// volume; nil if they are about something else.
func VolumeInUse(volumes []providers.Volume, said string) error {
	m := lockedImage.FindStringSubmatch(said)
	if m == nil {
		return nil
	}
	for _, v := range volumes {
		if v.Path == m[1] || slices.Contains(v.Layers, m[1]) {
			who := "another process"
			if pids := Openers(m[1]); len(pids) > 0 {
				who = "process " + strings.Join(pids, ", ")
			}
			return fmt.Errorf("%w: volume %q (%s) is attached to %s; stop that machine first", providers.ErrInUse, v.Name, m[1], who)
		}
	}
	return nil
}

// Openers lists the processes that have the file open, as far as /proc lets this
// one see.
func Openers(path string) []string {
	own, err := os.Stat(path)
	if err != nil {
		return nil
	}
	links, err := filepath.Glob("/proc/[0-9]*/fd/*")
	if err != nil {
		return nil
	}
	var pids []string
	for _, link := range links {
		pid := strings.Split(link, "/")[2]
		// By identity, for a path with symbolic links in it reads differently there.
		opened, err := os.Stat(link)
		if err == nil && os.SameFile(own, opened) && !slices.Contains(pids, pid) {
			pids = append(pids, pid)
		}
	}
	return pids
}
