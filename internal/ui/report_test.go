// SPDX-License-Identifier: Apache-2.0

package ui

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/labfile/lab/internal/engine"
	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/ledger"
	"github.com/labfile/lab/providers"
)

var noon = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

func TestStatus(t *testing.T) {
	since := noon.Add(-83 * time.Second)
	s := engine.Status{ID: "shop-1f3a9c2b", Provider: "qemu", Machines: []engine.MachineStatus{
		{
			Name: "db", Generation: 1, State: engine.StateReady, Address: "10.64.1.10", Box: "builtin/tiny", CPUs: 1,
			Memory: 128 * lab.MiB, DiskUsed: 3 * lab.MiB, Running: &since,
			Ports: []ledger.Port{{Host: 8080, Guest: 80}, {Host: 2222, Guest: 22}},
		},
		{Name: "web", Generation: 12, State: engine.StateFailed, Reason: "not ready after 3m: \x1b[2Jport 80", Address: "10.64.1.11", Box: "base"},
	}}
	var b bytes.Buffer
	if err := Status(&b, s, noon, Page{}); err != nil {
		t.Fatal(err)
	}
	want := `lab shop-1f3a9c2b (qemu)

NAME  GEN  STATE   ADDRESS     PORTS              BOX           CPUS  MEMORY  DISK     UPTIME
db    1    ready   10.64.1.10  8080->80 2222->22  builtin/tiny  1     128MiB  3.0 MiB  1m23s
web   12   failed  10.64.1.11                     base

web: not ready after 3m: \x1b[2Jport 80
`
	if diff := cmp.Diff(want, b.String()); diff != "" {
		t.Error(diff)
	}
}

func TestStatusTellsOfPolicies(t *testing.T) {
	soon := noon.Add(90 * time.Minute)
	s := engine.Status{ID: "a-1", Provider: "memory", Expires: &soon, Machines: []engine.MachineStatus{
		{Name: "db", State: engine.StateExited, Reason: "it shut itself down", Tainted: []string{"ssh by ann: vi", "by\x1b ben"}},
		{Name: "web", State: engine.StateReady, Expired: "it is 25h old, and max_age is 24h"},
	}}
	want := "db: it shut itself down\ndb: tainted: ssh by ann: vi; by\\x1b ben\nweb: expired: it is 25h old, and max_age is 24h\nthe lab: it is destroyed in 1h30m\n"
	var b bytes.Buffer
	if err := Status(&b, s, noon, Page{}); err != nil {
		t.Fatal(err)
	}
	if !strings.HasSuffix(b.String(), "\n\n"+want) {
		t.Errorf("got\n%s\nwant it to end in\n%s", b.String(), want)
	}
	b.Reset()
	if err := Status(&b, s, noon.Add(2*time.Hour), Page{}); err != nil {
		t.Fatal(err)
	}
	if want := "the lab: its time is over; its supervisor destroys it\n"; !strings.HasSuffix(b.String(), want) {
		t.Errorf("got\n%s\nwant it to end in %q", b.String(), want)
	}
}

func TestStatusOfAnEmptyLab(t *testing.T) {
	var b bytes.Buffer
	if err := Status(&b, engine.Status{ID: "a-1", Provider: "memory"}, noon, Page{Color: true}); err != nil {
		t.Fatal(err)
	}
	if want := "lab a-1 (memory)\nno machines\n"; b.String() != want {
		t.Errorf("got %q, want %q", b.String(), want)
	}
}

func TestLabs(t *testing.T) {
	var b bytes.Buffer
	labs := []engine.Summary{
		{ID: "a-1", Labfile: "/home/u/a/Labfile", Provider: "qemu", Machines: 3, Running: 2, Ready: 1},
		{ID: "b-2", Labfile: "/home/u/b/Labfile", Provider: "qemu", LabfileGone: true},
	}
	if err := Labs(&b, labs, Page{}); err != nil {
		t.Fatal(err)
	}
	want := `LAB  MACHINES  RUNNING  READY  PROVIDER  LABFILE            NOTE
a-1  3         2        1      qemu      /home/u/a/Labfile
b-2  0         0        0      qemu      /home/u/b/Labfile  the Labfile is gone
`
	if diff := cmp.Diff(want, b.String()); diff != "" {
		t.Error(diff)
	}
	b.Reset()
	if err := Labs(&b, nil, Page{}); err != nil || b.String() != "no labs\n" {
		t.Errorf("Labs of none printed %q, %v", b.String(), err)
	}
}

func TestFindings(t *testing.T) {
	findings := []providers.Finding{
		{Topic: "qemu", Level: providers.LevelOK, Detail: "version 7.2.9"},
		{Topic: "acceleration", Level: providers.LevelWarning, Detail: "none", Cure: "enable KVM"},
		{Topic: "qemu-img", Level: providers.LevelError, Detail: "not found", Cure: "apt-get install qemu-utils"},
	}
	const table = `ok       qemu          version 7.2.9
warning  acceleration  none
                       -> enable KVM
`
	for _, tc := range []struct {
		n    int
		want string
	}{
		{1, "ok       qemu  version 7.2.9\n\nMachines can run here.\n"},
		{2, table + "\nMachines can run here; 1 warning above.\n"},
		{3, table + "error    qemu-img      not found\n                       -> apt-get install qemu-utils\n\n1 problem: machines cannot run here yet.\n"},
	} {
		var b bytes.Buffer
		if err := Findings(&b, findings[:tc.n], Page{}); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(tc.want, b.String()); diff != "" {
			t.Error(diff)
		}
	}
}

func TestGarbage(t *testing.T) {
	found := []engine.Garbage{{Kind: "machine", Name: "a-1 web@3", Bytes: 2 * lab.MiB, Why: "the ledger does not know it"}}
	for dry, last := range map[bool]string{true: "1 thing would be removed, 2.0 MiB\n", false: "1 thing removed, 2.0 MiB\n"} {
		var b bytes.Buffer
		if err := Garbage(&b, found, dry, Page{}); err != nil {
			t.Fatal(err)
		}
		want := "KIND     NAME       SIZE     WHY\nmachine  a-1 web@3  2.0 MiB  the ledger does not know it\n\n" + last
		if diff := cmp.Diff(want, b.String()); diff != "" {
			t.Error(diff)
		}
	}
}

// Two runs of one command are two; what a supervisor does in between ends neither.
func TestHistoryRuns(t *testing.T) {
	at := time.Date(2026, 3, 1, 12, 0, 0, 0, time.Local)
	record := func(command, run string) ledger.Record {
		return ledger.Record{Time: at, Type: ledger.MachineStopped, Command: command, Run: run, Machine: "web", Generation: 1, Data: []byte("{}")}
	}
	var b strings.Builder
	if err := History(&b, []ledger.Record{
		record("lab stop", ""), record("lab stop", ""), // older records
		record("lab stop", "a"), record(ledger.Supervisor, "s"), record("", ""), record("lab stop", "a"),
		record("lab stop", "b"),
	}, Page{}); err != nil {
		t.Fatal(err)
	}
	var shape []string
	for _, l := range strings.Split(strings.TrimSpace(b.String()), "\n") {
		switch {
		case !strings.Contains(l, "2026-03-01"):
			shape = append(shape, l)
		case strings.HasPrefix(l, " "):
			shape = append(shape, "+")
		default:
			shape = append(shape, "-")
		}
	}
	if got, want := strings.Join(shape, " "), "lab stop + + lab stop + - - + lab stop +"; got != want {
		t.Errorf("got %s\nwant %s\n%s", got, want, b.String())
	}
}
