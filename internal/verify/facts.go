// SPDX-License-Identifier: Apache-2.0

package verify

import (
	"encoding/hex"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// no is what a fact says that is false.
const no = "false"

func truth(b bool) Fact { return Fact{Text: strconv.FormatBool(b)} }

func num(n int) Fact { return Fact{Text: strconv.Itoa(n), Number: true} }

// list is a list without what stands in it twice, in its order.
func list(items []string) Fact {
	var once []string
	seen := map[string]bool{} // a guest may say a million different words
	for _, item := range items {
		if !seen[item] {
			seen[item] = true
			once = append(once, item)
		}
	}
	return Fact{Items: once, List: true}
}

// tcpListen is TCP_LISTEN in the tables below /proc/net (Linux, tcp_states.h).
const tcpListen = "0A"

// parsePort reads the tables of sockets below /proc/net, of both families, for
// "tcp:80" or "udp:53" (proc_pid_net(5)).
func parsePort(subject, out string) (Facts, error) {
	proto, port, _ := strings.Cut(subject, ":")
	wanted, err := strconv.ParseUint(port, 10, 16)
	if err != nil {
		return nil, fmt.Errorf("%q is not a port", subject)
	}
	var ips []string
	for line := range strings.Lines(out) {
		f := strings.Fields(line)
		if len(f) < 4 || !strings.HasSuffix(f[0], ":") {
			continue
		}
		addr, number, ok := strings.Cut(f[1], ":")
		n, err := strconv.ParseUint(number, 16, 16)
		// A UDP socket that is connected waits for one peer only.
		peer := strings.Trim(f[2], "0:") != ""
		if !ok || err != nil || n != wanted || proto == "tcp" && f[3] != tcpListen || proto == "udp" && peer {
			continue
		}
		ip, err := kernelAddr(addr)
		if err != nil {
			return nil, err
		}
		ips = append(ips, ip.String())
	}
	return Facts{"listening": truth(len(ips) > 0), "ip": list(ips)}, nil
}

// kernelAddr reads an address as /proc/net has it: words of 32 bits, each in the
// byte order of the machine, which is little-endian wherever lab runs.
func kernelAddr(s string) (netip.Addr, error) {
	b, err := hex.DecodeString(s)
	if err != nil || len(b) != 4 && len(b) != 16 {
		return netip.Addr{}, fmt.Errorf("%q is not an address of the kernel", s)
	}
	for i := 0; i < len(b); i += 4 {
		slices.Reverse(b[i : i+4])
	}
	addr, _ := netip.AddrFromSlice(b)
	return addr, nil
}

// parseFile reads what fileScript prints.
func parseFile(out string) (Facts, error) {
	facts := Facts{"exists": truth(true)}
	attributes := []string{"mode", "owner", "group", "size", "filetype", "linked-to", "contents", "sha256"}
	for _, a := range attributes {
		facts[a] = Fact{None: true}
	}
	if out == "absent\n" {
		facts["exists"] = truth(false)
		return facts, nil
	}
	first, rest, _ := strings.Cut(out, "\n")
	f := strings.Fields(first)
	if len(f) != 7 || f[0] != "stat" {
		return nil, fmt.Errorf("stat said something unexpected: %q", shorten(out))
	}
	mode, err := strconv.ParseUint(f[1], 16, 32)
	if err != nil {
		return nil, fmt.Errorf("stat said something unexpected: %q", shorten(out))
	}
	owner := func(name, id string) Fact {
		if name == "UNKNOWN" {
			name = id
		}
		return Fact{Text: name}
	}
	facts["mode"] = Fact{Text: fmt.Sprintf("%04o", mode&0o7777), Number: true}
	facts["size"] = Fact{Text: f[2], Number: true}
	facts["owner"], facts["group"] = owner(f[3], f[4]), owner(f[5], f[6])
	facts["filetype"] = Fact{Text: filetype(mode)}
	if to, ok := strings.CutPrefix(rest, "link "); ok {
		facts["linked-to"] = Fact{Text: strings.TrimSuffix(to, "\n")}
	}
	return facts, nil
}

// filetype names the type in a mode (inode(7)).
func filetype(mode uint64) string {
	switch mode & 0o170000 {
	case 0o140000:
		return "socket"
	case 0o120000:
		return "symlink"
	case 0o100000:
		return "file"
	case 0o060000:
		return "block-device"
	case 0o040000:
		return "directory"
	case 0o020000:
		return "character-device"
	case 0o010000:
		return "pipe"
	}
	return "unknown"
}

// parsePackage reads versions, one per line: none if it is not installed.
func parsePackage(_, out string) (Facts, error) {
	versions := strings.Fields(out)
	return Facts{"installed": truth(len(versions) > 0), "versions": list(versions)}, nil
}

func parseService(_, out string) (Facts, error) {
	words := strings.Fields(out)
	return Facts{
		"enabled": truth(slices.Contains(words, "enabled")),
		"running": truth(slices.Contains(words, "running")),
	}, nil
}

// commLen is how much of a program's name the kernel keeps (TASK_COMM_LEN).
const commLen = 15

func parseProcess(subject, out string) (Facts, error) {
	subject = subject[:min(len(subject), commLen)]
	n := 0
	for line := range strings.Lines(out) {
		if strings.TrimSuffix(line, "\n") == subject {
			n++
		}
	}
	return Facts{"running": truth(n > 0), "count": num(n)}, nil
}

// parseUser reads a line of passwd(5) and one of the groups' names.
func parseUser(_, out string) (Facts, error) {
	facts := Facts{"exists": truth(out != "")}
	if out == "" {
		for _, a := range []string{"uid", "gid", "groups", "home", "shell"} {
			facts[a] = Fact{None: true}
		}
		return facts, nil
	}
	line, groups, _ := strings.Cut(out, "\n")
	f := strings.Split(line, ":")
	if len(f) != 7 {
		return nil, fmt.Errorf("not a line of passwd: %q", shorten(line))
	}
	facts["uid"], facts["gid"] = Fact{Text: f[2], Number: true}, Fact{Text: f[3], Number: true}
	facts["home"], facts["shell"] = Fact{Text: f[5]}, Fact{Text: f[6]}
	facts["groups"] = list(strings.Fields(groups))
	return facts, nil
}

// parseDNS reads what getent ahosts says, or nslookup behind a line that names it.
func parseDNS(_, out string) (Facts, error) {
	var addrs []string
	rest, nslookup := strings.CutPrefix(out, "nslookup\n")
	answer := !nslookup
	for line := range strings.Lines(rest) {
		f := strings.Fields(line)
		if len(f) == 0 {
			continue
		}
		if nslookup {
			// The name server's own address comes before the first name.
			if f[0] == "Name:" {
				answer = true
			}
			if !strings.HasPrefix(f[0], "Address") {
				continue
			}
			// "Address: A" and, of older ones, "Address 1: A NAME"
			f = f[1:]
			if len(f) > 1 && strings.HasSuffix(f[0], ":") && !strings.Contains(strings.TrimSuffix(f[0], ":"), ":") {
				f = f[1:]
			}
		}
		if len(f) == 0 {
			continue
		}
		if a, err := netip.ParseAddr(f[0]); err == nil && answer {
			addrs = append(addrs, a.String())
		}
	}
	return Facts{"resolvable": truth(len(addrs) > 0), "addrs": list(addrs)}, nil
}
