// SPDX-License-Identifier: Apache-2.0

package agentapi

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestVolumeParams(t *testing.T) {
	want := []Volume{
		{Serial: "pgdata", Path: "/var/lib/postgresql"},
		{Serial: "a.b_c-1", Path: "/srv/with space, comma=%20\"quotes\"/ü", ReadOnly: true},
	}
	line := "root=/dev/vda rw quiet"
	for _, v := range want {
		line += " " + v.Param()
	}
	if strings.ContainsAny(line, "\"'") {
		t.Errorf("the kernel would unquote %q", line)
	}
	got, err := VolumesOf(line + " console=ttyS0\n")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	for _, bad := range []string{"lab.volume=", "lab.volume=a,rw", "lab.volume=a,wr,/x", "lab.volume=,rw,/x", "lab.volume=a,rw,x", "lab.volume=a,ro,%zz", "lab.volume=a,ro,/%00"} {
		if got, err := VolumesOf("quiet " + bad); err == nil {
			t.Errorf("%q gave %v", bad, got)
		}
	}
}

func FuzzVolumesOf(f *testing.F) {
	f.Add("quiet lab.volume=a,rw,/srv%20x lab.volume=b,ro,/")
	f.Fuzz(func(t *testing.T, line string) {
		all, err := VolumesOf(line)
		if err != nil {
			return
		}
		again := ""
		for _, v := range all {
			again += " " + v.Param()
		}
		got, err := VolumesOf(again)
		if err != nil {
			t.Fatalf("%q gave %v, and that %v", line, all, err)
		}
		if diff := cmp.Diff(all, got); diff != "" {
			t.Error(diff)
		}
	})
}
