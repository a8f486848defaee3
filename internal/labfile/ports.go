// SPDX-License-Identifier: Apache-2.0

package labfile

import (
	"fmt"
	"reflect"
	"strconv"
	"strings"

	"github.com/labfile/lab/internal/lab"
)

// forward is a port forward: GUEST, HOST:GUEST or 127.0.0.1:HOST:GUEST, where each can
// be a range of ports, and "/udp" can stand behind it.
type forward struct {
	place
	values []lab.Forward // more than one for a range
}

// maxPortRange bounds how many ports a range can have: each is listened on.
const maxPortRange = 100

func (f *forward) parse(s string, _ reflect.StructTag) error {
	rest, protocol, _ := strings.Cut(s, "/")
	if protocol != "" && protocol != "tcp" && protocol != "udp" || strings.HasSuffix(s, "/") {
		return fmt.Errorf("%q is not a protocol; write tcp or udp", shorten(protocol))
	}
	if i := strings.LastIndexByte(rest, ':'); i >= 0 {
		if j := strings.LastIndexByte(rest[:i], ':'); j >= 0 {
			if host := rest[:j]; host != "127.0.0.1" && host != "localhost" {
				return fmt.Errorf("forwarding from %s is refused: ports are opened on 127.0.0.1 only; write %q", shorten(host), shorten(s[j+1:]))
			}
			rest = rest[j+1:]
		}
	}
	host, guest, both := strings.Cut(rest, ":")
	if !both {
		host, guest = "0", rest
	}
	h, hosts, okHost := portRange(host)
	g, guests, okGuest := portRange(guest)
	switch {
	case !okHost || !okGuest:
		return fmt.Errorf("%q is not a port forward; write \"HOST:GUEST\", such as \"8080:80\", \"53:53/udp\" or \"8000-8010:8000-8010\", or GUEST alone", shorten(s))
	case h < 0 || h+hosts-1 > 65535:
		return fmt.Errorf("host port %s is not between 0 and 65535", shorten(host))
	case g < 1 || g+guests-1 > 65535:
		return fmt.Errorf("guest port %s is not between 1 and 65535", shorten(guest))
	case hosts < 1 || guests < 1:
		return fmt.Errorf("%q is a range that ends before it begins", shorten(s))
	case guests > maxPortRange:
		return fmt.Errorf("%s are %d ports; a range has at most %d", shorten(guest), guests, maxPortRange)
	case h == 0 && hosts > 1:
		return fmt.Errorf("host port 0 begins no range; write %q, so that each gets a free one", "0:"+shorten(guest))
	case h != 0 && hosts != guests:
		return fmt.Errorf("%d ports of the host cannot lead to %d of the guest; write as many", hosts, guests)
	}
	for i := range guests {
		v := lab.Forward{GuestPort: uint16(g + i), UDP: protocol == "udp"}
		if h != 0 {
			v.HostPort = uint16(h + i)
		}
		f.values = append(f.values, v)
	}
	return nil
}

// portRange reads a port or a range of them. It reports false for what is neither; of a
// number that is too large, no port is left.
func portRange(s string) (first, count int, ok bool) {
	begin, end, ranged := strings.Cut(s, "-")
	first, ok = portNumber(begin)
	if !ranged || !ok {
		return first, 1, ok
	}
	last, ok := portNumber(end)
	return first, last - first + 1, ok
}

// portNumber reads a number of digits alone. One that is absurdly large stays too large.
func portNumber(s string) (int, bool) {
	if s == "" || strings.Trim(s, "0123456789") != "" {
		return 0, false
	}
	n, err := strconv.Atoi(s)
	if err != nil || n > 1<<20 {
		n = 1 << 20
	}
	return n, true
}
