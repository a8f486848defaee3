// SPDX-License-Identifier: Apache-2.0

package cli_test

import (
	"encoding/json"
	"path/filepath"
	"strings"
	"testing"
)

// change is the shop with one field of web changed.
func change(field string) string {
	return strings.Replace(shop, "  web:\n", "  web:\n    "+field+"\n", 1)
}

// TestRollback goes back and forth between two specifications, and reads what was
// recorded of it.
func TestRollback(t *testing.T) {
	d := newDesk(t, shop)
	defer func() { _, _, _ = d.run("destroy", "--yes") }()
	if code, _, errOut := d.run("rollback", "web"); code != 1 || !strings.Contains(errOut, "there is no such lab") {
		t.Errorf("rollback of nothing: %d, %s", code, errOut)
	}
	d.ok("up")
	if code, _, errOut := d.run("rollback", "web"); code != 1 ||
		!strings.Contains(errOut, `web has no earlier generation that was ready`) || !strings.Contains(errOut, "lab history web") {
		t.Errorf("rollback without an earlier generation: %d, %s", code, errOut)
	}
	d.write("Labfile", change("cpus: 2"))
	d.ok("up")
	d.ok("replace", "web")
	d.ok("rollback", "web", "--to", "1")

	got := d.ok("show", "web")
	for _, want := range []string{"web@4  ready", "you asked to go back to generation 1", "rollback  to generation 1", "1 processor,"} {
		if !strings.Contains(got, want) {
			t.Errorf("show web does not say %q:\n%s", want, got)
		}
	}
	var first, second, fourth struct {
		Generation int
		Phase      string
		SpecDigest string
		Image      string
		Born       string
		Rollback   int
		End        []string
		Spec       struct{ CPUs int }
	}
	for name, into := range map[string]any{"web@1": &first, "web@2": &second, "web": &fourth} {
		if err := json.Unmarshal([]byte(d.ok("show", name, "--json")), into); err != nil {
			t.Fatal(err)
		}
	}
	switch {
	case first.Generation != 1 || second.Generation != 2 || fourth.Generation != 4 || fourth.Phase != "ready" || fourth.Rollback != 1:
		t.Errorf("show says %+v, %+v, %+v", first, second, fourth)
	case first.SpecDigest != fourth.SpecDigest || first.SpecDigest == second.SpecDigest || second.Spec.CPUs != 2:
		t.Errorf("the specifications are %+v, %+v, %+v", first, second, fourth)
	case first.Image == "" || first.Image != fourth.Image || first.Born == "":
		t.Errorf("the first is %+v, the fourth %+v", first, fourth)
	}

	// The Labfile wants something else, and that is said.
	code, got, _ := d.run("plan")
	if code != 2 || !strings.Contains(got, "it was rolled back to generation 1, and the Labfile wants something else\n") ||
		!strings.Contains(got, "cpus changed: 1 -> 2") {
		t.Errorf("plan after a rollback: %d\n%s", code, got)
	}
	d.ok("up")

	// Going back without a number undoes that, and a second time goes forth again.
	d.ok("rollback", "web")
	if got := d.ok("show", "web"); !strings.Contains(got, "web@6") || !strings.Contains(got, "1 processor,") {
		t.Errorf("after another rollback\n%s", got)
	}
	got = d.ok("history", "web")
	for _, want := range []string{"GENERATION", "web@1", "web@6", "you asked to go back to generation 1", "web@4: ready"} {
		if !strings.Contains(got, want) {
			t.Errorf("history does not say %q:\n%s", want, got)
		}
	}

	for _, tt := range []struct {
		args []string
		code int
		want string
	}{
		{[]string{"rollback", "web", "--to", "9"}, 1, `web has no generation 9`},
		{[]string{"rollback", "web", "--to", "0"}, 3, "--to needs the number of a generation"},
		{[]string{"rollback", "wbe"}, 3, `did you mean "web"?`},
		{[]string{"show", "web@9"}, 1, `web has no generation 9`},
		{[]string{"show", "web@x"}, 3, "write MACHINE@NUMBER"},
		{[]string{"show", "web@01"}, 3, "is no generation"},
		{[]string{"show", "wbe"}, 3, `there is no machine "wbe"`},
	} {
		if code, _, errOut := d.run(tt.args...); code != tt.code || !strings.Contains(errOut, tt.want) {
			t.Errorf("lab %s: %d, %q, want %d and %q", strings.Join(tt.args, " "), code, errOut, tt.code, tt.want)
		}
	}
}

