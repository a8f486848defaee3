// SPDX-License-Identifier: Apache-2.0

package plan

import (
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/labfile/lab/internal/lab"
)

func TestStorage(t *testing.T) {
	have := lab.Machine{
		Volumes: []lab.Volume{
			{Name: "data", Size: lab.GiB, FS: "ext4", Mount: "/srv/data"},
			{Name: "log", Size: lab.GiB, FS: "ext4", Mount: "/srv/log"},
			{Name: "same", Size: lab.GiB, FS: "ext4", Mount: "/srv/same", Owner: "root:root"},
		},
		Mounts: []lab.Mount{{From: "/a", To: "/a"}, {From: "/b", To: "/b"}},
	}
	want := lab.Machine{
		Volumes: []lab.Volume{
			{Name: "data", Size: 2 * lab.GiB, FS: "ext4", Mount: "/data", Owner: "7:7", ReadOnly: true},
			{Name: "same", Size: lab.GiB, FS: "ext4", Mount: "/srv/same", Mode: "0755"},
			{Name: "new", Size: lab.GiB},
		},
		Mounts: []lab.Mount{{From: "/a", To: "/a", Writable: true}, {From: "/c", To: "/c"}},
	}
	diff := cmp.Diff([]string{
		"size of volume data changed: 1GiB -> 2GiB", "mount of volume data changed: /srv/data -> /data",
		"owner of volume data changed: root:root -> 7:7", "read_only of volume data changed: false -> true",
		"volume new added", "volume log removed (its data is kept)",
		"mount at /a changed", "mount at /c added", "mount at /b removed",
	}, storage(have, want))
	if diff != "" {
		t.Error(diff)
	}
	if why := storage(have, have); len(why) > 0 {
		t.Error(why)
	}
}
