// SPDX-License-Identifier: Apache-2.0

package ui

import (
	"fmt"
	"io"
	"strconv"
	"time"

	"github.com/labfile/lab/internal/engine"
)

// Burnt prints how machines fared in a drill.
func Burnt(w io.Writer, burnt []engine.Burnt, page Page) error {
	t := Table{squeezes: []squeeze{{how: fold, column: 5, least: 24}, {how: under, column: 5}, {how: drop, column: 4}}}
	t.Row("ROUND", "MACHINE", "GENERATION", "BACK AFTER", "LOST", "NOTE")
	for _, b := range burnt {
		generation, back, lost := strconv.Itoa(b.Generation), "", ""
		if b.Next > 0 {
			generation += fmt.Sprintf(" -> %d", b.Next)
			back = b.Recovered.Round(10 * time.Millisecond).String()
		}
		if b.Lost > 0 {
			lost = Size(int64(b.Lost))
		}
		t.Row(strconv.Itoa(b.Round), string(b.Machine), generation, back, lost, Clean(b.Trouble))
	}
	return t.Print(w, page)
}
