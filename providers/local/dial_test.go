// SPDX-License-Identifier: Apache-2.0

package local

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// TestDialCable dials a socket that is made after it was looked for, and one that
// nobody will make any more.
func TestDialCable(t *testing.T) {
	dir, err := os.MkdirTemp("", "lab-") // short, as sockets' paths must be
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "nic")
	asked := 0
	conn, err := DialCable(t.Context(), path, func() bool {
		if asked++; asked == 3 {
			l, err := net.Listen("unix", path)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { l.Close() })
		}
		return true
	})
	if err != nil || asked != 3 {
		t.Fatalf("after %d times: %v", asked, err)
	}
	conn.Close()

	none := filepath.Join(dir, "none")
	if _, err := DialCable(t.Context(), none, func() bool { return false }); !errors.Is(err, unix.ENOENT) || !NotListening(err) {
		t.Errorf("of a QEMU that has ended: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	if _, err := DialCable(ctx, none, func() bool { cancel(); return true }); !errors.Is(err, context.Canceled) {
		t.Errorf("when called off: %v", err)
	}
}
