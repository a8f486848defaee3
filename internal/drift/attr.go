// SPDX-License-Identifier: Apache-2.0

package drift

import (
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
)

// The attributes that have programs of their own.
const (
	attrCapability = "security.capability"
	attrLabel      = "security.selinux"
	attrACL        = "system.posix_acl_access"
	attrDefaultACL = "system.posix_acl_default"
)

var le = binary.LittleEndian

// attrCommands are what gives a file the attributes of now, where they are others than
// before; and what can't be said so, in words.
func attrCommands(name string, old, now map[string][]byte, owner func(user bool, id uint32) string) (commands, notes []string) {
	for _, attr := range slices.Sorted(maps.Keys(old)) {
		if _, still := now[attr]; still {
			continue
		}
		switch attr {
		case attrCapability:
			commands = append(commands, "setcap -r "+name)
		case attrACL:
			commands = append(commands, "setfacl -b -- "+name)
		case attrDefaultACL:
			commands = append(commands, "setfacl -k -- "+name)
		default:
			commands = append(commands, fmt.Sprintf("setfattr -h -x %s -- %s", quote(attr), name))
		}
	}
	for _, attr := range slices.Sorted(maps.Keys(now)) {
		value := now[attr]
		if before, had := old[attr]; had && string(before) == string(value) {
			continue
		}
		command, ok := "", true
		switch attr {
		case attrCapability:
			var caps string
			caps, ok = capabilities(value)
			command = fmt.Sprintf("setcap %s %s", quote(caps), name)
		case attrLabel:
			command = fmt.Sprintf("chcon -h -- %s %s", quote(strings.TrimRight(string(value), "\x00")), name)
		case attrACL, attrDefaultACL:
			var list string
			list, ok = accessList(value, owner)
			flag := "--set"
			if attr == attrDefaultACL {
				flag = "-d --set"
			}
			command = fmt.Sprintf("setfacl %s %s -- %s", flag, list, name)
		default:
			command = fmt.Sprintf("setfattr -h -n %s -v 0x%s -- %s", quote(attr), hex.EncodeToString(value), name)
			ok = len(value) <= maxAttrInline
		}
		if !ok {
			notes = append(notes, fmt.Sprintf("has an attribute %q that no step makes", attr))
			continue
		}
		commands = append(commands, command)
	}
	return commands, notes
}

// maxAttrInline is how long the value of an attribute may be, in bytes, to stand in a step.
const maxAttrInline = 4 << 10

// capabilityNames are those of linux/capability.h, by their numbers.
var capabilityNames = strings.Fields(`chown dac_override dac_read_search fowner fsetid kill setgid setuid setpcap
linux_immutable net_bind_service net_broadcast net_admin net_raw ipc_lock ipc_owner sys_module sys_rawio sys_chroot
sys_ptrace sys_pacct sys_admin sys_boot sys_nice sys_resource sys_time sys_tty_config mknod lease audit_write
audit_control setfcap mac_override mac_admin syslog wake_alarm block_suspend audit_read perfmon bpf checkpoint_restore`)

// capabilities writes the capabilities of a program as setcap(8) takes them.
func capabilities(value []byte) (string, bool) {
	const revision2 = 2
	if len(value) != 20 || value[3] != revision2 {
		return "", false
	}
	head := le.Uint32(value)
	permitted := uint64(le.Uint32(value[4:])) | uint64(le.Uint32(value[12:]))<<32
	inheritable := uint64(le.Uint32(value[8:])) | uint64(le.Uint32(value[16:]))<<32
	byFlags := map[string][]string{}
	for n := range 64 {
		flags := ""
		if inheritable>>n&1 != 0 {
			flags += "i"
		}
		if permitted>>n&1 != 0 {
			flags += "p"
		}
		if flags == "" {
			continue
		}
		if head&1 != 0 {
			flags = "e" + flags
		}
		name := strconv.Itoa(n)
		if n < len(capabilityNames) {
			name = "cap_" + capabilityNames[n]
		}
		byFlags[flags] = append(byFlags[flags], name)
	}
	var clauses []string
	for _, flags := range slices.Sorted(maps.Keys(byFlags)) {
		clauses = append(clauses, strings.Join(byFlags[flags], ",")+"="+flags)
	}
	return strings.Join(clauses, " "), len(clauses) > 0
}

// accessList writes an access control list, as ext4 keeps it, as setfacl(1) takes it.
func accessList(value []byte, owner func(user bool, id uint32) string) (string, bool) {
	if len(value) < 4 || le.Uint32(value) != 1 {
		return "", false
	}
	var entries []string
	for e := value[4:]; len(e) > 0; {
		if len(e) < 4 {
			return "", false
		}
		tag, perm, size := le.Uint16(e), le.Uint16(e[2:]), 4
		who := ""
		switch tag {
		case 0x01:
			who = "u:"
		case 0x04:
			who = "g:"
		case 0x10:
			who = "m:"
		case 0x20:
			who = "o:"
		case 0x02, 0x08:
			if size = 8; len(e) < size {
				return "", false
			}
			who = map[uint16]string{0x02: "u:", 0x08: "g:"}[tag] + owner(tag == 0x02, le.Uint32(e[4:]))
		default:
			return "", false
		}
		bits := []byte("---")
		for n, c := range []byte("rwx") {
			if perm>>(2-n)&1 != 0 {
				bits[n] = c
			}
		}
		entries = append(entries, who+":"+string(bits))
		e = e[size:]
	}
	return strings.Join(entries, ","), len(entries) > 0
}
