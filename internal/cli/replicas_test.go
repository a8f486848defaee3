// SPDX-License-Identifier: Apache-2.0

package cli_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const replicated = `lab: shop
provider: memory
boxes: {base: ./disk.raw}
machines:
  web:
    box: base
    count: 2
    ready: [{console: lab test disk}]
  solo:
    box: base
    count: 1
    ready: [{console: lab test disk}]
`

// A role is all its replicas where a command takes several machines, and none where it
// takes one.
func TestRoles(t *testing.T) {
	d := newDesk(t, replicated)
	defer func() { _, _, _ = d.run("destroy", "--yes") }()
	d.ok("up", "-q", "web", "solo")
	want := "lab: error: \"web\" is several machines: web-1, web-2\nlab: hint: say which one: web-1 and web-2\n"
	for _, line := range []string{
		"ssh web", "ssh web -- true", "cp disk.raw web:/tmp", "cp web:/tmp/x .", "console web", "logs web", "show web", "rollback web",
		"diff web", "history web",
	} {
		if code, out, errOut := d.run(strings.Fields(line)...); code != 3 || out != "" || errOut != want {
			t.Errorf("lab %s: %d, %q, want 3, %q\n%s", line, code, errOut, want, out)
		}
	}
	for _, line := range []string{
		"up web", "plan web", "verify web", "taint web", "untaint web", "stop web --grace 1s", "start web", "restart web --grace 1s",
		"replace web", "ssh-config web", "burn web --yes", "destroy web --yes",
	} {
		code, out, errOut := d.run(strings.Fields(line)...)
		if code != 0 {
			t.Errorf("lab %s: %d, %q\n%s", line, code, errOut, out)
		}
	}
	if got := d.ok("status"); strings.Contains(got, "web-") || !strings.Contains(got, "solo") {
		t.Errorf("status says\n%s", got)
	}
	d.ok("logs", "solo")
}

func TestRestart(t *testing.T) {
	d := newDesk(t, shop)
	defer func() { _, _, _ = d.run("destroy", "--yes") }()
	if code, _, errOut := d.run("restart"); code != 1 || !strings.HasPrefix(errOut, "lab: error: there is no such lab\n") {
		t.Errorf("restart of nothing: %d, %q", code, errOut)
	}
	d.ok("up", "-q")
	_, _, errOut := d.run("restart", "web", "--grace", "1s")
	for _, want := range []string{"web: stopping\n", "web: stopped", "web: booting\n", "web: ready: "} {
		if !strings.Contains(errOut, want) || strings.Contains(errOut, "db: ") {
			t.Errorf("restart does not say %q:\n%s", want, errOut)
		}
	}
	if got := d.ok("status"); !strings.Contains(got, "web   1    ready") || !strings.Contains(got, "db    1    ready") {
		t.Errorf("status says\n%s", got)
	}
	d.ok("stop", "web")
	for range 2 {
		d.ok("restart", "web")
	}
	if got := d.ok("history"); strings.Count("\n"+got, "\nlab restart web\n") != 2 {
		t.Errorf("the two restarts are not two in\n%s", got)
	}
	if got := d.ok("ps"); !strings.Contains(got, "web   1    ready") {
		t.Errorf("ps says\n%s", got)
	}
}

// Where only instances under other names are up, they are told.
func TestStatusOfOtherInstances(t *testing.T) {
	d := newDesk(t, shop)
	defer func() { _, _, _ = d.run("destroy", "--yes", "--name", "two") }()
	d.ok("up", "-q", "--name", "two")
	code, out, errOut := d.run("status")
	want := "lab: error: there is no such lab\nlab: hint: \"--name two\" addresses what is up from this Labfile\n"
	if code != 1 || errOut != want || !strings.Contains(out, "two-") {
		t.Errorf("status: %d, %q, want 1, %q\n%s", code, errOut, want, out)
	}
	if code, _, errOut := d.run("ssh", "web"); code != 1 || errOut != want {
		t.Errorf("ssh: %d, %q, want 1, %q", code, errOut, want)
	}
}

func TestValidateNamesAFile(t *testing.T) {
	d := newDesk(t, shop)
	d.write("other.yaml", "lab: other\nmachines: {web: {box: builtin/tiny}}\n")
	if got, want := d.ok("validate", "other.yaml"), filepath.Join(d.folder, "other.yaml")+": lab other, 1 machine, no problems\n"; got != want {
		t.Errorf("validate FILE says %q, want %q", got, want)
	}
	if code, _, _ := d.run("validate", "other.yaml", "-f", "Labfile"); code != 3 {
		t.Errorf("validate of two files: exit code %d, want 3", code)
	}
}

// The order of the Labfile is the order of its machines, as long as it can be read.
func TestStatusKeepsTheOrderOfTheLabfile(t *testing.T) {
	d := newDesk(t, strings.Replace(replicated, "count: 2", "count: 11", 1))
	defer func() { _, _, _ = d.run("destroy", "--yes") }()
	order := func(table string) string {
		var names []string
		for line := range strings.Lines(table) {
			if f := strings.Fields(line); len(f) > 2 && f[2] == "ready" {
				names = append(names, f[0])
			}
		}
		return strings.Join(names, " ")
	}
	const want = "web-1 web-2 web-3 web-4 web-5 web-6 web-7 web-8 web-9 web-10 web-11 solo-1"
	id := strings.Fields(d.ok("up"))[1]
	for _, args := range [][]string{{"status"}, {"up"}, {"status", "--lab", id}} {
		if got := order(d.ok(args...)); got != want {
			t.Errorf("lab %v: %s, want %s", args, got, want)
		}
	}
	must(t, os.Remove(filepath.Join(d.folder, "Labfile")))
	if got, want := order(d.ok("status")), "solo-1 "+strings.TrimSuffix(want, " solo-1"); got != want {
		t.Errorf("without the Labfile: %s, want %s", got, want)
	}
}
