// SPDX-License-Identifier: Apache-2.0

package labfile

import (
	"fmt"
	"time"

	"github.com/labfile/lab/internal/lab"
)

// defaultBootTimeout is how long a step of boot may take unless the Labfile says it.
// Under emulation a package manager takes its time.
const defaultBootTimeout = 10 * time.Minute

// bootEntry is an item of boot: a shell step of provision, with a time limit.
type bootEntry struct {
	place
	shellKey
	Timeout duration `yaml:"timeout" range:"1s..24h" default:"10m" also:"within deadline" doc:"How long the step may take. When it is over, the step is ended and the generation has failed."`
}

func (*bootEntry) alternatives() []string { return []string{"shell"} }

// foreign says why a kind of provision step is none of boot.
func (*bootEntry) foreign(key string) string {
	switch key {
	case "file", "files", "copy", "upload", "template":
		return "boot has only shell steps; a file belongs into the image: move this step to provision"
	}
	return ""
}

// boot returns what the machines of a role run at their first boot.
func (c *converter) boot(r *role) []lab.BootStep {
	var steps []lab.BootStep
	for i := range r.row.value.Boot.items {
		e := &r.row.value.Boot.items[i]
		if !e.Shell.set() {
			if e.Timeout.set() && !c.noted(e.path) {
				c.add(e.place, "says how long a step may take, but not which one; add %q", "shell: ./join.sh")
			}
			continue // else it could not be read, which has been reported
		}
		b := lab.BootStep{Timeout: defaultBootTimeout}
		b.Place = fmt.Sprintf("%s:%d:%d", c.file, e.line, e.column)
		c.shell(&e.Shell, &b.Provision)
		if e.Timeout.set() {
			b.Timeout = e.Timeout.value
		}
		steps = append(steps, b)
	}
	return steps
}
