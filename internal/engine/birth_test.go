// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"bytes"
	"testing"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/ledger"
)

// TestSeedIsForTheLogin lets in whom lab logs in as: the Labfile's user before the
// box's, and root, which cloud images shut out, if neither says who.
func TestSeedIsForTheLogin(t *testing.T) {
	for _, tc := range []struct{ labfile, box, want string }{
		{"ops", "debian", "user:\n    name: ops\n"},
		{"", "debian", "user:\n    name: debian\n"},
		{"", "", "disable_root: false\n"},
	} {
		b := newBench(t)
		l := b.open()
		if err := l.makeDirs(); err != nil {
			t.Fatal(err)
		}
		m := lab.Machine{Name: "m", User: tc.labfile}
		c := ledger.Create{Spec: ledger.SpecOf(m), Address: lab.NetworkOf(l.ID()).Host(lab.FirstHost), User: tc.box}
		spec, err := (&session{Lab: l}).spec(lab.Generation{Lab: l.ID(), Machine: "m", Number: 1}, m, Image{}, c)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Contains(spec.Seed, []byte(tc.want)) {
			t.Errorf("user %q, box's user %q: the seed has no %q", tc.labfile, tc.box, tc.want)
		}
	}
}
