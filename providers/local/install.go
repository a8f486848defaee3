// SPDX-License-Identifier: Apache-2.0

package local

import (
	"bufio"
	"bytes"
	"os"
	"strings"
)

// Packages names the packages that bring something, by package manager.
type Packages struct {
	APT, DNF, Pacman, Zypper, APK string
	Else                          string // advice where none of these is known to be
}

// InstallCure returns the command that installs the packages on this host.
func InstallCure(p Packages) string {
	b, _ := os.ReadFile("/etc/os-release") // without it the advice is general
	return InstallCommand(b, p)
}

// InstallCommand picks the command by os-release(5)'s ID and ID_LIKE.
func InstallCommand(osRelease []byte, p Packages) string {
	ids := ""
	s := bufio.NewScanner(bytes.NewReader(osRelease))
	for s.Scan() {
		k, v, _ := strings.Cut(s.Text(), "=")
		if k == "ID" || k == "ID_LIKE" {
			ids += " " + strings.Trim(v, `"'`)
		}
	}
	for id := range strings.FieldsSeq(ids) {
		switch id {
		case "debian", "ubuntu":
			return "sudo apt install " + p.APT
		case "fedora", "rhel":
			return "sudo dnf install " + p.DNF
		case "arch":
			return "sudo pacman -S " + p.Pacman
		case "suse", "opensuse":
			return "sudo zypper install " + p.Zypper
		case "alpine":
			return "sudo apk add " + p.APK
		}
	}
	return p.Else
}
