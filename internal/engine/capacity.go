// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"syscall"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/plan"
	"github.com/labfile/lab/providers"
)

// affordable compares the memory of the machines with the host's. Guests rarely use all
// of theirs, so that more than there is together is worth a note. One machine alone that
// asks for more than memory and swap cannot start: the kernel refuses it.
func (s *session) affordable(ctx context.Context, want *lab.Lab, p plan.Plan) error {
	c, ok := s.provider.(providers.MemoryCounter)
	if !ok {
		return nil
	}
	host, err := c.HostMemory(ctx)
	if err != nil || host.RAM == 0 {
		return err
	}
	var (
		errs   []error
		total  lab.Bytes
		starts bool
	)
	for _, m := range want.Machines {
		action := plan.Keep
		for _, step := range p.Steps {
			if step.Machine == m.Name {
				action = step.Action
			}
		}
		if action == plan.Keep {
			if runs(s.machine(m.Name), s.observed[m.Name]) {
				total += m.Memory
			}
			continue
		}
		starts = true
		total += m.Memory
		if m.Memory > host.RAM+host.Swap && !host.Unbounded {
			errs = append(errs, fmt.Errorf("machine %q: %w: it asks for %s of memory, and the host has %s", m.Name, providers.ErrIncapable, m.Memory, memoryText(host)))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	if starts && total > host.RAM {
		s.emit(Event{Stage: StageNote, Text: fmt.Sprintf("the machines ask for %s of memory together, and the host has %s: it may swap, or end some of them", total, memoryText(host))})
	}
	return nil
}

// memoryText says how much memory a host has.
func memoryText(h providers.HostMemory) string {
	text := gib(h.RAM)
	if h.Swap > 0 {
		text += " and " + gib(h.Swap) + " of swap"
	}
	return text
}

// gib renders a size that is no whole number of anything.
func gib(b lab.Bytes) string {
	return strings.TrimSuffix(fmt.Sprintf("%.1f", float64(b)/float64(lab.GiB)), ".0") + "GiB"
}

// What the files of the smallest machine, one of builtin/tiny, take when it is ready, and
// what it writes when it starts again: with less, none can.
const (
	birthRoom = 900 * lab.KiB
	startRoom = 256 * lab.KiB
)

// roomy returns a *roomError if what the plan makes and starts plainly does not fit where
// machines are kept, and what the provider says if nothing can be kept there.
func (s *session) roomy(ctx context.Context, p plan.Plan) error {
	c, ok := s.provider.(providers.RoomCounter)
	needed := lab.Bytes(p.Count(plan.Create)+p.Count(plan.Replace))*birthRoom + lab.Bytes(p.Count(plan.Start))*startRoom
	if !ok || needed == 0 {
		return nil
	}
	room, err := c.HostRoom(ctx)
	if err != nil || room.At == "" || room.Free >= needed {
		return err
	}
	return &roomError{room, needed}
}

// roomError says that machines do not fit where they are kept.
type roomError struct {
	providers.HostRoom
	needed lab.Bytes
}

func (e *roomError) Error() string {
	return fmt.Sprintf("%s of disk are free in %s, and the machines need %s at least", sizeText(e.Free), e.At, e.needed)
}

// Unwrap returns the error of a full disk.
func (e *roomError) Unwrap() error { return syscall.ENOSPC }

// sizeText renders a size that is no whole number of anything.
func sizeText(b lab.Bytes) string {
	switch {
	case b >= lab.GiB:
		return gib(b)
	case b >= lab.MiB:
		return (b / lab.MiB * lab.MiB).String()
	}
	return (b / lab.KiB * lab.KiB).String()
}
