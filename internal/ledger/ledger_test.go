// SPDX-License-Identifier: Apache-2.0

package ledger

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/labfile/lab/internal/lab"
)

func open(t *testing.T) *Ledger {
	t.Helper()
	return Open(filepath.Join(t.TempDir(), "ledger.jsonl"))
}

func add(t *testing.T, l *Ledger, r Record, data any) Record {
	t.Helper()
	r, err := l.Append(r, data)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestAppendChainsRecords(t *testing.T) {
	l := open(t)
	if l.Exists() {
		t.Fatal("a ledger exists before anything was recorded")
	}
	add(t, l, Record{Type: LabOpened, Command: "lab up"}, Opened{Name: "shop"})
	add(t, l, Record{Type: MachineCreate, Machine: "db", Generation: 1}, Create{})
	records, err := l.Read()
	if err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(l.path)
	if err != nil {
		t.Fatal(err)
	}
	first, _, _ := strings.Cut(string(data), "\n")
	if len(records) != 2 || records[0].Prev != "" || records[1].Prev != hash([]byte(first)) || records[1].Seq != 2 {
		t.Fatalf("records are not chained: %+v", records)
	}
}

func TestTornLastLineIsDropped(t *testing.T) {
	l := open(t)
	add(t, l, Record{Type: MachineCreate, Machine: "db", Generation: 1}, Create{})
	add(t, l, Record{Type: MachineReady, Machine: "db", Generation: 1}, Ready{})
	data, err := os.ReadFile(l.path)
	if err != nil {
		t.Fatal(err)
	}
	first := strings.IndexByte(string(data), '\n') + 1
	// A write that was cut off at any byte leaves the first record, and the next
	// append goes on from there.
	for cut := first; cut < len(data); cut++ {
		if err := os.WriteFile(l.path, data[:cut], 0o600); err != nil {
			t.Fatal(err)
		}
		records, err := l.Read()
		if err != nil || len(records) != 1 {
			t.Fatalf("cut at byte %d: %d records, %v", cut, len(records), err)
		}
		if r := add(t, l, Record{Type: MachineFailed, Machine: "db", Generation: 1}, Failed{}); r.Seq != 2 {
			t.Fatalf("cut at byte %d: the next record is number %d", cut, r.Seq)
		}
		if records, err := l.Read(); err != nil || len(records) != 2 || records[1].Type != MachineFailed {
			t.Fatalf("cut at byte %d: after the append: %+v, %v", cut, records, err)
		}
	}
}

// A ledger that was removed is not begun anew by who only adds to what there is.
func TestAppendIfExists(t *testing.T) {
	l := open(t)
	r := Record{Type: MachineExited, Machine: "web", Generation: 1}
	if _, err := l.AppendIfExists(r, nil); !errors.Is(err, fs.ErrNotExist) || l.Exists() {
		t.Errorf("got %v, and it exists: %v", err, l.Exists())
	}
	if _, err := l.Append(r, nil); err != nil {
		t.Fatal(err)
	}
	if second, err := l.AppendIfExists(r, nil); err != nil || second.Seq != 2 {
		t.Errorf("%+v, %v", second, err)
	}
	if err := os.Remove(l.path); err != nil {
		t.Fatal(err)
	}
	if _, err := l.AppendIfExists(r, nil); !errors.Is(err, fs.ErrNotExist) || l.Exists() {
		t.Errorf("got %v, and it exists: %v", err, l.Exists())
	}
}

func TestDamageIsFound(t *testing.T) {
	l := open(t)
	for n := 1; n <= 4; n++ {
		add(t, l, Record{Type: MachineCreate, Machine: "db", Generation: n}, nil)
	}
	data, err := os.ReadFile(l.path)
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.SplitAfter(strings.TrimSuffix(string(data), "\n"), "\n")
	for _, tt := range []struct {
		name, text string
		line, kept int
		why        string
	}{
		{"altered", strings.Replace(string(data), `"generation":2`, `"generation":9`, 1), 3, 2, "its hash of the line before does not match"},
		{"removed", lines[0] + lines[2] + lines[3] + "\n", 2, 1, "record 3 stands where record 2 belongs"},
		{"not JSON", lines[0] + "hello\n" + lines[2], 2, 1, "not a record"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			records, err := parse("ledger.jsonl", []byte(tt.text))
			var damaged *CorruptError
			if !errors.As(err, &damaged) {
				t.Fatalf("got error %v", err)
			}
			want := CorruptError{Path: "ledger.jsonl", Line: tt.line, Why: tt.why}
			if *damaged != want || len(records) != tt.kept {
				t.Errorf("got %+v and %d records, want %+v and %d", *damaged, len(records), want, tt.kept)
			}
		})
	}
}

func TestConcurrentAppendsAllLand(t *testing.T) {
	l := open(t)
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			// A ledger of its own: what another process would have.
			mine := Open(l.path)
			for n := range 10 {
				if _, err := mine.Append(Record{Type: MachineCreate, Machine: lab.Name(fmt.Sprintf("m%d", i)), Generation: n}, nil); err != nil {
					t.Error(err)
				}
			}
		}()
	}
	wg.Wait()
	if records, err := l.Read(); err != nil || len(records) != 80 {
		t.Fatalf("%d records, %v", len(records), err)
	}
}

