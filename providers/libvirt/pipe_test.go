// SPDX-License-Identifier: Apache-2.0

package libvirt

import (
	"io"
	"net"
	"os"
	"path/filepath"
	"testing"
)

// What a program printed before it ended can be read after the connection was closed: a write
// to a program that has ended fails, and the connection is closed for that.
func TestPipeReadAfterClose(t *testing.T) {
	for name, c := range map[string]struct {
		shell     string
		collected bool // the program was waited for before the rest is read
	}{
		"ended":   {"echo Hi", true},
		"running": {"echo Hi; exec cat >/dev/null", true},
		"child":   {"sleep 5 & echo Hi", false}, // the child holds the output open
	} {
		t.Run(name, func(t *testing.T) {
			p := startSSH(t, c.shell).(*pipe)
			first := make([]byte, 1)
			if _, err := io.ReadFull(p, first); err != nil { // the rest is there too
				t.Fatal(err)
			}
			p.Close()
			if c.collected {
				p.end()
			}
			rest, _ := io.ReadAll(p)
			if got, want := string(first)+string(rest), "Hi\n"; got != want {
				t.Errorf("read %q, want %q", got, want)
			}
		})
	}
}

// startSSH returns a connection through an ssh that is a shell script.
func startSSH(t *testing.T, shell string) net.Conn {
	t.Helper()
	bin := t.TempDir()
	if err := os.WriteFile(filepath.Join(bin, "ssh"), []byte("#!/bin/sh\n"+shell+"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", bin+":"+os.Getenv("PATH"))
	c, err := (&link{addr: address{transport: viaSSH, host: "far"}}).dialSSH()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}
