// SPDX-License-Identifier: Apache-2.0

//go:build e2e

package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// byHand is what an operator might do on a machine, and drifted what "lab diff" has
// to say about it: that and nothing else.
const byHand = `set -e
echo appended >> /etc/profile
chmod 0640 /etc/hosts
chown 1:1 /etc/shells
rm -r /etc/doomed
mkdir -m 0700 /srv/dir
echo inner > /srv/dir/inner
ln -s /etc/hosts /srv/link
touch -r /etc/secretive /tmp/time
sed -i s/before/behind/ /etc/secretive
touch -r /tmp/time /etc/secretive
head -c 100000 /dev/zero > /srv/blob
printf -- '-----BEGIN PRIVATE KEY-----\n' > /srv/key
printf 'a tab\t, $PATH, ${HOME}, $$ and no end' > '/srv/odd name'
: > /srv/empty`

var drifted = []string{
	"D /etc/doomed", "D /etc/doomed/file", "M /etc/hosts mode", "M /etc/profile content",
	"M /etc/secretive content", "M /etc/shells owner", "A /srv/blob", "A /srv/dir", "A /srv/dir/inner",
	"A /srv/empty", "A /srv/key", "A /srv/link", "A /srv/odd name",
}

// drift runs "lab diff" and returns its changes in short.
func (s *site) drift(args ...string) []string {
	s.Helper()
	r := s.lab(append([]string{"diff", "--json"}, args...)...)
	var d struct {
		Changes []struct {
			Op, Path string
			What     []string
		}
	}
	if err := json.Unmarshal([]byte(r.stdout), &d); err != nil {
		s.Fatalf("%v: %s", err, r)
	}
	if want := min(len(d.Changes), 1) * 2; r.code != want {
		s.Errorf("%d changes, and the exit code is not %d: %s", len(d.Changes), want, r)
	}
	var all []string
	for _, c := range d.Changes {
		all = append(all, strings.TrimSpace(fmt.Sprintf("%s %s %s", c.Op, c.Path, strings.Join(c.What, ","))))
	}
	return all
}

func driftLab(box, more string) string {
	return fmt.Sprintf(`lab: drift
machines:
  m:
    box: %s
    provision:
      - shell: mkdir /etc/doomed; echo x > /etc/doomed/file; echo before > /etc/secretive
%s`, box, more)
}

// TestDrift edits machines by hand and reads their disks from outside: what was done
// is listed, and nothing else, right after a boot as well as later. As provision
// steps it makes the next generation what the one that was edited is.
func TestDrift(t *testing.T) { drifts(t, ordinary(t), "builtin/tiny") }

// TestDriftOfDebian does the same with a system that does more by itself.
func TestDriftOfDebian(t *testing.T) { drifts(t, ordinary(t).debian(t), "builtin/debian-12") }

func drifts(t *testing.T, w *world, box string) {
	s := w.site(t, driftLab(box, ""))
	s.ok("up")
	pristine := func(when string) {
		t.Helper()
		if got := s.drift("m"); got != nil {
			t.Errorf("%s: %q", when, got)
		}
	}
	pristine("right after the birth")
	s.ok("stop", "m")
	pristine("stopped")
	s.ok("start", "m")
	// What the system does of its own accord, it has done when its start is over.
	s.ok("exec", "m", "--", "! command -v systemctl || systemctl is-system-running --wait; sync")
	pristine("some time after a restart")

	s.ok("exec", "m", "--", byHand)
	if got := s.drift("m"); !slices.Equal(got, drifted) {
		t.Errorf("drift:\n got %q\nwant %q", got, drifted)
	}
	if r := s.lab("diff", "m", "--content"); r.code != 2 || !strings.Contains(r.stdout, "\n-before\n+behind\n") {
		t.Errorf("the text of the drift: %s", r)
	} else if strings.Contains(r.stdout, "BEGIN PRIVATE KEY") {
		t.Errorf("a secret was shown: %s", r)
	}
	// A stopped machine has the same drift.
	s.ok("stop", "m")
	if got := s.drift("m"); !slices.Equal(got, drifted) {
		t.Errorf("drift of the stopped machine:\n got %q\nwant %q", got, drifted)
	}
	s.ok("start", "m")

	r := s.lab("diff", "m", "--as-provision")
	if r.code != 2 || strings.Contains(r.stdout, "BEGIN PRIVATE KEY") ||
		!strings.Contains(r.stdout, `# "/srv/key" has secrets`) || !strings.Contains(r.stdout, `# "/srv/blob" (100000 bytes)`) {
		t.Errorf("as provision steps: %s", r)
	}
	if r = s.lab("diff", "m", "--as-provision", "--files", filepath.Join(s.dir, "by-hand")); r.code != 2 {
		t.Fatal(r)
	}
	if b, err := os.ReadFile(filepath.Join(s.dir, "by-hand/srv/blob")); err != nil || string(b) != strings.Repeat("\x00", 100000) {
		t.Errorf("the file that was kept has %d bytes: %v", len(b), err)
	}
	s.write("Labfile", driftLab(box, r.stdout))
	s.ok("up", "--yes")
	if m := s.machine("m"); m.Generation != 2 {
		t.Fatalf("not replaced: %+v", m)
	}
	pristine("with the drift in the Labfile")
	// lab writes /etc/hosts at each birth, and the key was withheld.
	got := slices.DeleteFunc(s.drift("m@1", "m@2"), func(c string) bool {
		return strings.HasPrefix(c, "M /etc/hosts ") || strings.Contains(c, "ssh") || strings.Contains(c, "dropbear") || strings.Contains(c, " /var/lib/lab-agent/")
	})
	if want := []string{"D /srv/key"}; !slices.Equal(got, want) {
		t.Errorf("from the machine that was edited to the one born of its drift: %q, want %q", got, want)
	}
}

