// SPDX-License-Identifier: Apache-2.0

package memory

import (
	"context"
	"slices"

	"github.com/labfile/lab/internal/lab"
)

// Fork returns a second host with the machines as they are at this moment; those that
// run are started from their beginning there. What happens on one host from now on does
// not happen on the other. Frozen overlays stay with the first. Tests use it, to look at
// what a killed command leaves.
func (p *Provider) Fork() (*Provider, error) {
	next := New(p.cfg)
	var running []lab.Generation
	p.mu.Lock()
	for g, m := range p.machines {
		spec := m.spec
		spec.Volumes = slices.Clone(spec.Volumes)
		next.machines[g] = &machine{
			spec: spec, broken: m.broken, exit: m.exit, console: &log{},
			disk: disk{taken: m.disk.taken, written: m.disk.written, birth: m.disk.birth},
		}
		if m.running != nil {
			running = append(running, g)
		}
	}
	p.mu.Unlock()
	for _, g := range running {
		if err := next.Start(context.Background(), g); err != nil {
			return nil, err
		}
	}
	return next, nil
}