func TestFold(t *testing.T) {
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	seq := 0
	rec := func(typ Type, gen int, data any) Record {
		seq++
		r := Record{Seq: seq, Type: typ, Machine: "db", Generation: gen, Time: at.Add(time.Duration(seq) * time.Second)}
		if data != nil {
			raw, err := json.Marshal(data)
			if err != nil {
				t.Fatal(err)
			}
			r.Data = raw
		}
		return r
	}
	create := rec(MachineCreate, 1, Create{Spec: Spec{Role: "db", CPUs: 2}, Address: netip.MustParseAddr("10.64.0.10"), Image: "sha256:1"})
	ready := rec(MachineReady, 1, Ready{Ports: []Port{{Host: 8080, Guest: 80}}})
	exited := rec(MachineExited, 1, Exited{Reason: "signaled"})
	for _, tt := range []struct {
		name    string
		records []Record
		phase   Phase
		exited  Exited
	}{
		{"intended", []Record{create}, PhaseCreating, Exited{}},
		{"ready", []Record{create, ready}, PhaseReady, Exited{}},
		{"failed", []Record{create, rec(MachineFailed, 1, Failed{Error: "no"})}, PhaseFailed, Exited{}},
		{"killed", []Record{create, ready, exited}, PhaseExited, Exited{Reason: "signaled"}},
		{"killed before it was ready", []Record{create, exited}, PhaseCreating, Exited{Reason: "signaled"}},
		{"stopped", []Record{create, ready, rec(MachineStop, 1, nil), rec(MachineExited, 1, Exited{Reason: "host"}), rec(MachineStopped, 1, nil)}, PhaseStopped, Exited{}},
		{"stop interrupted", []Record{create, ready, rec(MachineStop, 1, nil)}, PhaseStopping, Exited{}},
		{"ended after its stop was interrupted", []Record{create, ready, rec(MachineStop, 1, nil), rec(MachineExited, 1, Exited{Reason: "guest"})}, PhaseStopped, Exited{}},
		{"started again", []Record{create, ready, exited, rec(MachineStart, 1, nil), rec(MachineReady, 1, Ready{})}, PhaseReady, Exited{}},
		{"late news of an old generation", []Record{create, ready, rec(MachineCreate, 2, Create{}), rec(MachineExited, 1, Exited{Reason: "guest"})}, PhaseCreating, Exited{}},
		{"destroyed", []Record{create, ready, rec(MachineDestroy, 1, Destroy{}), rec(MachineDestroyed, 1, nil)}, PhaseGone, Exited{}},
		{"half destroyed", []Record{create, ready, rec(MachineDestroy, 1, Destroy{})}, PhaseDestroying, Exited{}},
		{"record of a newer lab", []Record{create, ready, rec("machine.frozen", 1, nil)}, PhaseReady, Exited{}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s, err := Fold(tt.records)
			if err != nil {
				t.Fatal(err)
			}
			if m := s.Machines["db"]; m.Phase != tt.phase || m.Exited != tt.exited {
				t.Errorf("phase %q, exited %+v; want %q, %+v", m.Phase, m.Exited, tt.phase, tt.exited)
			}
			wantNames := []lab.Name{"db"}
			if tt.phase == PhaseGone {
				wantNames = nil
			}
			if diff := cmp.Diff(wantNames, s.Names()); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestSpecKeepsEverythingOfAMachine(t *testing.T) {
	m := lab.Machine{
		Name: "web-1", Role: "web", Box: "base", CPUs: 2, Memory: lab.GiB, Disk: 4 * lab.GiB,
		DependsOn: []lab.Name{"db"}, Ports: []lab.Forward{{HostPort: 8080, GuestPort: 80}},
		Ready: []lab.Check{{Kind: lab.CheckHTTP, Port: 80, Path: "/", Status: 200, Timeout: time.Minute, Interval: time.Second}},
		User:  "lab", UserData: "#cloud-config\n",
		Replace: lab.DefaultReplace, OnShell: lab.ShellAllow,
	}
	raw, err := json.Marshal(SpecOf(m))
	if err != nil {
		t.Fatal(err)
	}
	var s Spec
	if err := json.Unmarshal(raw, &s); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(m, s.Machine("web-1"), cmpopts.EquateEmpty()); diff != "" {
		t.Error(diff)
	}
}

// What a lab was made from is read without the rest, damaged or not.
func TestOpened(t *testing.T) {
	l := open(t)
	if _, ok, err := l.Opened(); ok || err != nil {
		t.Errorf("of no ledger: %v, %v", ok, err)
	}
	first := Opened{Name: "shop", File: "/a/Labfile", Provider: "memory"}
	add(t, l, Record{Type: LabOpened}, first)
	next := first
	next.File, next.Folder = "/b/Labfile", Folder{Device: 1, Inode: 2, Born: 3}
	add(t, l, Record{Type: LabOpened}, next)
	add(t, l, Record{Type: MachineCreate, Machine: "web", Generation: 1}, Create{Why: []string{`"lab.opened"`}})
	data, err := os.ReadFile(l.path)
	if err != nil {
		t.Fatal(err)
	}
	for _, damage := range []string{"", "{\"type\":\"lab.opened\n", "\x00\"lab.opened\"\n"} {
		if err := os.WriteFile(l.path, append(data[:len(data):len(data)], damage...), 0o600); err != nil {
			t.Fatal(err)
		}
		if got, ok, err := l.Opened(); !ok || err != nil || !got.Equal(next) {
			t.Errorf("with %q: %+v, %v, %v", damage, got, ok, err)
		}
	}
}

// A machine that was to be stopped and could not be asked is what it was before; one whose
// power was cut says so until it runs again.
func TestFoldStops(t *testing.T) {
	l := open(t)
	add(t, l, Record{Type: MachineCreate, Machine: "web", Generation: 1}, Create{})
	add(t, l, Record{Type: MachineReady, Machine: "web", Generation: 1}, Ready{})
	phase := func(r Record, data any) Machine {
		t.Helper()
		r.Machine, r.Generation = "web", 1
		add(t, l, r, data)
		records, err := l.Read()
		if err != nil {
			t.Fatal(err)
		}
		s, err := Fold(records)
		if err != nil {
			t.Fatal(err)
		}
		return s.Machines["web"]
	}
	phase(Record{Type: MachineStop}, nil)
	phase(Record{Type: MachineStop}, nil) // once more, after an interruption
	if m := phase(Record{Type: MachineStays}, Stays{Why: "it is paused"}); m.Phase != PhaseReady {
		t.Errorf("it is %s", m.Phase)
	}
	phase(Record{Type: MachineStop}, nil)
	cut := Stopped{Forced: true, Why: "it is slow"}
	if m := phase(Record{Type: MachineStopped}, cut); m.Phase != PhaseStopped || m.Stopped != cut {
		t.Errorf("it is %s, %+v", m.Phase, m.Stopped)
	}
	if m := phase(Record{Type: MachineStays}, Stays{}); m.Phase != PhaseStopped {
		t.Errorf("it is %s", m.Phase)
	}
	phase(Record{Type: MachineStop}, nil)
	if m := phase(Record{Type: MachineStopped}, nil); m.Stopped != (Stopped{}) { // as older labs record it
		t.Errorf("it was stopped %+v", m.Stopped)
	}
}

func FuzzParse(f *testing.F) {
	l := Open(filepath.Join(f.TempDir(), "ledger.jsonl"))
	for n := range 3 {
		if _, err := l.Append(Record{Type: MachineCreate, Machine: "db", Generation: n}, Create{}); err != nil {
			f.Fatal(err)
		}
	}
	data, err := os.ReadFile(l.path)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data)
	f.Add([]byte("{}\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		records, err := parse("x", data)
		if err == nil && len(records) != strings.Count(string(data), "\n") {
			t.Errorf("%d records in %d lines", len(records), strings.Count(string(data), "\n"))
		}
		if _, err := Fold(records); err != nil {
			return
		}
		for _, r := range records {
			_ = r.Summary()
		}
	})
}

// All that is appended for one run of a command says so, and nothing else does.
func TestRun(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ledger.jsonl")
	one, two := Open(path), Open(path)
	for _, l := range []*Ledger{one, one, two} {
		add(t, l, Record{Type: MachineStop, Machine: "db", Generation: 1, Command: "lab restart"}, nil)
	}
	add(t, one, Record{Type: MachineExited, Machine: "db", Generation: 1}, nil)
	got, err := one.Read()
	if err != nil {
		t.Fatal(err)
	}
	if got[0].Run == "" || got[0].Run != got[1].Run || got[0].Run == got[2].Run || got[2].Run == "" || got[3].Run != "" {
		t.Errorf("the runs are %q, %q, %q and %q", got[0].Run, got[1].Run, got[2].Run, got[3].Run)
	}
}

func TestProxied(t *testing.T) {
	b := Open(filepath.Join(t.TempDir(), "ledger.jsonl"))
	var state State
	for i, c := range []struct {
		typ    Type
		number int
		data   any
		want   bool
		says   string
	}{
		{MachineCreate, 1, Create{}, false, ""},
		{MachineProxied, 1, Proxied{Written: true}, true, "web@1: is given the proxy settings of the host"},
		{MachineStart, 1, nil, true, ""},
		{MachineProxied, 1, Proxied{}, false, "web@1: has no proxy settings any more"},
		{MachineProxied, 1, Proxied{Written: true}, true, ""},
		{MachineCreate, 2, Create{}, false, ""},
	} {
		r, err := b.Append(Record{Type: c.typ, Machine: "web", Generation: c.number}, c.data)
		if err == nil {
			err = state.Apply(r)
		}
		if got := state.Machines["web"].Proxied; err != nil || got != c.want {
			t.Errorf("record %d: %v, %v; want %v", i, got, err, c.want)
		}
		if got := r.Summary(); c.says != "" && got != c.says {
			t.Errorf("record %d: %s", i, got)
		}
	}
}
