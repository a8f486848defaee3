// SPDX-License-Identifier: Apache-2.0

package labfile

import (
	"errors"
	"fmt"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/verify"
)

// FuzzParse finds that any input is a sound lab or a list of problems.
func FuzzParse(f *testing.F) {
	for _, pattern := range []string{"testdata/*/*.yaml", "starter.yaml", "../../Labfile.example"} {
		files, err := filepath.Glob(pattern)
		if err != nil || len(files) == 0 {
			f.Fatalf("no seeds in %s: %v", pattern, err)
		}
		for _, file := range files {
			data, err := readFile(file)
			if err != nil {
				f.Fatal(err)
			}
			f.Add(data)
		}
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		o := testOptions()
		o.Vars = nil
		l, err := Parse("/x/Labfile", data, o)
		if err != nil {
			checkProblems(t, err)
			return
		}
		checkLab(t, l)
		again, err := Parse("/x/Labfile", data, o)
		if err != nil || !cmp.Equal(l, again) {
			t.Errorf("the same file is another lab the second time: %v\n%s", err, cmp.Diff(l, again))
		}
	})
}

func checkProblems(t *testing.T, err error) {
	t.Helper()
	var problems *Problems
	if !errors.As(err, &problems) || len(problems.List) == 0 || len(problems.List) > maxProblems {
		t.Fatalf("got %#v, want *Problems", err)
	}
	for i, p := range problems.List {
		if p.Line < 1 || p.Column < 1 || p.Message == "" {
			t.Errorf("%+v has no place or says nothing", p)
		}
		if before := problems.List[max(i-1, 0)]; before.Line > p.Line || before.Line == p.Line && before.Column > p.Column {
			t.Errorf("%v stands before %v", before, p)
		}
	}
}

// checkLab checks what the rest of lab relies on.
func checkLab(t *testing.T, l *lab.Lab) {
	t.Helper()
	boxes := map[string]bool{}
	for _, b := range l.Boxes {
		if b.Name == "" || b.From == "" || boxes[b.Name] {
			t.Errorf("box %+v", b)
		}
		boxes[b.Name] = true
	}
	if !lab.ValidLabel(l.Name) || len(l.Machines) == 0 || len(l.Machines) > maxMachines {
		t.Errorf("lab %q with %d machines", l.Name, len(l.Machines))
	}
	place := map[lab.Name]int{}
	for i, m := range l.Machines {
		if _, dup := place[m.Name]; dup || !lab.ValidLabel(string(m.Name)) {
			t.Errorf("machine %q", m.Name)
		}
		place[m.Name] = i
	}
	host := map[string]bool{}
	waits := map[lab.Name]int{}
	for _, m := range l.Machines {
		if !boxes[m.Box] || m.CPUs < 1 || m.Memory < 16*lab.MiB || m.Memory%lab.MiB != 0 || m.Disk < 0 || m.Disk%lab.MiB != 0 {
			t.Errorf("machine %+v", m)
		}
		for _, p := range m.Ports {
			port := fmt.Sprint(p.HostPort, p.UDP)
			if p.GuestPort == 0 || p.HostPort != 0 && host[port] {
				t.Errorf("%s forwards %v", m.Name, p)
			}
			host[port] = true
		}
		for _, c := range m.Ready {
			if c.Timeout <= 0 || c.Interval <= 0 || c.String() == "" {
				t.Errorf("%s checks %+v", m.Name, c)
			}
		}
		for _, c := range m.Tests {
			if c.Kind == "" || c.Subject == "" || c.Timeout <= 0 || c.Interval <= 0 || c.Retries < 0 || len(c.Want) == 0 {
				t.Errorf("%s tests %+v", m.Name, c)
			}
			for _, w := range c.Want {
				// What is accepted here must be possible to find out.
				for _, f := range []verify.Fact{{Text: "1"}, {Text: "a\nb\n", Lines: true}, {Items: []string{"a", "1"}, List: true}} {
					if _, err := verify.Match(f, w.Match); err != nil || w.Match.String() == "" {
						t.Errorf("%s: %s of %s: %v", m.Name, w.Attribute, c, err)
					}
				}
			}
		}
		for _, d := range m.DependsOn {
			if _, ok := place[d]; !ok {
				t.Errorf("%s depends on %q", m.Name, d)
			}
		}
		waits[m.Name] = len(m.DependsOn)
	}
	// Starting what waits for nothing must at last start everything.
	for started := true; started; {
		started = false
		for name, n := range waits {
			if n > 0 {
				continue
			}
			started = true
			delete(waits, name)
			for _, m := range l.Machines {
				for _, d := range m.DependsOn {
					if d == name {
						waits[m.Name]--
					}
				}
			}
		}
	}
	if len(waits) > 0 {
		t.Errorf("a cycle among %v", waits)
	}
}

// FuzzLock finds that any input is a lock that is written and read back the same,
// or a list of problems.
func FuzzLock(f *testing.F) {
	good, err := renderLock(testLock())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add([]byte("version: 1\n"))
	f.Add([]byte("version: 2\nboxes: []\n"))
	f.Add([]byte("version: 1\nboxes: {\"a: \\n b\": {from: \"\\u2028\", arch: a, digest: sha256:0}}\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		lk, err := parseLock("Labfile.lock", data)
		if err != nil {
			checkProblems(t, err)
			return
		}
		out, err := renderLock(lk)
		if err != nil {
			t.Fatalf("what was read cannot be written: %v\n%+v", err, lk)
		}
		back, err := parseLock("Labfile.lock", out)
		if err != nil || !cmp.Equal(lk, back) {
			t.Errorf("%v\n%s", err, cmp.Diff(lk, back))
		}
	})
}
