// SPDX-License-Identifier: Apache-2.0

package ui

import (
	"fmt"
	"io"
	"strings"

	"github.com/labfile/lab/boxes"
)

// Boxes prints the boxes of a store.
func Boxes(w io.Writer, all []boxes.Entry, page Page) error {
	if len(all) == 0 {
		_, err := fmt.Fprintln(w, "no boxes")
		return err
	}
	t := Table{squeezes: []squeeze{
		{how: fold, column: 6, least: 24},
		{how: under, column: 6},
		{how: drop, column: 4},
		{how: under, column: 5},
		{how: fold, column: 0},
		{how: drop, column: 3},
	}}
	t.Row("NAME", "DIGEST", "STORED", "DISK", "ARCH", "FROM", "NOTE")
	for _, e := range all {
		name, note := strings.Join(e.Names, ", "), ""
		if name == "" {
			name = "-"
		}
		if e.Damage != nil {
			note = "damaged: " + e.Damage.Error()
		}
		t.Row(name, ShortDigest(e.Digest.String()), Size(e.Bytes), Size(e.Config.Size), e.Config.Architecture, e.Origin, note)
		t.Paint(6, Red)
	}
	return t.Print(w, page)
}

// Facts prints what is known of one thing, a name and a value in each row. A row without a
// name goes on with the one above.
func Facts(w io.Writer, rows [][2]string, page Page) error {
	t := Table{squeezes: []squeeze{{how: fold, column: 1}}}
	for _, row := range rows {
		t.Row(row[0], row[1])
	}
	return t.Print(w, page)
}
