// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/ledger"
	"github.com/labfile/lab/internal/plan"
	"github.com/labfile/lab/providers"
)

// fits checks what can be known of machines only together with their boxes, before
// anything is changed.
func fits(want *lab.Lab, images map[lab.Name]Image) error {
	var errs []error
	for _, m := range want.Machines {
		img, ok := images[m.Name]
		switch {
		case !ok:
		case m.Disk != 0 && m.Disk < img.Size:
			errs = append(errs, fmt.Errorf("machine %q: a disk of %s is smaller than the %s of its box; ask for more, or leave it out", m.Name, m.Disk, img.Size))
		case m.UserData != "" && !img.CloudInit:
			errs = append(errs, fmt.Errorf("machine %q: user_data needs cloud-init, which box %s does not have", m.Name, m.Box))
		case m.Memory < img.MinMemory:
			errs = append(errs, fmt.Errorf("machine %q: %s of memory are below the %s that box %s needs", m.Name, m.Memory, img.MinMemory, m.Box))
		}
	}
	return errors.Join(errs...)
}

// input gathers what a plan is made from.
func (s *session) input(want *lab.Lab, images map[lab.Name]Image) plan.Input {
	in := plan.Input{
		Lab: s.id, Want: want, Images: map[lab.Name]plan.Image{},
		Recorded: map[lab.Name]plan.Recorded{}, Observed: map[lab.Name][]plan.Observed{},
	}
	if s.state.Opened.Name != "" {
		in.Opened = &lab.Lab{Expires: s.state.Opened.Expires, Expose: s.state.Opened.Exposes(), InheritProxy: s.state.Opened.InheritProxy}
	}
	for name, img := range images {
		in.Images[name] = plan.Image{Digest: img.Digest, Box: img.Box, Layers: img.Layers, Missing: img.Missing}
	}
	for name, m := range s.state.Machines {
		in.Recorded[name] = recorded(m, s.observed[name])
		if w, ok := want.Machine(name); ok && images != nil { // who asks for no images wants what there is
			rec := in.Recorded[name]
			rec.Tainted, rec.Expired = m.Tainted, overdue(m, w.MaxAge, time.Now())
			in.Recorded[name] = rec
		}
	}
	for name, seen := range s.observed {
		for _, g := range seen {
			in.Observed[name] = append(in.Observed[name], plan.Observed{Number: g.Number, State: planState(g.State), Unreachable: g.Unreachable})
		}
	}
	return in
}

// expand returns the machines that names stand for: a machine, or all replicas
// of a role. A name that is neither gives a *NoMachineError.
func expand(names []lab.Name, machines []lab.Machine) ([]lab.Name, error) {
	var expanded []lab.Name
	for _, name := range names {
		found := false
		for _, m := range machines {
			if (m.Name == name || m.Role == string(name)) && !slices.Contains(expanded, m.Name) {
				expanded = append(expanded, m.Name)
			}
			found = found || m.Name == name || m.Role == string(name)
		}
		if !found {
			e := &NoMachineError{Name: name}
			for _, m := range machines {
				e.Known = append(e.Known, m.Name)
			}
			return nil, e
		}
	}
	return expanded, nil
}

func planState(s providers.State) plan.State {
	switch s {
	case providers.StateRunning:
		return plan.Running
	case providers.StateBroken:
		return plan.Broken
	}
	return plan.Stopped
}

// recorded translates what the ledger says into the planner's words.
func recorded(m ledger.Machine, seen []providers.Machine) plan.Recorded {
	r := plan.Recorded{
		Spec: m.Create.Spec.Machine(m.Name), Generation: m.Generation, Last: m.Last,
		Image: m.Create.Image, Box: m.Create.Box, Layers: m.Create.Layers,
		Trouble: exitText(m.Exited), Rollback: m.Create.Rollback,
	}
	switch m.Phase {
	case ledger.PhaseCreating:
		r.Phase = plan.PhaseUnfinished
	case ledger.PhaseFailed:
		r.Phase, r.Trouble = plan.PhaseFailed, m.Failed.Error
		if !m.Ready.IsZero() { // it failed to start again; its disk is worth another try
			r.Phase = plan.PhaseLived
		}
	case ledger.PhaseDestroying:
		r.Phase = plan.PhaseDestroying
	case ledger.PhaseGone:
		r.Phase = plan.PhaseGone
	default:
		r.Phase = plan.PhaseLived
	}
	if m.Unbooted() && r.Phase == plan.PhaseLived { // it failed, and was stopped or ended since
		r.Phase, r.Trouble = plan.PhaseFailed, unbooted
	}
	for _, p := range m.Past {
		switch {
		case p.Retired && p.Phase == ledger.PhaseRetired:
			r.Retired = append(r.Retired, p.Generation)
		case p.Retired && p.Phase == ledger.PhaseFailed && p.Generation > m.Generation:
			r.Failed = append(r.Failed, p.Generation)
		case r.Phase == plan.PhaseLived && !p.Retired && p.Generation < m.Generation && !p.Ready.IsZero() &&
			p.Phase != ledger.PhaseDestroying && p.Phase != ledger.PhaseGone:
			r.Outgoing = append(r.Outgoing, p.Generation)
		}
	}
	r.Stopped = m.Phase == ledger.PhaseStopped || m.Phase == ledger.PhaseStopping
	r.Stopping = m.Phase == ledger.PhaseStopping
	for _, g := range seen {
		if g.Number == m.Generation && g.State == providers.StatePaused {
			r.Trouble, r.Stopped = pausedText(g), false
		}
	}
	for _, g := range seen { // an exit that no supervisor lived to record
		if g.Number == m.Generation && r.Trouble == "" && g.State == providers.StateStopped && !r.Stopped {
			r.Trouble = exitText(ledger.Exited{Reason: string(g.Exit.Reason), Detail: g.Exit.Detail})
		}
	}
	return r
}

// unbooted says why a generation that is no longer being born never becomes ready.
const unbooted = "its boot steps did not run to their end"

// pausedText says why a machine's processors are halted.
func pausedText(m providers.Machine) string {
	if m.Reason == "" {
		return "it is paused"
	}
	return "it is paused: " + m.Reason
}

// exitText says in the user's words how a machine ended.
func exitText(e ledger.Exited) string {
	text := map[providers.ExitReason]string{
		providers.ExitGuest:    "it shut itself down",
		providers.ExitPanic:    "its kernel panicked",
		providers.ExitHost:     "it was stopped",
		providers.ExitCrashed:  "its hypervisor failed",
		providers.ExitSignaled: "its process was killed from outside",
	}[providers.ExitReason(e.Reason)]
	if text != "" && e.Detail != "" && e.Detail != "guest-shutdown" { // QEMU's word for the same
		text += " (" + e.Detail + ")"
	}
	return text
}
