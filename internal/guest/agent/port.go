// SPDX-License-Identifier: Apache-2.0

//go:build linux

package agent

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// OpenPort opens the virtio-serial port called name, waiting for it to appear.
func OpenPort(ctx context.Context, name string) (*os.File, error) {
	wait := newBackoff()
	for {
		path, err := findPort("/", name)
		if err == nil {
			// Opened like this the port honours Close while a read is under way.
			var fd int
			if fd, err = unix.Open(path, unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0); err == nil {
				return os.NewFile(uintptr(fd), path), nil
			}
			err = fmt.Errorf("opening %s: %w", path, err)
		}
		if wait.sleep(ctx) != nil {
			return nil, fmt.Errorf("%w (%w)", context.Cause(ctx), err)
		}
	}
}

// findPort returns the device of a port: the link that udev makes, or, without udev
// or before it, the device that the kernel names in sysfs.
func findPort(root, name string) (string, error) {
	link := filepath.Join(root, "dev/virtio-ports", name)
	if _, err := os.Stat(link); err == nil {
		return link, nil
	}
	class := filepath.Join(root, "sys/class/virtio-ports")
	ports, err := os.ReadDir(class)
	if err != nil {
		return "", err
	}
	for _, p := range ports {
		b, err := os.ReadFile(filepath.Join(class, p.Name(), "name"))
		if err == nil && strings.TrimSpace(string(b)) == name {
			return filepath.Join(root, "dev", p.Name()), nil
		}
	}
	return "", fmt.Errorf("looking for virtio port %q: %w", name, fs.ErrNotExist)
}

// backoff is a pause that grows from 5 milliseconds to half a second: short while a
// machine boots, cheap afterwards.
type backoff struct{ d time.Duration }

func newBackoff() *backoff { return &backoff{5 * time.Millisecond} }

func (b *backoff) sleep(ctx context.Context) error {
	t := time.NewTimer(b.d)
	defer t.Stop()
	b.d = min(b.d*3/2, 500*time.Millisecond)
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
