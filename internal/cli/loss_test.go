// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"testing"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/plan"
)

func TestLossOf(t *testing.T) {
	for _, tc := range []struct {
		name  string
		steps []plan.Step
		want  string
	}{
		{"nothing", []plan.Step{{Machine: "db", Action: plan.Create, Next: 1}, {Machine: "web", Action: plan.Keep, Generation: 1, Leftovers: []int{9}}}, ""},
		{
			"one is kept",
			[]plan.Step{{Machine: "web", Action: plan.Replace, Generation: 2, Next: 3, Leftovers: []int{9}}},
			"web@2 is stopped; its disk is kept.",
		},
		{"one that was asked for", []plan.Step{{Machine: "named", Action: plan.Replace, Generation: 2, Next: 3}}, ""},
		{
			"one that was asked for, with its disk",
			[]plan.Step{{Machine: "named", Action: plan.Replace, Generation: 2, Next: 3, Leftovers: []int{2}}},
			"named@2 is replaced; its disk is lost.",
		},
		{
			"a retired one goes",
			[]plan.Step{{Machine: "web", Action: plan.Replace, Generation: 3, Next: 4, Leftovers: []int{1}}},
			"web@3 is stopped; its disk is kept. web@1 is removed; its disk is lost.",
		},
		{
			"a retired one of one that was asked for",
			[]plan.Step{{Machine: "named", Action: plan.Replace, Generation: 3, Next: 4, Leftovers: []int{1}}},
			"named@1 is removed; its disk is lost.",
		},
		{
			"all retired ones go",
			[]plan.Step{{Machine: "web", Action: plan.Keep, Generation: 3, Leftovers: []int{1, 2}}, {Machine: "db", Action: plan.Start, Generation: 2, Leftovers: []int{1}}},
			"web@1, web@2 and db@1 are removed; their disks are lost.",
		},
		{
			"a machine with its retired ones",
			[]plan.Step{{Machine: "web", Action: plan.Destroy, Generation: 3, Leftovers: []int{1, 2, 3, 9}}},
			"web@1, web@2 and web@3 are destroyed; their disks are lost.",
		},
		{
			"the present one never became ready",
			[]plan.Step{{Machine: "web", Action: plan.Replace, Generation: 9, Next: 10, Leftovers: []int{9}}},
			"web@9 is replaced; its disk is lost.",
		},
		{
			"everything",
			[]plan.Step{
				{Machine: "a", Action: plan.Replace, Generation: 1, Next: 2},
				{Machine: "b", Action: plan.Replace, Generation: 4, Next: 5},
				{Machine: "c", Action: plan.Replace, Generation: 1, Next: 2, Leftovers: []int{1}},
				{Machine: "d", Action: plan.Destroy, Generation: 7, Leftovers: []int{7}},
				{Machine: "e", Action: plan.Destroy},
			},
			"a@1 and b@4 are stopped; their disks are kept. c@1 is replaced; its disk is lost. d@7 and e are destroyed; their disks are lost.",
		},
	} {
		got := lossOf(plan.Plan{Steps: tc.steps}, func(m lab.Name) bool { return m == "named" },
			func(g lab.Generation) bool { return g.Number == 9 })
		if got != tc.want {
			t.Errorf("%s: got %q, want %q", tc.name, got, tc.want)
		}
	}
}
