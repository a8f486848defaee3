// SPDX-License-Identifier: Apache-2.0

//go:build linux

package agent

import (
	"encoding/binary"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const socketTable = `  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 00000000:0050 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 20 1 0 100 0 0 10 0
   1: 0B01820A:0050 0A01820A:C350 01 00000000:00000000 02:00000000 00000000     0        0 21 1 0 20 4 0 10 -1
   2: 0B01820A:0050 0A01820A:C351 06 00000000:00000000 03:00000000 00000000     0        0 0 3 0
   3: 0B01820A:0050 0A01820A:C352 08 00000000:00000000 00:00000000 00000000     0        0 22 1 0 20 4 0 10 -1
   4: 0B01820A:C353 0A01820A:1538 01 00000000:00000000 00:00000000 00000000     0        0 23 1 0 20 4 0 10 -1
   5: 0100007F:0050 0100007F:C354 01 00000000:00000000 00:00000000 00000000     0        0 24 1 0 20 4 0 10 -1
`

const socketTable6 = `  sl  local_address                         remote_address                        st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 00000000000000000000000000000000:1F90 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 30 1 0 100 0 0 10 0
   1: 0000000000000000FFFF00000B01820A:1F90 0000000000000000FFFF00000A01820A:C355 01 00000000:00000000 00:00000000 00000000     0        0 31 1 0 20 4 0 10 -1
   2: 0000000000000000FFFF00000C00400A:1F90 0000000000000000FFFF00000A01820A:C356 04 00000000:00000000 00:00000000 00000000     0        0 32 1 0 20 4 0 10 -1
`

func TestIncoming(t *testing.T) {
	if binary.NativeEndian.Uint16([]byte{1, 0}) != 1 {
		t.Skip("the tables are those of a little-endian machine")
	}
	for name, c := range map[string]struct {
		four, six string
		want      map[netip.Addr]int
	}{
		"both":          {socketTable, socketTable6, map[netip.Addr]int{netip.MustParseAddr("10.130.1.11"): 3, netip.MustParseAddr("10.64.0.12"): 1}},
		"no IPv6":       {socketTable, "", map[netip.Addr]int{netip.MustParseAddr("10.130.1.11"): 2}},
		"nobody":        {"", "", map[netip.Addr]int{}},
		"no such table": {"sl\n 0: x\n 1: 00:00 00:00 0A\n 2: 0B01820A:99999 0A01820A:C350 01\n 3: 0B01820A:0050 0A01820A:C350 100\n", "", map[netip.Addr]int{}},
	} {
		dir := t.TempDir()
		if err := os.MkdirAll(filepath.Join(dir, "proc", "net"), 0o755); err != nil {
			t.Fatal(err)
		}
		for file, text := range map[string]string{"tcp": c.four, "tcp6": c.six} {
			if text == "" {
				continue
			}
			if err := os.WriteFile(filepath.Join(dir, "proc", "net", file), []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		root, err := os.OpenRoot(dir)
		if err != nil {
			t.Fatal(err)
		}
		defer root.Close()
		if d := cmp.Diff(c.want, incoming(root), cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); d != "" {
			t.Errorf("%s (-want +got):\n%s", name, d)
		}
	}
}

// The kernel at hand writes what is read.
func TestSocketsOfThisKernel(t *testing.T) {
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	f, err := os.Open("/proc/net/tcp")
	if err != nil {
		t.Skip(err)
	}
	defer f.Close()
	want := socket{netip.MustParseAddrPort(ln.Addr().String()), tcpListen}
	for _, s := range readSockets(f) {
		if s == want {
			return
		}
	}
	t.Errorf("%v is not in the table", want)
}

func FuzzSockets(f *testing.F) {
	f.Add(socketTable)
	f.Add(socketTable6)
	f.Fuzz(func(t *testing.T, text string) {
		for _, s := range readSockets(strings.NewReader(text)) {
			if !s.local.IsValid() || s.local.Addr().Is4In6() {
				t.Errorf("%v", s)
			}
		}
	})
}