// TestDriftOfReplicas compares machines that should be alike, and taints the odd one.
func TestDriftOfReplicas(t *testing.T) {
	s := ordinary(t).site(t, "lab: replicas\nmachines: {web: {box: builtin/tiny, count: 2}}\n")
	s.ok("up")
	twins := s.drift("web-1", "web-2")
	for _, c := range twins {
		if !strings.HasPrefix(c, "M /etc/host") && !strings.Contains(c, "ssh") && !strings.Contains(c, "dropbear") && !strings.Contains(c, " /var/lib/lab-agent/") {
			t.Errorf("replicas differ in more than who they are: %q", c)
		}
	}
	s.ok("exec", "web-2", "--", "echo odd > /srv/odd")
	want := append(slices.Clone(twins), "A /srv/odd")
	byPath := func(a, b string) int { return strings.Compare(a[2:], b[2:]) }
	slices.SortFunc(want, byPath)
	if got := s.drift("web-1", "web-2"); !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	s.fails(3, []string{"without a generation"}, "diff", "web-2@1", "--taint")
	s.fails(2, nil, "diff", "web-2", "--taint")
	if p := s.lab("plan"); p.code != 2 || !strings.Contains(p.stdout, "drift: 1 paths changed") || !strings.Contains(p.stdout, "web-2") {
		t.Errorf("the plan for a machine that drifted: %s", p)
	}
	s.fails(3, []string{"web-9"}, "diff", "web-9")
}

// TestDriftAsked compares machines whose disk can't be read from outside, since their
// ext4 has a feature that is only for kernels: the guest is asked, and lab says so.
func TestDriftAsked(t *testing.T) {
	s := ordinary(t).site(t, `lab: asked
machines:
  m:
    box: builtin/tiny
    provision:
      # The feature "encrypt", in the superblock that the kernel writes at the end.
      - shell: |
          mkdir /etc/doomed; echo x > /etc/doomed/file; echo before > /etc/secretive
          printf '\001' | dd of=/dev/vda bs=1 seek=1122 conv=notrunc
`)
	r := s.lab("up")
	if r.code != 0 || !strings.Contains(r.stderr, "listing its files") {
		t.Fatal(r)
	}
	if got := s.drift("m"); got != nil {
		t.Errorf("right after the birth: %q", got)
	}
	s.ok("stop", "m")
	s.fails(1, []string{"does not run", "lab start m"}, "diff", "m")
	s.ok("start", "m")
	if got := s.drift("m"); got != nil {
		t.Errorf("after a restart: %q", got)
	}
	s.ok("exec", "m", "--", byHand)
	if got := s.drift("m"); !slices.Equal(got, drifted) {
		t.Errorf("drift:\n got %q\nwant %q", got, drifted)
	}
	r = s.lab("diff", "m", "--content")
	if r.code != 2 || !strings.Contains(r.stderr, "m@1 at birth, m@1: the guest was asked") || !strings.Contains(r.stderr, "0x10000") ||
		!strings.Contains(r.stdout, `"/etc/secretive" was changed; what was in it was not kept`) || !strings.Contains(r.stdout, "\n+behind\n") {
		t.Errorf("the text of the drift: %s", r)
	}
	if strings.Contains(r.stdout, "BEGIN PRIVATE KEY") {
		t.Errorf("a secret was shown: %s", r)
	}
	r = s.lab("diff", "m", "--as-provision", "--files", filepath.Join(s.dir, "by-hand"))
	if r.code != 2 || !strings.Contains(r.stdout, "content: |\n            behind\n") {
		t.Errorf("as provision steps: %s", r)
	}
	if b, err := os.ReadFile(filepath.Join(s.dir, "by-hand/srv/blob")); err != nil || string(b) != strings.Repeat("\x00", 100000) {
		t.Errorf("the file that was kept has %d bytes: %v", len(b), err)
	}
	s.ok("replace", "m", "--yes")
	r = s.lab("diff", "m@1", "m@2")
	if r.code > 2 || !strings.Contains(r.stderr, "m@1 at birth, m@2: the guest was asked") || strings.Contains(r.stdout, "/srv/blob") {
		t.Errorf("two generations: %s", r)
	}
}
