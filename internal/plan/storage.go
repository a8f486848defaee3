// SPDX-License-Identifier: Apache-2.0

package plan

import (
	"fmt"

	"github.com/labfile/lab/internal/lab"
)

// storage says what of a machine's volumes and mounts is to be another. A running
// machine can take none of it.
func storage(have, want lab.Machine) []string {
	var why []string
	before := map[string]lab.Volume{}
	for _, v := range have.Volumes {
		before[v.Name] = v
	}
	for _, v := range want.Volumes {
		old, ok := before[v.Name]
		delete(before, v.Name)
		switch {
		case !ok:
			why = append(why, fmt.Sprintf("volume %s added", v.Name))
			continue
		case old == v:
			continue
		}
		field := func(name string, a, b any) {
			if a != b {
				why = append(why, fmt.Sprintf("%s of volume %s changed: %v -> %v", name, v.Name, a, b))
			}
		}
		field("size", old.Size, v.Size)
		field("fs", old.FS, v.FS)
		field("mount", old.Mount, v.Mount)
		field("owner", orElse(old.Owner, "root:root"), orElse(v.Owner, "root:root"))
		field("mode", orElse(old.Mode, "0755"), orElse(v.Mode, "0755"))
		field("read_only", old.ReadOnly, v.ReadOnly)
	}
	for _, v := range have.Volumes {
		if _, left := before[v.Name]; left {
			why = append(why, fmt.Sprintf("volume %s removed (its data is kept)", v.Name))
		}
	}
	mounts := map[string]lab.Mount{}
	for _, m := range have.Mounts {
		mounts[m.To] = m
	}
	for _, m := range want.Mounts {
		old, ok := mounts[m.To]
		delete(mounts, m.To)
		if !ok {
			why = append(why, fmt.Sprintf("mount at %s added", m.To))
		} else if old != m {
			why = append(why, fmt.Sprintf("mount at %s changed", m.To))
		}
	}
	for _, m := range have.Mounts {
		if _, left := mounts[m.To]; left {
			why = append(why, fmt.Sprintf("mount at %s removed", m.To))
		}
	}
	return why
}

func orElse(s, other string) string {
	if s == "" {
		return other
	}
	return s
}
