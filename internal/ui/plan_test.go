// SPDX-License-Identifier: Apache-2.0

package ui

import (
	"bytes"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/plan"
)

func TestPlan(t *testing.T) {
	p := plan.Plan{Lab: "shop-1f3a9c2b", Steps: []plan.Step{
		{Machine: "db", Action: plan.Keep, Generation: 1},
		{Machine: "cache", Action: plan.Start, Generation: 2, Reasons: []string{"it is stopped"}},
		{Machine: "web-1", Action: plan.Replace, Generation: 3, Next: 4, Leftovers: []int{3}, Reasons: []string{"memory: 128MiB -> 256MiB"}, DependsOn: []lab.Name{"db"}},
		{Machine: "blue", Action: plan.Replace, Generation: 3, Next: 4, Strategy: lab.BlueGreen, Reasons: []string{"tainted"}},
		{Machine: "pg", Action: plan.Replace, Generation: 3, Next: 4, Strategy: lab.StopFirst, StrategyWhy: "volume pgdata is written by one generation at a time"},
		{Machine: "off", Action: plan.Replace, Generation: 3, Next: 4, Strategy: lab.StopFirst, StrategyWhy: plan.NotRunning},
		{Machine: "web-2", Action: plan.Create, Next: 1, Reasons: []string{"there is none"}},
		{Machine: "api", Action: plan.Keep, Generation: 1, Changes: []string{"port 8080:80 added"}, Leftovers: []int{2, 5, 6}, Pruned: []int{5, 6}, Kept: 2},
		{Machine: "old", Action: plan.Destroy, Generation: 7, Reasons: []string{"it is no longer in the Labfile\x1b"}},
	}}
	var b bytes.Buffer
	if err := Plan(&b, p, Page{}); err != nil {
		t.Fatal(err)
	}
	want := `lab shop-1f3a9c2b

  =    db     keep     generation 1
  >    cache  start    generation 2
              it is stopped
  -/+  web-1  replace  generation 3 -> 4
              memory: 128MiB -> 256MiB
  -/+  blue   replace  generation 3 -> 4, blue-green
              tainted
  -/+  pg     replace  generation 3 -> 4, stop-first: volume pgdata is written by one generation at a time
  -/+  off    replace  generation 3 -> 4
  +    web-2  create   generation 1
              there is none
  ~    api    keep     generation 1
              ~ port 8080:80 added
              ~ generation 2 is removed
              ~ generation 5 is removed (2 are kept)
              ~ generation 6 is removed (2 are kept)
  -    old    destroy  generation 7
              it is no longer in the Labfile\x1b

Plan: 1 to create, 1 to start, 4 to replace, 1 to destroy, 1 to change in place, 1 unchanged.
`
	if diff := cmp.Diff(want, b.String()); diff != "" {
		t.Error(diff)
	}
}

func TestPlanOfLittle(t *testing.T) {
	for want, p := range map[string]plan.Plan{
		"lab a-1\n\n  =    db  keep     generation 1\n\nNothing to do: 1 machine as wanted.\n": {
			Lab: "a-1", Steps: []plan.Step{{Machine: "db", Action: plan.Keep, Generation: 1}},
		},
		"lab a-1\n\nNothing to do: 0 machines as wanted.\n": {Lab: "a-1"},
		"lab a-1\n\n  ~    api:80 leads to port 80 of this host\n  =    db  keep     generation 1\n\nPlan: the lab to change in place, 1 unchanged.\n": {
			Lab: "a-1", Changed: []string{"api:80 leads to port 80 of this host"},
			Steps: []plan.Step{{Machine: "db", Action: plan.Keep, Generation: 1}},
		},
	} {
		var b bytes.Buffer
		if err := Plan(&b, p, Page{}); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, b.String()); diff != "" {
			t.Error(diff)
		}
	}
}

func TestPlanJSON(t *testing.T) {
	var b bytes.Buffer
	p := plan.Plan{Lab: "a-1", Steps: []plan.Step{{Machine: "db", Action: plan.Create, Next: 1, Reasons: []string{"a < b"}}}}
	if err := JSON(&b, PlanJSON{Changes: true, Plan: p}); err != nil {
		t.Fatal(err)
	}
	want := `{
  "changes": true,
  "lab": "a-1",
  "steps": [
    {
      "machine": "db",
      "action": "create",
      "reasons": [
        "a < b"
      ],
      "next": 1
    }
  ]
}
`
	if diff := cmp.Diff(want, b.String()); diff != "" {
		t.Error(diff)
	}
}
