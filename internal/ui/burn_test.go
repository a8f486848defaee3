// SPDX-License-Identifier: Apache-2.0

package ui

import (
	"bytes"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/labfile/lab/internal/engine"
)

func TestBurnt(t *testing.T) {
	var b bytes.Buffer
	err := Burnt(&b, []engine.Burnt{
		{Round: 1, Machine: "db", Generation: 1, Next: 2, Lost: 3 << 20, Recovered: 3217 * time.Millisecond},
		{Round: 2, Machine: "web", Generation: 7, Trouble: "not \x1b ready"},
	}, Page{})
	if err != nil {
		t.Fatal(err)
	}
	want := `ROUND  MACHINE  GENERATION  BACK AFTER  LOST     NOTE
1      db       1 -> 2      3.22s       3.0 MiB
2      web      7                                not \x1b ready
`
	if diff := cmp.Diff(want, b.String()); diff != "" {
		t.Error(diff)
	}
}
