// SPDX-License-Identifier: Apache-2.0

package plan

import (
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/labfile/lab/internal/lab"
)

func TestReplaceStep(t *testing.T) {
	data := []lab.Volume{{Name: "pgdata"}}
	for _, tt := range []struct {
		name     string
		strategy lab.Strategy
		volumes  []lab.Volume
		state    State
		keep     int
		retired  []int
		failed   []int
		want     lab.Strategy
		why      string
		left     []int
	}{
		{"default", lab.StopFirst, nil, Running, 2, nil, nil, lab.StopFirst, "", nil},
		{"blue-green", lab.BlueGreen, nil, Running, 2, []int{4}, nil, lab.BlueGreen, "", nil},
		{"rolling", lab.Rolling, nil, Running, 2, []int{3, 4}, nil, lab.Rolling, "", []int{3}},
		{"none kept", lab.BlueGreen, nil, Running, 0, []int{4}, nil, lab.BlueGreen, "", []int{4, 5}},
		{"a failed one", lab.BlueGreen, nil, Running, 2, nil, []int{6}, lab.BlueGreen, "", []int{6}},
		{"stopped", lab.BlueGreen, nil, Stopped, 2, nil, nil, lab.StopFirst, NotRunning, nil},
		{"broken", lab.BlueGreen, nil, Broken, 2, []int{4}, nil, lab.StopFirst, NotRunning, []int{5}},
		{"volume", lab.BlueGreen, data, Running, 2, nil, nil, lab.StopFirst, "volume pgdata is written by one generation at a time", nil},
		{"volume, read only", lab.Rolling, []lab.Volume{{Name: "x", ReadOnly: true}}, Running, 2, nil, nil, lab.Rolling, "", nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := machine("web")
			m.Volumes, m.Replace = tt.volumes, lab.Replace{Strategy: tt.strategy, Keep: tt.keep}
			rec := lived(m, 5)
			rec.Retired, rec.Failed = tt.retired, tt.failed
			seen := []Observed{{Number: 5, State: tt.state}}
			for _, n := range append(tt.retired, tt.failed...) {
				seen = append(seen, Observed{Number: n, State: Stopped})
			}
			in := Input{
				Want: want(m), Recorded: map[lab.Name]Recorded{"web": rec},
				Observed: map[lab.Name][]Observed{"web": seen}, Rebuild: []lab.Name{"web"},
			}
			s := Make(in).Steps[0]
			if s.Action != Replace || s.Strategy != tt.want || s.StrategyWhy != tt.why {
				t.Errorf("got %+v", s)
			}
			if diff := cmp.Diff(tt.left, s.Leftovers); diff != "" {
				t.Error(diff)
			}
			var beyond []int // of those that gave way
			for _, n := range tt.left {
				if slices.Contains(tt.retired, n) {
					beyond = append(beyond, n)
				}
			}
			if !slices.Equal(s.Pruned, beyond) || len(beyond) > 0 && s.Kept != tt.keep {
				t.Errorf("pruned %v of %d, want %v of %d", s.Pruned, s.Kept, beyond, tt.keep)
			}
			in.Rebuild = nil
			if s := Make(in).Steps[0]; tt.state == Running && tt.keep == 2 && s.Leftovers != nil {
				t.Errorf("without a replacement %v is left over", s.Leftovers)
			}
		})
	}
}
