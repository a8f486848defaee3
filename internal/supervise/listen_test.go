// SPDX-License-Identifier: Apache-2.0

package supervise

import (
	"net"
	"os"
	"path/filepath"
	"testing"
)

// A supervisor that ends does not take away the socket of the one after it.
func TestListenersRemoveTheirOwnSocket(t *testing.T) {
	dir, err := os.MkdirTemp("", "lab-") // short, as sockets' paths must be
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "s")
	first, err := listen(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	second, err := listen(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := first.Close(); err != nil {
		t.Error(err)
	}
	if conn, err := net.Dial("unix", path); err != nil {
		t.Error(err)
	} else {
		conn.Close()
	}
	if err := second.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(path); !os.IsNotExist(err) {
		t.Errorf("the socket's file is left: %v", err)
	}
	if err := second.Close(); err != nil {
		t.Errorf("closed again: %v", err)
	}
}
