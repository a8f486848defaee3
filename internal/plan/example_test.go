// SPDX-License-Identifier: Apache-2.0

package plan_test

import (
	"fmt"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/plan"
)

// A plan says for each machine what to do and why; it touches nothing.
func ExampleMake() {
	db := lab.Machine{Name: "db", Role: "db", Box: "builtin/debian-12", CPUs: 1, Memory: 512 * lab.MiB, Replace: lab.DefaultReplace}
	web := lab.Machine{Name: "web", Role: "web", Box: "builtin/tiny", CPUs: 1, Memory: 128 * lab.MiB, Replace: lab.DefaultReplace}
	larger := web
	larger.Memory = 256 * lab.MiB
	p := plan.Make(plan.Input{
		Lab:      "shop-1f3a9c2b",
		Want:     &lab.Lab{Name: "shop", Machines: []lab.Machine{db, larger}},
		Images:   map[lab.Name]plan.Image{"db": {Digest: "sha256:1", Box: "sha256:1"}, "web": {Digest: "sha256:2", Box: "sha256:2"}},
		Recorded: map[lab.Name]plan.Recorded{"web": {Spec: web, Generation: 1, Last: 1, Image: "sha256:2", Box: "sha256:2", Phase: plan.PhaseLived}},
		Observed: map[lab.Name][]plan.Observed{"web": {{Number: 1, State: plan.Running}}},
	})
	for _, s := range p.Steps {
		fmt.Println(s.Action, s.Machine, s.Next, s.Reasons)
	}
	// Output:
	// create db 1 [first creation]
	// replace web 2 [memory changed: 128MiB -> 256MiB]
}
