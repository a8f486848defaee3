// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"time"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/ledger"
	"github.com/labfile/lab/internal/network"
	"github.com/labfile/lab/providers"
)

// cutOff returns an *UnreachableError if a generation runs and cannot be reached, else nil.
func cutOff(ctx context.Context, p providers.Provider, g lab.Generation) error {
	m, err := p.Inspect(ctx, g)
	if err != nil || !isOn(m) || m.Unreachable == "" {
		return nil
	}
	return &UnreachableError{Machine: g.Machine, Why: m.Unreachable}
}

// bringBack shuts a machine down that runs and cannot be reached, so that it can be
// started again. The supervisor that it is plugged into may be one that cannot be reached
// either: that one ends by itself with the last of its machines.
func (s *session) bringBack(ctx context.Context, g lab.Generation, m ledger.Machine) error {
	if err := s.record(ledger.MachineStop, g, nil); err != nil {
		return err
	}
	since := s.machine(g.Machine)
	s.emit(Event{Machine: g.Machine, Generation: g.Number, Stage: StageStop, Text: "shutting down, since it cannot be reached"})
	how, err := s.shutDown(ctx, m, letGoTime, false)
	if err != nil {
		return s.stays(ctx, g, err)
	}
	if err := s.unplug(ctx, g); err != nil {
		return err
	}
	if err := s.record(ledger.MachineStopped, g, how); err != nil {
		return err
	}
	if how.Forced {
		s.emit(Event{Machine: g.Machine, Generation: g.Number, Stage: StageStop, Text: stoppedText(how)})
	}
	s.letGoOf(ctx, since.Ports)
	return nil
}

// letGoOf waits until nobody listens on the host ports that a machine had, for a while:
// a supervisor that cannot be reached gives them up when it notices that the machine has
// ended.
func (s *session) letGoOf(ctx context.Context, ports []ledger.Port) {
	ctx, cancel := context.WithTimeout(ctx, noticeTime)
	defer cancel()
	for _, p := range ports {
		for network.Free(ctx, p.Host, p.UDP) != nil {
			select {
			case <-ctx.Done():
				return
			case <-time.After(10 * time.Millisecond):
			}
		}
	}
}
