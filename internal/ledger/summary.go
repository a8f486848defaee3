// SPDX-License-Identifier: Apache-2.0

package ledger

import (
	"cmp"
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"github.com/labfile/lab/internal/lab"
)

// Summary says in one line, for a person, what the record records.
func (r Record) Summary() string {
	g := lab.Generation{Machine: r.Machine, Number: r.Generation}
	get := func(v any) bool { return json.Unmarshal(r.Data, v) == nil }
	switch r.Type {
	case LabOpened:
		var d Opened
		if get(&d) {
			return fmt.Sprintf("lab %q opened from %s on %s", d.Name, d.File, d.Provider)
		}
	case MachineCreate:
		var d Create
		if get(&d) {
			return because(fmt.Sprintf("%s: creating from %s (%s) at %s", g, d.Spec.Box, Short(d.Image), d.Address), d.Why)
		}
	case MachineBooted:
		var d Booted
		if get(&d) {
			steps := "1 boot step"
			if d.Steps != 1 {
				steps = fmt.Sprintf("%d boot steps", d.Steps)
			}
			return fmt.Sprintf("%s: ran %s in %s", g, steps, d.Took.Round(10*time.Millisecond))
		}
	case MachineReady:
		var d Ready
		if get(&d) {
			return fmt.Sprintf("%s: ready after %s", g, d.Took.Round(10*time.Millisecond))
		}
	case MachineFailed:
		var d Failed
		if get(&d) {
			return fmt.Sprintf("%s: failed (%s): %s", g, d.Stage, d.Error)
		}
	case MachineChanged:
		return fmt.Sprintf("%s: changed in place", g)
	case MachineStop:
		return fmt.Sprintf("%s: stopping", g)
	case MachineStopped:
		var d Stopped
		switch {
		case len(r.Data) == 0 || !get(&d) || !d.Forced:
			return fmt.Sprintf("%s: stopped", g)
		case d.Why == "":
			return fmt.Sprintf("%s: powered off", g)
		}
		return fmt.Sprintf("%s: powered off: %s", g, d.Why)
	case MachineStays:
		var d Stays
		if get(&d) {
			return fmt.Sprintf("%s: runs on: %s", g, d.Why)
		}
	case MachineProxied:
		var d Proxied
		if get(&d) && d.Written {
			return fmt.Sprintf("%s: is given the proxy settings of the host", g)
		}
		return fmt.Sprintf("%s: has no proxy settings any more", g)
	case MachineStart:
		return fmt.Sprintf("%s: starting", g)
	case MachineExited:
		var d Exited
		if get(&d) {
			return strings.TrimSuffix(fmt.Sprintf("%s: exited: %s, %s", g, d.Reason, d.Detail), ", ")
		}
	case MachineDestroy:
		var d Destroy
		if get(&d) {
			return because(fmt.Sprintf("%s: destroying", g), d.Why)
		}
	case MachineRestored:
		return fmt.Sprintf("%s: kept after all, stopped", g)
	case MachinePromoted:
		return fmt.Sprintf("%s: in service", g)
	case MachineRetired:
		var d Retired
		if get(&d) && d.Failed {
			return fmt.Sprintf("%s: kept for inspection, stopped", g)
		}
		return fmt.Sprintf("%s: kept, stopped", g)
	case MachineDestroyed:
		return fmt.Sprintf("%s: destroyed", g)
	case MachineEntered, MachineTainted, MachineUntainted, MachineExpired:
		return r.byHandSummary()
	}
	if about := r.volumeSummary(); about != "" {
		return about
	}
	return cmp.Or(r.bakeSummary(), string(r.Type))
}

func because(what string, why []string) string {
	if len(why) == 0 {
		return what
	}
	return what + ": " + strings.Join(why, "; ")
}

// Short shortens a digest for the eye: "sha256:0123456789ab".
func Short(digest string) string {
	if algo, hex, ok := strings.Cut(digest, ":"); ok && len(hex) > 12 {
		return algo + ":" + hex[:12]
	}
	return digest
}
