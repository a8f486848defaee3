// SPDX-License-Identifier: Apache-2.0

package lab_test

import (
	"testing"

	"github.com/labfile/lab/internal/lab"
)

func TestNumeric(t *testing.T) {
	for s, want := range map[string]bool{
		"1": true, "127": true, "010": true, "08": true, "99999999999": true, "0x2": true, "0x": true, "0x7F": true,
		"": false, "1a": false, "0xg": false, "x1": false, "1-2": false, "web": false, "1e3": false, "00x1": false,
	} {
		if got := lab.Numeric(s); got != want {
			t.Errorf("Numeric(%q) = %v, want %v", s, got, want)
		}
	}
}