// TestPlanIsCarriedOutExactlyOrNotAtAll writes plans down and lets the world move.
func TestPlanIsCarriedOutExactlyOrNotAtAll(t *testing.T) {
	d := newDesk(t, shop)
	defer func() { _, _, _ = d.run("destroy", "--yes") }()
	file := filepath.Join(d.folder, "next.plan")
	if code, _, errOut := d.run("plan", "--out", file); code != 2 {
		t.Fatalf("plan --out: %d, %s", code, errOut)
	}
	d.ok("up", "--plan", file)
	if code, _, errOut := d.run("up", "--plan", file); code != 1 ||
		!strings.Contains(errOut, "the plan no longer holds: db: was to create, and is to keep now") ||
		!strings.Contains(errOut, "lab: hint: make a new plan") {
		t.Errorf("the same plan again: %d, %s", code, errOut)
	}

	d.write("Labfile", change("cpus: 2"))
	if code, _, _ := d.run("plan", "-o", file); code != 2 {
		t.Fatalf("plan -o: %d", code)
	}
	d.write("Labfile", change("cpus: 3"))
	code, _, errOut := d.run("up", "--plan", file)
	if code != 1 || !strings.Contains(errOut, "the plan no longer holds: web: the reasons to replace are others now") {
		t.Errorf("a plan for another Labfile: %d, %s", code, errOut)
	}
	if got := d.ok("status"); !strings.Contains(got, "web   1    ready") {
		t.Errorf("a plan that was refused changed something:\n%s", got)
	}
	d.write("Labfile", change("cpus: 2"))
	d.ok("up", "--plan", file)

	// What is to be created looks alike in a plan, whatever it is.
	d.ok("destroy", "web", "--yes")
	if code, _, _ := d.run("plan", "-o", file); code != 2 {
		t.Fatalf("plan -o: %d", code)
	}
	d.write("Labfile", change("cpus: 3"))
	if code, _, errOut := d.run("up", "--plan", file); code != 1 || !strings.Contains(errOut, "the Labfile or a box has changed") {
		t.Errorf("a plan for another machine: %d, %s", code, errOut)
	}

	d.write("other", "{}")
	for _, tt := range []struct {
		args []string
		code int
		want string
	}{
		{[]string{"up", "--plan", filepath.Join(d.folder, "other")}, 1, `is not a file that "lab plan --out" wrote`},
		{[]string{"up", "--plan", filepath.Join(d.folder, "none")}, 1, "no such file"},
		{[]string{"up", "web", "--plan", file}, 3, "says which machines it is about"},
	} {
		if code, _, errOut := d.run(tt.args...); code != tt.code || !strings.Contains(errOut, tt.want) {
			t.Errorf("lab %s: %d, %q, want %d and %q", strings.Join(tt.args, " "), code, errOut, tt.code, tt.want)
		}
	}
}

// TestMachinesAreNotDestroyedUnasked takes a machine out of the Labfile where nobody
// can be asked.
func TestMachinesAreNotDestroyedUnasked(t *testing.T) {
	d := newDesk(t, shop)
	defer func() { _, _, _ = d.run("destroy", "--yes") }()
	d.ok("up")
	d.write("Labfile", shop[:strings.Index(shop, "  web:\n")])
	code, _, errOut := d.run("up")
	if code != 3 || !strings.Contains(errOut, "what the Labfile no longer has: web") || !strings.Contains(errOut, "add --yes") {
		t.Errorf("up: %d, %s", code, errOut)
	}
	if got := d.ok("status"); !strings.Contains(got, "web   1    ready") {
		t.Errorf("web is gone:\n%s", got)
	}
	d.ok("up", "--yes")
	if got := d.ok("status"); strings.Contains(got, "web") {
		t.Errorf("web is still there:\n%s", got)
	}
}
