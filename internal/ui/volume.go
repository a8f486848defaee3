// SPDX-License-Identifier: Apache-2.0

package ui

import (
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/labfile/lab/internal/engine"
)

// Volumes prints a lab's volumes, each above its snapshots. now is what ages are
// counted to.
func Volumes(w io.Writer, all []engine.VolumeStatus, now time.Time, page Page) error {
	if len(all) == 0 {
		_, err := fmt.Fprintln(w, "no volumes")
		return err
	}
	t := Table{squeezes: []squeeze{
		{how: fold, column: 5, least: 24}, {how: under, column: 5}, {how: drop, column: 3}, {how: drop, column: 2},
	}}
	t.Row("VOLUME", "SIZE", "TAKEN", "FS", "AGE", "NOTE")
	for _, v := range all {
		note := ""
		switch {
		case len(v.InUse) > 0:
			note = "in use by " + strings.Join(v.InUse, ", ")
		case v.Machine != "":
			note = fmt.Sprintf("last used by %s@%d", v.Machine, v.Generation)
		}
		if v.Problem != "" {
			note = strings.TrimPrefix(note+"; ", "; ") + "who has it is not known: " + Clean(v.Problem)
		}
		if v.URI != "" {
			note = strings.TrimPrefix(note+", ", ", ") + "at " + v.URI
		}
		t.Row(v.Name, v.Size.String(), Size(int64(v.Taken)), v.FS, elapsed(now.Sub(v.Made)), note)
		for _, s := range v.Snapshots {
			t.Row(fmt.Sprintf("  %s@%d", v.Name, s.Number), s.Size.String(), "", "", elapsed(now.Sub(s.Taken)), s.Why)
			t.Paint(0, Dim)
		}
	}
	return t.Print(w, page)
}
