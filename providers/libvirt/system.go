// SPDX-License-Identifier: Apache-2.0

package libvirt

import (
	"context"
	"encoding/xml"
	"fmt"
	"os"

	golibvirt "github.com/digitalocean/go-libvirt"
)

// The daemon of the system is root's. Machines of lab run there as they do in a session:
// QEMU is a process of the calling user, who owns every file and keeps owning it.

// modelDAC is libvirt's name of the security model that is users and owners.
const modelDAC = "dac"

// caller is whom this process runs as.
func caller() *Account { return &Account{os.Geteuid(), os.Getegid()} }

// share gives what the daemon makes in a directory of the caller's to the caller's
// group: the daemon makes the sockets of consoles and channels itself, as root, and
// allows the group to connect. Nobody but the caller gets as far as that: the directory
// is the caller's alone.
func share(dir string) error {
	if err := os.Chown(dir, -1, os.Getegid()); err != nil { // a directory above may have given it another
		return err
	}
	return os.Chmod(dir, 0o700|os.ModeSetgid)
}

// confining are the security models that keep QEMU from all that libvirt itself did not
// give it.
var confining = map[string]string{"apparmor": "AppArmor", "selinux": "SELinux"}

// confinement lists those of them that the daemon knows.
func (k *link) confinement(ctx context.Context) ([]string, error) {
	c, err := k.connect(ctx, true)
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	models := c.models
	c.mu.Unlock()
	if models == nil {
		text, err := answer(ctx, k, func(l *golibvirt.Libvirt) (string, error) { return l.ConnectGetCapabilities() })
		if err != nil {
			return nil, err
		}
		if models, err = confiningModels(text); err != nil {
			return nil, err
		}
		c.mu.Lock()
		c.models = models // they are the daemon's for as long as it lives
		c.mu.Unlock()
	}
	return models, nil
}

// confiningModels reads them from the daemon's capabilities. It never returns nil
// without an error.
func confiningModels(capabilities string) ([]string, error) {
	var c struct {
		Models []string `xml:"host>secmodel>model"`
	}
	if err := xml.Unmarshal([]byte(capabilities), &c); err != nil {
		return nil, fmt.Errorf("reading libvirt's capabilities: %w", err)
	}
	found := []string{}
	for _, m := range c.Models {
		if confining[m] != "" {
			found = append(found, m)
		}
	}
	return found, nil
}
