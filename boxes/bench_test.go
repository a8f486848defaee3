// SPDX-License-Identifier: Apache-2.0

package boxes_test

import (
	"crypto/rand"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/labfile/lab/boxes"
)

// BenchmarkIngest adds a disk of 1 GiB of random bytes to a store and, for each
// time it does so, runs sha256sum over the same file. It reports the medians and
// their ratio, "x/sha256sum".
func BenchmarkIngest(b *testing.B) {
	path := filepath.Join(b.TempDir(), "disk.raw")
	f, err := os.Create(path)
	if err != nil {
		b.Fatal(err)
	}
	if _, err := io.CopyN(f, rand.Reader, 1<<30); err != nil {
		b.Fatal(err)
	}
	if err := f.Close(); err != nil {
		b.Fatal(err)
	}
	b.SetBytes(1 << 30)
	var ingest, sum []time.Duration
	for b.Loop() {
		b.StopTimer()
		start := time.Now()
		if out, err := exec.Command("sha256sum", path).CombinedOutput(); err != nil {
			b.Fatalf("%v\n%s", err, out)
		}
		sum = append(sum, time.Since(start))
		dir, err := os.MkdirTemp(b.TempDir(), "store-*")
		if err != nil {
			b.Fatal(err)
		}
		b.StartTimer()

		start = time.Now()
		store, err := boxes.Open(dir)
		if err != nil {
			b.Fatal(err)
		}
		if _, err := store.Ingest(b.Context(), boxes.Ingredients{Disk: path}, "bench"); err != nil {
			b.Fatal(err)
		}
		ingest = append(ingest, time.Since(start))

		b.StopTimer()
		if err := os.RemoveAll(dir); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
	}
	b.ReportMetric(median(ingest).Seconds(), "s/ingest")
	b.ReportMetric(median(sum).Seconds(), "s/sha256sum")
	b.ReportMetric(median(ingest).Seconds()/median(sum).Seconds(), "x/sha256sum")
}

func median(d []time.Duration) time.Duration {
	slices.Sort(d)
	return d[len(d)/2]
}

// BenchmarkGet is what every `lab up` pays for each box.
func BenchmarkGet(b *testing.B) {
	path := filepath.Join(b.TempDir(), "disk.raw")
	if err := os.WriteFile(path, make([]byte, 1<<20), 0o600); err != nil {
		b.Fatal(err)
	}
	dir := b.TempDir()
	store, err := boxes.Open(dir)
	if err != nil {
		b.Fatal(err)
	}
	if _, err := store.Ingest(b.Context(), boxes.Ingredients{Disk: path}, "bench"); err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		store, err := boxes.Open(dir)
		if err != nil {
			b.Fatal(err)
		}
		if _, err := store.Get(b.Context(), "bench"); err != nil {
			b.Fatal(err)
		}
	}
}
