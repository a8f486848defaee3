// SPDX-License-Identifier: Apache-2.0

package ui

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	godigest "github.com/opencontainers/go-digest"

	"github.com/labfile/lab/boxes"
	"github.com/labfile/lab/internal/engine"
	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/ledger"
	"github.com/labfile/lab/internal/plan"
	"github.com/labfile/lab/providers"
)

var update = flag.Bool("update", false, "write the golden files")

// Answers fit a terminal of 80 columns, and one of 60 as far as a name does.
func TestAnswersFitTheTerminal(t *testing.T) {
	since := noon.Add(-26*time.Hour - 5*time.Minute)
	digest := "sha256:" + strings.Repeat("0123456789abcdef", 4)
	machine := func(name string, gen int, ports ...ledger.Port) engine.MachineStatus {
		return engine.MachineStatus{
			Name: lab.Name(name), Generation: gen, State: engine.StateReady, Address: "10.118.204.112", Box: "builtin/debian-12", CPUs: 2,
			Memory: 1536 * lab.MiB, DiskUsed: 812 * lab.MiB, Written: 96 * lab.MiB, Ready: &since, Running: &since, Ports: ports,
		}
	}
	worn := machine("payments-worker-2", 107)
	worn.State, worn.Reason = engine.StateFailed, `check exec "systemctl is-active payments-worker.service" failed for 3m0s: command ended with exit code 3: activating`
	expires := noon.Add(50 * time.Hour)
	status := engine.Status{ID: "payments-staging-1f3a9c2b", Provider: "libvirt", Expires: &expires, Machines: []engine.MachineStatus{
		machine("payments-db", 3, ledger.Port{Host: 15432, Guest: 5432}),
		machine("payments-api", 12, ledger.Port{Host: 18080, Guest: 8080}, ledger.Port{Host: 18443, Guest: 8443}, ledger.Port{Host: 40022, Guest: 22}),
		worn,
	}}
	labs := []engine.Summary{
		{ID: "payments-staging-1f3a9c2b", Labfile: "/home/annegret/projects/payments/environments/staging/Labfile", Provider: "libvirt", Machines: 12, Running: 11, Ready: 10},
		{ID: "shop-00c0ffee", Labfile: "/home/annegret/shop/Labfile", Provider: "qemu", Machines: 3, Running: 3, Ready: 3, LabfileGone: true},
		{ID: "archive-deadbeef", Volumes: []string{"pgdata", "uploads", "search-index"}},
	}
	record := func(sec int, kind ledger.Type, command, name string, gen int, data string) ledger.Record {
		return ledger.Record{
			Time: time.Date(2026, 3, 1, 12, 0, sec, 0, time.Local), Type: kind, Command: command, Machine: lab.Name(name), Generation: gen, Data: []byte(data),
		}
	}
	up := "lab up --file environments/staging/Labfile --var RELEASE=... --yes"
	records := []ledger.Record{
		record(1, ledger.LabOpened, up, "", 0, `{"name":"payments-staging","file":"/home/annegret/projects/payments/environments/staging/Labfile","provider":"qemu"}`),
		record(2, ledger.MachineCreate, up, "payments-api", 1, `{"spec":{"box":"builtin/debian-12"},"image":"`+digest+`","address":"10.118.204.10","why":["first creation"]}`),
		record(9, ledger.MachineReady, up, "payments-api", 1, `{"took":7200000000}`),
		record(12, ledger.MachineExited, "", "payments-api", 1, `{"reason":"killed","detail":"by signal 9, as the host ran out of memory"}`),
		record(15, ledger.MachineStart, "lab start", "payments-api", 1, `{}`),
	}
	why := []string{
		"box builtin/debian-12 is pinned to another digest: sha256:0123456789ab -> sha256:ba9876543210",
		"provision changed: step 2: shell apt-get install -y postgresql-client -> shell apt-get install -y postgresql-client-15",
	}
	var steps []plan.Step
	for i := range 4 {
		steps = append(steps, plan.Step{
			Machine: lab.Name(fmt.Sprintf("payments-worker-%d", i+1)), Action: plan.Replace, Generation: 3 + i/3, Next: 4 + i/3,
			Strategy: lab.Rolling, Reasons: why, Bake: []string{"step 2 of 2: shell apt-get install -y postgresql-client-15"},
		})
	}
	steps = append(steps, plan.Step{
		Machine: "payments-db", Action: plan.Replace, Generation: 1, Next: 2, Strategy: lab.StopFirst,
		StrategyWhy: "volume pgdata is written by one generation at a time", Reasons: []string{"memory changed: 1GiB -> 2GiB"}, Leftovers: []int{3},
	})
	born := noon.Add(-26 * time.Hour)
	generations := []ledger.Generation{
		{Machine: "payments-worker-1", Number: 12, Phase: ledger.PhaseReady, Born: &born, Image: digest, Why: why},
	}
	volumes := []engine.VolumeStatus{
		{
			Name: "postgresql-data", Size: 20 * lab.GiB, Taken: 3 * lab.GiB, FS: "ext4", Made: since, Machine: "payments-db", Generation: 12,
			InUse: []string{"payments-db@12", "payments-report@3"}, URI: "qemu+ssh://builder.example.org/system",
			Snapshots: []engine.VolumeSnapshot{{Number: 14, Size: 20 * lab.GiB, Taken: since, Why: "before generation 12 of payments-db"}},
		},
		{Name: "uploads", Size: 5 * lab.GiB, FS: "none", Made: since, Problem: "dial tcp 192.0.2.7:22: connect: no route to host"},
	}
	store := []boxes.Entry{
		{
			Names: []string{"payments-base", "payments-base-2026-03"}, Origin: "https://boxes.example.org/payments/2026-03/payments-base-amd64.qcow2",
			Box: boxes.Box{Digest: godigest.Digest(digest), Config: boxes.Config{Size: 21474836480, Architecture: "amd64"}, Bytes: 734003200},
		},
		{
			Names: []string{"builtin/debian-12"}, Origin: "builtin/debian-12", Damage: errors.New("disk.qcow2 is 12 bytes short of what was stored"),
			Box: boxes.Box{Digest: godigest.Digest(digest), Config: boxes.Config{Size: 2147483648, Architecture: "amd64"}, Bytes: 262144000},
		},
	}
	facts := [][2]string{
		{"names", "payments-base, payments-base-2026-03, payments-base-latest, payments-base-old"},
		{"digest", digest[:20]},
		{"has", "systemd, sshd, cloud-init and the guest agent, with AppArmor and its parser"},
		{"", "nftables"},
	}
	garbage := []engine.Garbage{
		{Kind: "machine", Name: "payments-staging-1f3a9c2b payments-worker-2@107", Bytes: 812 * lab.MiB, Why: "generation 108 has taken its place"},
		{Kind: "runtime", Name: "/run/user/1000/lab/payments-staging-1f3a9c2b", Why: "its lab is gone"},
		{Kind: "network", Name: "payments-1f3a9c2b at qemu+ssh://builder.example.org/system", Why: "its lab is gone"},
	}
	burnt := []engine.Burnt{
		{Round: 1, Machine: "payments-worker-2", Generation: 107, Next: 108, Recovered: 94 * time.Second, Lost: 812 * lab.MiB},
		{Round: 1, Machine: "payments-db", Generation: 3, Trouble: worn.Reason},
	}
	locked := []engine.LockChange{{Box: "payments-base", From: store[0].Origin, Old: digest, New: digest}}
	findings := []providers.Finding{
		{Topic: "acceleration", Level: providers.LevelWarning, Detail: "there is no /dev/kvm: machines are emulated, which is some ten times slower", Cure: "turn virtualization on"},
		{Topic: "qemu", Level: providers.LevelOK, Detail: "/usr/bin/qemu-system-x86_64 8.2.2"},
	}
	for name, render := range map[string]func(*bytes.Buffer, Page) error{
		"volumes":     func(b *bytes.Buffer, p Page) error { return Volumes(b, volumes, noon, p) },
		"boxes":       func(b *bytes.Buffer, p Page) error { return Boxes(b, store, p) },
		"box":         func(b *bytes.Buffer, p Page) error { return Facts(b, facts, p) },
		"garbage":     func(b *bytes.Buffer, p Page) error { return Garbage(b, garbage, true, p) },
		"burnt":       func(b *bytes.Buffer, p Page) error { return Burnt(b, burnt, p) },
		"lock":        func(b *bytes.Buffer, p Page) error { return LockChanges(b, locked, p) },
		"doctor":      func(b *bytes.Buffer, p Page) error { return Findings(b, findings, p) },
		"status":      func(b *bytes.Buffer, p Page) error { return Status(b, status, noon, p) },
		"list":        func(b *bytes.Buffer, p Page) error { return Labs(b, labs, p) },
		"history":     func(b *bytes.Buffer, p Page) error { return History(b, records, p) },
		"plan":        func(b *bytes.Buffer, p Page) error { return Plan(b, plan.Plan{Lab: status.ID, Steps: steps}, p) },
		"generations": func(b *bytes.Buffer, p Page) error { return Generations(b, generations, noon, p) },
	} {
		for _, columns := range []int{80, 60} {
			t.Run(fmt.Sprintf("%s/%d", name, columns), func(t *testing.T) {
				var b bytes.Buffer
				if err := render(&b, Page{Width: columns}); err != nil {
					t.Fatal(err)
				}
				for line := range strings.Lines(b.String()) {
					if n := width(strings.TrimSuffix(line, "\n")); n > columns {
						t.Errorf("%d columns: %q", n, line)
					}
				}
				golden := filepath.Join("testdata", fmt.Sprintf("%s-%d.txt", name, columns))
				if *update {
					if err := os.WriteFile(golden, b.Bytes(), 0o600); err != nil {
						t.Fatal(err)
					}
				}
				want, err := os.ReadFile(golden)
				if err != nil {
					t.Fatal(err)
				}
				if diff := cmp.Diff(string(want), b.String()); diff != "" {
					t.Error(diff)
				}
			})
		}
	}
}

func TestWrap(t *testing.T) {
	for _, tc := range []struct {
		text string
		n    int
		want string
	}{
		{"short", 10, "short"},
		{"one two three", 7, "one two|three"},
		{"one two three", 0, "one two three"},
		{"/a/long/path/to/it", 8, "/a/long/|path/to/|it"},
		{"unbreakable word", 5, "unbreakable|word"},
		{"é é é", 3, "é é|é"},
	} {
		if got := strings.Join(wrap(tc.text, tc.n), "|"); got != tc.want {
			t.Errorf("wrap(%q, %d) = %q, want %q", tc.text, tc.n, got, tc.want)
		}
	}
}
