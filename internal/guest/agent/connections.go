// SPDX-License-Identifier: Apache-2.0

//go:build linux

package agent

import (
	"bufio"
	"encoding/binary"
	"encoding/hex"
	"io"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
)

// incoming counts the TCP connections that others have with this guest, by its address
// that they are with.
func incoming(root *os.Root) map[netip.Addr]int {
	var all []socket
	for _, path := range []string{"proc/net/tcp", "proc/net/tcp6"} {
		f, err := root.Open(path)
		if err != nil {
			continue // a kernel without IPv6
		}
		all = append(all, readSockets(f)...)
		f.Close()
	}
	listening := map[uint16]bool{}
	for _, s := range all {
		if s.state == tcpListen {
			listening[s.local.Port()] = true
		}
	}
	found := map[netip.Addr]int{}
	for _, s := range all {
		// One that this guest began has a port of its own that nobody listens at.
		if at := s.local.Addr(); slices.Contains(tcpOpen, s.state) && listening[s.local.Port()] && !at.IsLoopback() {
			found[at]++
		}
	}
	return found
}

// The states of a TCP socket (include/net/tcp_states.h).
const (
	tcpEstablished = 1
	tcpSynReceived = 3
	tcpFinWait1    = 4
	tcpCloseWait   = 8
	tcpLastAck     = 9
	tcpListen      = 10
	tcpClosing     = 11
)

// tcpOpen are those in which this end has something to say or to hear yet.
var tcpOpen = []uint8{tcpEstablished, tcpSynReceived, tcpFinWait1, tcpCloseWait, tcpLastAck, tcpClosing}

// socket is a line of /proc/net/tcp.
type socket struct {
	local netip.AddrPort
	state uint8
}

// readSockets reads /proc/net/tcp or tcp6 (Documentation/networking/proc_net_tcp.rst). What
// is no socket is passed over.
func readSockets(r io.Reader) []socket {
	var all []socket
	lines := bufio.NewScanner(r)
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) < 4 {
			continue
		}
		local, ok := parseSocketAddr(fields[1])
		state, err := strconv.ParseUint(fields[3], 16, 8)
		if ok && err == nil {
			all = append(all, socket{local, uint8(state)})
		}
	}
	return all
}

// parseSocketAddr parses an address and a port. The address is in words of four bytes, each
// as a number of this machine's; an IPv4 one may be mapped into IPv6.
func parseSocketAddr(s string) (netip.AddrPort, bool) {
	address, port, _ := strings.Cut(s, ":")
	b, err := hex.DecodeString(address)
	if err != nil || len(b) != 4 && len(b) != 16 {
		return netip.AddrPort{}, false
	}
	for word := range slices.Chunk(b, 4) {
		binary.NativeEndian.PutUint32(word, binary.BigEndian.Uint32(word))
	}
	n, err := strconv.ParseUint(port, 16, 16)
	if err != nil {
		return netip.AddrPort{}, false
	}
	a, _ := netip.AddrFromSlice(b)
	return netip.AddrPortFrom(a.Unmap(), uint16(n)), true
}
