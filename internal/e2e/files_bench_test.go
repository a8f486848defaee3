// SPDX-License-Identifier: Apache-2.0

//go:build e2e

package e2e

import (
	"context"
	"crypto/rand"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"
)

// script runs a line of sh in the site's folder; $LAB is the program.
func (s *site) script(line string) time.Duration {
	s.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	start := time.Now()
	if out, err := s.command(ctx, []string{"LAB=" + labBinary}, "sh", "-c", line).CombinedOutput(); err != nil {
		s.Fatalf("%s: %v\n%s", line, err, out)
	}
	return time.Since(start)
}

// ratio measures two things in turns, so that both meet the same weather, and returns
// their medians.
func ratio(n int, a, b func() time.Duration) (time.Duration, time.Duration) {
	var as, bs []time.Duration
	for range n {
		as, bs = append(as, a()), append(bs, b())
	}
	slices.Sort(as)
	slices.Sort(bs)
	return as[n/2], bs[n/2]
}

// smallFiles makes a folder of so many files.
func smallFiles(s *site, dir string, n int) {
	s.Helper()
	dir = filepath.Join(s.dir, dir)
	if err := os.Mkdir(dir, 0o755); err != nil {
		s.Fatal(err)
	}
	for i := range n {
		if err := os.WriteFile(fmt.Sprintf("%s/f%d", dir, i), fmt.Appendf(nil, "file %d\n", i), 0o644); err != nil {
			s.Fatal(err)
		}
	}
	if err := s.w.own(dir); err != nil {
		s.Fatal(err)
	}
}

// BenchmarkCopy measures "lab cp" against tar through "lab exec", both ways: to a machine
// with lab-agent, and to one that has what a distribution publishes.
func BenchmarkCopy(b *testing.B) {
	b.Run("agent", func(b *testing.B) {
		bench(b, func(s *site) { copies(b, s, rounds) }, one)
	})
	b.Run("openssh", func(b *testing.B) {
		bench(b, func(s *site) {
			s.cloudImage("disk.qcow2")
			copies(b, s, 3) // of which each takes seconds
		}, "lab: bench\nboxes: {cloud: {from: ./disk.qcow2}}\nmachines: {m: {box: cloud}}\n")
	})
}

func copies(b *testing.B, s *site, n int) {
	s.ok("up")
	smallFiles(s, "small", 1000)
	content := make([]byte, 10e6)
	_, _ = rand.Read(content) // never fails
	s.write("big", string(content))
	for _, c := range []struct{ unit, what string }{{"1000-files", "small"}, {"10-MB", "big"}} {
		cp, pipe := ratio(n,
			func() time.Duration {
				s.script(`"$LAB" exec m -- 'rm -rf /root/cp /root/pipe; mkdir /root/cp /root/pipe'; rm -rf cp pipe; mkdir cp pipe`) // what replaces files takes longer
				return s.script(`"$LAB" cp ` + c.what + ` m:/root/cp/`)
			},
			func() time.Duration {
				return s.script(`tar c ` + c.what + ` | "$LAB" exec m -- tar x -C /root/pipe`)
			})
		b.ReportMetric(cp.Seconds(), "s/up-"+c.unit)
		b.ReportMetric(cp.Seconds()/pipe.Seconds(), "cp/pipe-up-"+c.unit)
		cp, pipe = ratio(n,
			func() time.Duration {
				s.script(`rm -rf cp pipe; mkdir cp pipe`)
				return s.script(`"$LAB" cp m:/root/cp/` + c.what + ` cp/`)
			},
			func() time.Duration {
				return s.script(`"$LAB" exec m -- tar c -C /root/pipe ` + c.what + ` | tar x -C pipe`)
			})
		b.ReportMetric(cp.Seconds(), "s/down-"+c.unit)
		b.ReportMetric(cp.Seconds()/pipe.Seconds(), "cp/pipe-down-"+c.unit)
	}
	s.ok("destroy", "--yes")
}

// trees makes folders trees/NAME with 2,000 small files each, and a second name for every
// file of trees/plain: of such files nothing is kept, so that each is asked for. They are
// the yardstick.
func (s *site) trees(names ...string) {
	s.Helper()
	for _, name := range append(names, "plain") {
		s.script(`mkdir -p trees/` + name + ` && cd trees/` + name + ` && for d in $(seq 20); do
			mkdir d$d; for i in $(seq 100); do echo "file $i of $d" >d$d/f$i; done
		done`)
	}
	s.script(`cp -al trees/plain links`)
}

