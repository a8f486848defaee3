// SPDX-License-Identifier: Apache-2.0

package drift

import (
	"encoding/hex"
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func unhex(t testing.TB, s string) string {
	t.Helper()
	b, err := hex.DecodeString(strings.ReplaceAll(s, " ", ""))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// TestAttributes changes attributes wherever ext4 keeps them: in the inode, in a block,
// and in inodes of their own.
func TestAttributes(t *testing.T) {
	tree, values := t.TempDir(), t.TempDir()
	for _, name := range []string{"cap", "nocap", "acl", "label", "user", "many", "huge", "same", "gone"} {
		write(t, filepath.Join(tree, "etc", name), name+"\n")
	}
	write(t, filepath.Join(tree, "etc/passwd"), "root:x:0:0::/:\nops:x:7:7::/:\n")
	write(t, filepath.Join(tree, "etc/d/x"), "x\n")
	for name, value := range map[string]string{
		// cap_net_bind_service and cap_net_raw, effective; cap_bpf besides, above 32.
		"cap": unhex(t, "01000002 00240000 00000000 00000000 00000000"),
		"bpf": unhex(t, "01000002 00240000 00000000 80000000 00000000"),
		// u::rw-,u:ops:r--,g::r--,m::r--,o::---, as Linux gives it to programs.
		"acl": unhex(t, "02000000 0100 0600 ffffffff 0200 0400 07000000 0400 0400 ffffffff 1000 0400 ffffffff 2000 0000 ffffffff"),
		"big": strings.Repeat("b", 900), "large": strings.Repeat("l", 1024), "LARGE": strings.Repeat("l", 1023) + "L",
	} {
		write(t, filepath.Join(values, name), value)
	}
	ea := func(file, attr, value string) string {
		return fmt.Sprintf("ea_set -f %s /etc/%s %s\n", filepath.Join(values, value), file, attr)
	}
	base := image(t, tree, "8M", "-b", "1024", "-O", "ea_inode")
	before := ea("nocap", "security.capability", "cap") + ea("huge", "user.h", "large") + ea("same", "user.h", "large") +
		ea("same", "user.b", "big") + "ea_set /etc/gone user.g v\nea_set /etc/user user.a 1\n"
	tool(t, before, "debugfs", "-w", "-f", "-", base)
	over := overlay(t, base, ea("cap", "security.capability", "cap")+"ea_rm /etc/nocap security.capability\n"+
		ea("acl", "system.posix_acl_access", "acl")+ea("d", "system.posix_acl_default", "acl")+
		"ea_set /etc/label security.selinux system_u:object_r:etc_t:s0\nea_set /etc/user user.a 2\nea_rm /etc/gone user.g\n"+
		ea("many", "user.b", "big")+"ea_set /etc/many user.c c\n"+ea("huge", "user.h", "LARGE")+
		"write "+filepath.Join(values, "bpf")+" /etc/new\n"+ea("new", "security.capability", "bpf"))
	old, now := root(t, Layer{base, "raw"}), root(t, Layer{base, "raw"}, Layer{over, "qcow2"})
	r, err := Compare(t.Context(), old, now, Options{})
	if err != nil {
		t.Fatal(err)
	}
	want := []string{
		"M /etc/acl xattr", "M /etc/cap xattr", "M /etc/d xattr", "M /etc/gone xattr", "M /etc/huge xattr",
		"M /etc/label xattr", "M /etc/many xattr", "A /etc/new", "M /etc/nocap xattr", "M /etc/user xattr",
	}
	if d := cmp.Diff(want, lines(r)); d != "" {
		t.Fatal(d)
	}
	if got := string(r.Changes[6].New.XAttrs["user.b"]) + string(r.Changes[6].New.XAttrs["user.c"]); got != strings.Repeat("b", 900)+"c" {
		t.Errorf("attributes in a block: %q", r.Changes[6].New.XAttrs)
	}
	steps, err := Provision(t.Context(), old, now, r.Changes, ProvisionOptions{})
	if err != nil {
		t.Fatal(err)
	}
	_, steps, _ = strings.Cut(steps, "shell: |\n")
	wantSteps := `setfacl --set u::rw-,u:ops:r--,g::r--,m::r--,o::--- -- /etc/acl
setcap 'cap_net_bind_service,cap_net_raw=ep' /etc/cap
setfacl -d --set u::rw-,u:ops:r--,g::r--,m::r--,o::--- -- /etc/d
setfattr -h -x user.g -- /etc/gone
setfattr -h -n user.h -v 0x` + strings.Repeat("6c", 1023) + `4c -- /etc/huge
chcon -h -- system_u:object_r:etc_t:s0 /etc/label
setfattr -h -n user.b -v 0x` + strings.Repeat("62", 900) + ` -- /etc/many
setfattr -h -n user.c -v 0x63 -- /etc/many
setcap -r /etc/nocap
setfattr -h -n user.a -v 0x32 -- /etc/user
`
	if d := cmp.Diff(wantSteps, strings.ReplaceAll(steps, "          ", "")); d != "" {
		t.Error(d)
	}
}

func TestCapabilities(t *testing.T) {
	for _, tc := range []struct{ value, want string }{
		{"01000002 00240000 00000000 80000000 00000000", "cap_net_bind_service,cap_net_raw,cap_bpf=ep"},
		{"00000002 01000000 02000000 00000000 00000000", "cap_dac_override=i cap_chown=p"},
		{"01000002 00000000 00000000 00000080 00000000", "63=ep"},
		{"01000001 01000000 00000000", ""},
		{"01000003 01000000 00000000 00000000 00000000 01000000", ""}, // of another user namespace
	} {
		got, ok := capabilities([]byte(unhex(t, tc.value)))
		if got != tc.want || ok != (tc.want != "") {
			t.Errorf("%s: got %q, want %q", tc.value, got, tc.want)
		}
	}
}
