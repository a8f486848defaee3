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

// BenchmarkMount measures the first and the second look at 2,000 files of a mount, and
// reading a large one. What it is compared with is the same folder whose files have a
// second name each: of those nothing is kept, so that every file is asked for.
func BenchmarkMount(b *testing.B) {
	bench(b, func(s *site) {
		s.script(`mkdir -p trees/leased trees/plain links && cd trees/leased && for d in $(seq 20); do
			mkdir d$d ../plain/d$d ../../links/d$d
			for i in $(seq 100); do echo "file $i" >d$d/f$i; echo "file $i" >../plain/d$d/f$i; ln ../plain/d$d/f$i ../../links/d$d/f$i; done
		done; head -c 20000000 /dev/urandom >../big`)
		s.ok("up")
		look := func(folder string) (first, second time.Duration) {
			// As "git status" does it: what the index names, then what else there is.
			first = s.script(`"$LAB" exec m -- 'cd /mnt/trees/` + folder + `; find . -type f >/root/index; xargs cat </root/index >/dev/null'`)
			second = s.script(`"$LAB" exec m -- 'cd /mnt/trees/` + folder + `; xargs stat </root/index >/dev/null; find . | wc -l'`)
			return first, second
		}
		first, second := look("leased")
		firstPlain, secondPlain := look("plain")
		b.ReportMetric(first.Seconds(), "s/first")
		b.ReportMetric(first.Seconds()/firstPlain.Seconds(), "first/uncached")
		b.ReportMetric(second.Seconds(), "s/second")
		b.ReportMetric(second.Seconds()/secondPlain.Seconds(), "second/uncached")
		read, cp := ratio(rounds,
			func() time.Duration { return s.script(`"$LAB" exec m -- 'cat /mnt/trees/big >/dev/null'`) },
			func() time.Duration { return s.script(`"$LAB" cp trees/big m:/root/big`) })
		b.ReportMetric(20/read.Seconds(), "MB/s-read")
		b.ReportMetric(cp.Seconds()/read.Seconds(), "read/cp-speed")
		s.ok("destroy", "--yes")
	}, "lab: bench\nmachines:\n  m: {box: builtin/tiny, mounts: [{from: trees, to: /mnt/trees}]}\n")
}
