// SPDX-License-Identifier: Apache-2.0

//go:build e2e

package e2e

import (
	"crypto/sha256"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// The benchmarks measure what docs/performance.md reports. Each repeats what it
// measures itself and reports medians, so they are run once: -benchtime 1x.

// rounds is how often each thing is measured.
const rounds = 5

// median runs f several times and returns the median of what it returns.
func median(n int, f func() time.Duration) time.Duration {
	all := make([]time.Duration, n)
	for i := range all {
		all[i] = f()
	}
	slices.Sort(all)
	return all[n/2]
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// bench reports under names of our own only.
func bench(b *testing.B, f func(s *site), labfile string) { benchIn(b, accounts[0], f, labfile) }

func benchIn(b *testing.B, a *account, f func(s *site), labfile string) {
	s := a.world(b).debian(b).site(b, labfile)
	for b.Loop() {
		f(s)
	}
	b.ReportMetric(0, "ns/op")
}

// BenchmarkUp measures a cold "lab up" of one machine against a bare QEMU that
// boots the same box to the same point: the agent has taken its identity.
func BenchmarkUp(b *testing.B) {
	for _, box := range []string{"builtin/tiny", "builtin/debian-12"} {
		b.Run(filepath.Base(box), func(b *testing.B) {
			bench(b, func(s *site) {
				s.ok("up") // pins the box, warms the caches of both
				bare := newBare(s)
				s.ok("destroy", "--yes")
				var ups, bares []time.Duration
				for range rounds { // in turns, so that both meet the same weather
					r := s.lab("up")
					if r.code != 0 {
						s.Fatal(r)
					}
					s.ok("destroy", "--yes")
					ups, bares = append(ups, r.took), append(bares, bare.boot(s))
				}
				slices.Sort(ups)
				slices.Sort(bares)
				up, raw := ups[rounds/2], bares[rounds/2]
				b.ReportMetric(up.Seconds(), "s/up")
				b.ReportMetric(raw.Seconds(), "s/bare-qemu")
				b.ReportMetric(up.Seconds()/raw.Seconds(), "up/bare")
			}, "lab: bench\nmachines: {m: {box: "+box+"}}\n")
		})
	}
}

// BenchmarkCommands measures commands as whole processes, and the binary.
func BenchmarkCommands(b *testing.B) {
	bench(b, func(s *site) {
		s.ok("up")
		for _, c := range []struct {
			unit string
			args []string
		}{
			{"ms/help", []string{"--help"}},
			{"ms/status", []string{"status"}},
			{"ms/exec", []string{"exec", "m", "--", "true"}},
		} {
			b.ReportMetric(ms(median(4*rounds, func() time.Duration {
				r := s.lab(c.args...)
				if r.code != 0 {
					s.Fatal(r)
				}
				return r.took
			})), c.unit)
		}
		info, err := os.Stat(labBinary)
		if err != nil {
			s.Fatal(err)
		}
		b.ReportMetric(float64(info.Size())/1e6, "MB/binary")
		s.ok("destroy", "--yes")
	}, one)
}

// BenchmarkBoxAdd measures the way of a 1 GiB file into the store against
// reading it once with SHA-256.
func BenchmarkBoxAdd(b *testing.B) {
	bench(b, func(s *site) {
		path := s.write("disk.raw", "")
		f, err := os.OpenFile(path, os.O_WRONLY, 0)
		if err != nil {
			s.Fatal(err)
		}
		block := make([]byte, 1<<20)
		for i := range 1024 {
			sum := sha256.Sum256(block[:8+i%8]) // no two blocks alike, none compressible
			for j := 0; j < len(block); j += len(sum) {
				copy(block[j:], sum[:])
				sum = sha256.Sum256(sum[:])
			}
			if _, err := f.Write(block); err != nil {
				s.Fatal(err)
			}
		}
		if err := f.Close(); err != nil {
			s.Fatal(err)
		}
		sum := func() time.Duration {
			began := time.Now()
			out, err := s.command(b.Context(), nil, "sha256sum", path).Output()
			if err != nil || len(out) < 64 {
				s.Fatal(err)
			}
			return time.Since(began)
		}
		sum() // into the page cache
		plain := median(rounds, sum)
		add := median(rounds, func() time.Duration {
			fresh := []string{"XDG_DATA_HOME=" + filepath.Join(s.dir, "data")}
			r := s.startWith(fresh, "", "box", "add", "big", path).end()
			if r.code != 0 {
				s.Fatal(r)
			}
			if err := os.RemoveAll(filepath.Join(s.dir, "data")); err != nil {
				s.Fatal(err)
			}
			return r.took
		})
		b.ReportMetric(plain.Seconds(), "s/sha256sum")
		b.ReportMetric(add.Seconds(), "s/box-add")
		b.ReportMetric(add.Seconds()/plain.Seconds(), "add/sha256sum")
	}, one)
}

// BenchmarkTen brings up ten machines at once.
func BenchmarkTen(b *testing.B) {
	bench(b, func(s *site) {
		var memory int64
		up := median(rounds, func() time.Duration {
			r := s.lab("up")
			if r.code != 0 {
				s.Fatal(r)
			}
			memory = 0
			for _, p := range s.mine() {
				if p.is("qemu-system") {
					memory += pss(s, p.pid)
				}
			}
			s.ok("destroy", "--yes")
			return r.took
		})
		b.ReportMetric(up.Seconds(), "s/up")
		b.ReportMetric(float64(memory)/10/(1<<20), "MiB/machine")
	}, "lab: bench\nmachines: {m: {box: builtin/tiny, count: 10}}\n")
}

// pss is the memory of a process in bytes, its share of what it shares included
// (proc(5), smaps_rollup).
func pss(s *site, pid int) int64 {
	s.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		s.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		var kib int64
		if _, err := fmt.Sscanf(line, "Pss: %d kB", &kib); err == nil {
			return kib << 10
		}
	}
	s.Fatalf("process %d has no Pss: %s", pid, text)
	return 0
}

// BenchmarkSwitch measures the throughput of the lab's network.
func BenchmarkSwitch(b *testing.B) {
	bench(b, func(s *site) {
		s.ok("up")
		between := median(rounds, func() time.Duration { return sent(s, 64<<20) })
		port := s.machine("b").Ports[0].Host
		in := median(rounds, func() time.Duration {
			return received(s, 64<<20, func() {
				c, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", port))
				if err != nil {
					s.Fatal(err)
				}
				if _, err := io.CopyN(c, zeros{}, 64<<20); err != nil {
					s.Fatal(err)
				}
				c.Close()
			})
		})
		b.ReportMetric(rate(64<<20, between), "Mbit/s-guest-to-guest")
		b.ReportMetric(rate(64<<20, in), "Mbit/s-host-to-guest")
		s.ok("destroy", "--yes")
	}, pair)
}

// pair are two machines that talk to each other.
const pair = "lab: bench\nmachines:\n  a: {box: builtin/tiny}\n  b: {box: builtin/tiny, ports: [\"0:5000\"]}\n"

// rate is in Mbit/s.
func rate(size int, d time.Duration) float64 { return float64(size) * 8 / 1e6 / d.Seconds() }

// sent has machine a send bytes to b over one TCP connection.
func sent(s *site, size int) time.Duration {
	s.Helper()
	return received(s, size, func() {
		s.ok("exec", "a", "--", fmt.Sprintf("dd if=/dev/zero bs=65536 count=%d 2>/dev/null | nc b 5000", size>>16))
	})
}

// received has machine b count the bytes that send sends to its port 5000.
func received(s *site, size int, send func()) time.Duration {
	s.Helper()
	p := s.start("exec", "b", "--", "rm -f /tmp/open; mkfifo /tmp/open; nc -l -p 5000 <>/tmp/open | wc -c")
	s.wait("b listens", func() bool {
		return strings.Contains(s.ok("exec", "b", "--", "netstat -ltn"), ":5000 ")
	})
	began := time.Now()
	send()
	if r := p.end(); strings.TrimSpace(r.stdout) != fmt.Sprint(size) {
		s.Fatalf("of %d bytes arrived: %s", size, r)
	}
	return time.Since(began)
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

// BenchmarkReplace measures a replacement against a first "lab up" of the same
// machine, and counts what is lost of the requests through its forwarded port.
func BenchmarkReplace(b *testing.B) {
	for _, way := range []struct {
		name, keys string
		count      int
	}{
		{"stop-first", "replace: stop-first", 1},
		{"blue-green", "replace: {strategy: blue-green, drain: 1s}", 1},
		{"rolling", "count: 2, replace: {strategy: rolling, drain: 1s}", 2},
	} {
		b.Run(way.name, func(b *testing.B) {
			bench(b, func(s *site) {
				s.ok("up")
				var first, next []time.Duration
				answered, failed := 0, 0
				for range rounds {
					s.ok("destroy", "--yes")
					up := s.lab("up")
					if up.code != 0 {
						s.Fatal(up)
					}
					var ports []int
					for _, m := range s.status().Machines {
						ports = append(ports, m.Ports[0].Host)
					}
					load := newHammer("/", ports...)
					r := s.lab("replace", "--all")
					a, f, _ := load.stop()
					if r.code != 0 {
						s.Fatal(r)
					}
					answered, failed = answered+a, failed+f
					first, next = append(first, up.took), append(next, r.took)
				}
				slices.Sort(first)
				slices.Sort(next)
				b.ReportMetric(first[rounds/2].Seconds(), "s/up")
				b.ReportMetric(next[rounds/2].Seconds(), "s/replace")
				b.ReportMetric(next[rounds/2].Seconds()/first[rounds/2].Seconds(), "replace/up")
				b.ReportMetric(float64(answered), "answered")
				b.ReportMetric(float64(failed), "failed")
				s.ok("destroy", "--yes")
			}, "lab: bench\nmachines: {m: {box: builtin/tiny, ports: [\"0:80\"], ready: [{port: 80}], "+way.keys+"}}\n")
		})
	}
}

// BenchmarkDiff measures "lab diff" of a Debian machine with 30,000 files more than it
// comes with, on a disk of 4 GiB, against a walk in the guest that only looks at
// names, modes, owners, sizes and times, with all of that in its cache: a comparison
// would have to read contents, too.
func BenchmarkDiff(b *testing.B) {
	bench(b, func(s *site) {
		s.ok("up")
		s.ok("exec", "m", "--", "echo more >> /etc/motd; rm /opt/files/x00017; chmod 600 /opt/files/x00018")
		walk := func() time.Duration {
			r := s.lab("exec", "m", "--", "find / -xdev -printf '%p %m %u %g %s %T@\\n' | wc -l")
			var files int
			if _, err := fmt.Sscan(r.stdout, &files); err != nil || r.code != 0 || files < 30000 {
				s.Fatalf("%d files, %v: %s", files, err, r)
			}
			return r.took
		}
		walk() // into the guest's cache
		var walks, diffs []time.Duration
		for range rounds {
			walks = append(walks, walk())
			r := s.lab("diff", "m")
			if r.code != 2 || !strings.Contains(r.stdout, "/opt/files/x00017") || !strings.Contains(r.stdout, "/etc/motd") {
				s.Fatal(r)
			}
			diffs = append(diffs, r.took)
		}
		slices.Sort(walks)
		slices.Sort(diffs)
		b.ReportMetric(diffs[rounds/2].Seconds(), "s/diff")
		b.ReportMetric(walks[rounds/2].Seconds(), "s/walk-in-guest")
		b.ReportMetric(walks[rounds/2].Seconds()/diffs[rounds/2].Seconds(), "walk/diff")
		s.ok("destroy", "--yes")
	}, `lab: bench
machines:
  m:
    box: builtin/debian-12
    provision:
      - shell: mkdir /opt/files && cd /opt/files && seq 30000 | split -l 1 -a 5 -d
`)
}
