// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"strings"
	"testing"

	"github.com/labfile/lab/internal/lab"
)

// TestFixedAddresses: a machine has the address that the Labfile gives it, and no other has it.
func TestFixedAddresses(t *testing.T) {
	b := newBench(t)
	l := b.open()
	addresses := func(want ...string) {
		t.Helper()
		st, err := l.Status(b.ctx)
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, m := range st.Machines {
			got = append(got, string(m.Name)+m.Address[strings.LastIndexByte(m.Address, '.'):])
		}
		if strings.Join(got, " ") != strings.Join(want, " ") {
			t.Errorf("got %q, want %q", got, want)
		}
	}
	a, db, web := machine("a"), machine("db"), machine("web")
	db.Address = lab.FirstHost
	b.up(l, b.want(a, db, web))
	addresses("a.11", "db.10", "web.12")
	if _, err := l.Rebuild(b.ctx, b.want(a, db, web), UpOptions{}); err != nil {
		t.Fatal(err)
	}
	addresses("a.11", "db.10", "web.12")

	// An address is for life.
	for want, change := range map[string]func(){
		`machine "web": it has the address 10.`: func() { web.Address = 20 },
		`.11 is that of a; choose another one`:  func() { web = machine("next"); web.Address = 11 },
	} {
		before := web
		change()
		if _, err := l.Plan(b.ctx, b.want(a, db, web), UpOptions{Options: Options{Machines: []lab.Name{web.Name}}}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %s", err, want)
		}
		web = before
	}

	// The next one has another, also that of one which ends.
	if err := l.Destroy(b.ctx, Options{Machines: []lab.Name{"web"}}); err != nil {
		t.Fatal(err)
	}
	web.Address = 11
	b.up(l, b.want(db, web))
	addresses("db.10", "web.11")
}
