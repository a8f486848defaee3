// SPDX-License-Identifier: Apache-2.0

package lab

import "testing"

func TestBakeName(t *testing.T) {
	for name, want := range map[Name]bool{
		"bake-1a2b3c": true, "bake-000000": true,
		"bake": false, "bake-1a2b3": false, "bake-1a2b3c4": false, "bake-1a2b3g": false, "web-1": false,
	} {
		if got := BakeName(name); got != want {
			t.Errorf("BakeName(%q) is %v", name, got)
		}
	}
}
