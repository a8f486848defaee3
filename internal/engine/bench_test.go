// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"fmt"
	"testing"
	"time"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/ledger"
)

// BenchmarkPlan plans a lab of 50 machines that are all as wanted, on the provider in
// memory. The baseline is what cannot be saved: reading the ledger, checking its
// chain and folding it.
func BenchmarkPlan(b *testing.B) {
	bench := newBench(b)
	l := bench.open()
	var machines []lab.Machine
	for n := range 50 {
		machines = append(machines, machine(lab.Name(fmt.Sprintf("m-%d", n+1))))
	}
	want := bench.want(machines...)
	if _, err := l.Up(b.Context(), want, UpOptions{}); err != nil {
		b.Fatal(err)
	}
	var planning, reading time.Duration
	for b.Loop() {
		began := time.Now()
		p, err := l.Plan(b.Context(), want, UpOptions{})
		planning += time.Since(began)
		if err != nil || p.Changes() || len(p.Steps) != 50 {
			b.Fatalf("%d steps, changes: %v, %v", len(p.Steps), p.Changes(), err)
		}
		began = time.Now()
		records, err := ledger.Open(bench.Dirs.Ledger(l.ID())).Read()
		if err == nil {
			_, err = ledger.Fold(records)
		}
		reading += time.Since(began)
		if err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(planning.Microseconds())/1000/float64(b.N), "ms/plan")
	b.ReportMetric(float64(planning)/float64(reading), "x-ledger")
}
