// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"errors"
	"fmt"

	"github.com/labfile/lab/internal/ledger"
	"github.com/labfile/lab/internal/volume"
	"github.com/labfile/lab/providers"
)

// snapshotVolume takes a snapshot of a volume, under the machine that writes to it if
// there is one.
func (s *session) snapshotVolume(ctx context.Context, name, why string) (snap volume.Snapshot, err error) {
	store := s.volumes()
	on, err := s.push(ctx, name, nil)
	switch {
	case err != nil:
	case on.pushed:
		snap, err = store.Keep(ctx, name, why)
	default:
		snap, err = store.Snapshot(ctx, name, why)
	}
	return snap, snapshotError(name, err)
}

// cover returns what a volume holds at this moment, in files that nobody writes to. A
// machine that writes to it goes on.
func (s *session) cover(ctx context.Context, name string) (now volume.Snapshot, err error) {
	store := s.volumes()
	on, err := s.push(ctx, name, store.Covered)
	switch {
	case err != nil:
	case on.pushed:
		now, err = store.Settle(ctx, name)
	case on.written: // it may write at any moment, to the file on top
		now = on.volume.Below()
	default:
		now, err = store.Cover(ctx, name)
	}
	return now, snapshotError(name, err)
}

// pushed is what became of an attempt to push a volume.
type pushed struct {
	volume  volume.Volume // as it was when that was decided
	written bool          // a machine writes to it
	pushed  bool          // and does so in an empty file on top now
}

// push makes the machine that writes to a volume, if there is one, go on in an empty
// file on top. What its guest holds it is asked to write first; if enough then says that
// nothing needs to be done, nothing is.
func (s *session) push(ctx context.Context, name string, enough func(context.Context, volume.Volume) (bool, error)) (on pushed, err error) {
	store := s.volumes()
	v, err := store.Get(name)
	if err != nil {
		return on, err
	}
	users, err := s.users(ctx, v)
	if err != nil {
		return on, err
	}
	by, ok := writer(users)
	if !ok {
		return on, nil
	}
	pusher, ok := by.provider.(providers.VolumePusher)
	if !ok {
		return on, &VolumeInUseError{Volume: name, By: by.generation}
	}
	m, ok := s.machine(by.generation.Machine).Of(by.generation.Number)
	booting := m.Phase == ledger.PhaseCreating || m.Phase == ledger.PhaseStarting
	cutOff := cutOff(ctx, by.provider, by.generation)
	if ok && !booting && cutOff == nil && (m.Create.Agent || m.Phase == ledger.PhaseReady) {
		s.syncAttended(ctx, m)
	}
	on.written = true
	if on.volume, err = store.Get(name); err != nil {
		return on, err
	}
	if enough != nil {
		if is, err := enough(ctx, on.volume); is || err != nil {
			return on, err
		}
	}
	if v, err = store.Push(ctx, name); err != nil {
		return on, err
	}
	on.pushed = true
	attached, err := s.chain(ctx, providers.Volume{Name: serial(name)}, v, v.Layers)
	if err != nil {
		return on, err
	}
	err = pusher.PushVolume(ctx, by.generation, attached)
	if err != nil && cutOff != nil && ctx.Err() == nil {
		err = cutOff
	}
	return on, err
}

func snapshotError(name string, err error) error {
	if err == nil || errors.Is(err, volume.ErrNotFound) || errors.Is(err, providers.ErrInUse) {
		return err
	}
	return fmt.Errorf("taking a snapshot of volume %s: %w", name, err)
}