// looks has a program look at each of the folders and, after each, at the yardstick, and
// reports the medians: how long it took, and against the yardstick. Each folder is looked
// at once: what is kept of it would be there for the next look. It returns the medians of
// the folders and of the yardstick.
func looks(b *testing.B, folders, kinds []string, look func(folder string) []time.Duration) (ours, uncached []time.Duration) {
	took, plain := make([][]time.Duration, len(kinds)), make([][]time.Duration, len(kinds))
	for _, folder := range folders {
		ours, theirs := look(folder), look("plain")
		for k := range kinds {
			took[k], plain[k] = append(took[k], ours[k]), append(plain[k], theirs[k])
		}
	}
	for k, kind := range kinds {
		slices.Sort(took[k])
		slices.Sort(plain[k])
		m, u := took[k][len(took[k])/2], plain[k][len(plain[k])/2]
		b.ReportMetric(m.Seconds(), "s/"+kind)
		b.ReportMetric(m.Seconds()/u.Seconds(), kind+"/uncached")
		ours, uncached = append(ours, m), append(uncached, u)
	}
	return ours, uncached
}

// BenchmarkMount measures the first and the second look at 2,000 files of a mount, and
// reading a large one against "lab cp".
func BenchmarkMount(b *testing.B) {
	bench(b, func(s *site) {
		folders := []string{"one", "two", "three"}
		s.trees(folders...)
		s.script(`head -c 20000000 /dev/urandom >trees/big`)
		s.ok("up")
		looks(b, folders, []string{"first", "second"}, func(folder string) []time.Duration {
			// As a build does it: find what there is, and read it; then see what has changed.
			first := s.script(`"$LAB" exec m -- 'cd /mnt/trees/` + folder + `; find . -type f >/root/index; xargs cat </root/index >/dev/null'`)
			second := s.script(`"$LAB" exec m -- 'cd /mnt/trees/` + folder + `; xargs stat </root/index >/dev/null; find . | wc -l'`)
			return []time.Duration{first, second}
		})
		read, cp := ratio(rounds,
			func() time.Duration { return s.script(`"$LAB" exec m -- 'cat /mnt/trees/big >/dev/null'`) },
			func() time.Duration { return s.script(`"$LAB" cp trees/big m:/root/big`) })
		b.ReportMetric(20/read.Seconds(), "MB/s-read")
		b.ReportMetric(cp.Seconds()/read.Seconds(), "read/cp-speed")
		s.ok("destroy", "--yes")
	}, "lab: bench\nmachines:\n  m: {box: builtin/tiny, mounts: [{from: trees, to: /mnt/trees}]}\n")
}

// BenchmarkMountGit measures "git status" of a repository with 2,000 files in a mount:
// the first and the second one when the index is one that this host wrote, and the first one when
// git believes nothing in the index, because the files belong to somebody else, and
// reads every file. The program is this host's, with its libraries.
func BenchmarkMountGit(b *testing.B) {
	bench(b, func(s *site) {
		folders := []string{"one", "two", "three"}
		s.trees(folders...)
		s.script(`mkdir git && cp "$(readlink -f "$(command -v git)")" git/git && ldd git/git | grep -o '/[^ ]*' | xargs -I{} cp -L {} git/ && mv git/ld-linux* git/loader`)
		s.script(`for r in one two three plain; do (cd trees/$r && git init -q . && git add . &&
			git -c user.name=n -c user.email=e@example.org commit -qm x && git status --porcelain) || exit; done`)
		s.ok("up")
		status := func(folder string) string {
			return `"$LAB" exec m -- 'set -e; out=$(/opt/git/loader --library-path /opt/git /opt/git/git -c "safe.directory=*" -C ` + folder + ` status --porcelain); [ -z "$out" ]'`
		}
		ours, uncached := looks(b, folders, []string{"git-first", "git-second", "git-reading"}, func(folder string) []time.Duration {
			return []time.Duration{
				s.script(status("/mnt/trees/" + folder)), s.script(status("/mnt/trees/" + folder)), s.script(status("/mnt/other/" + folder)),
			}
		})
		// Inode numbers of the guest's own had every first one read all files.
		b.ReportMetric(ours[0].Seconds()/uncached[2].Seconds(), "git-first/uncached-reading")
		s.ok("destroy", "--yes")
	}, `lab: bench
machines:
  m:
    box: builtin/debian-12
    provision: [{file: {from: git, to: /opt/git, mode: "0755"}}]
    mounts: [{from: trees, to: /mnt/trees}, {from: trees, to: /mnt/other, owner: "4242:4242"}]
`)
}
