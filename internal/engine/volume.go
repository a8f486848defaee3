// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/ledger"
	"github.com/labfile/lab/internal/volume"
	"github.com/labfile/lab/providers"
)

// VolumeInUseError says that a machine that runs has the volume.
type VolumeInUseError struct {
	Volume string
	By     lab.Generation
}

// Error implements error.
func (e *VolumeInUseError) Error() string {
	return fmt.Sprintf("volume %s is in use by %s", e.Volume, e.By)
}

// Unwrap returns providers.ErrInUse.
func (e *VolumeInUseError) Unwrap() error { return providers.ErrInUse }

// Hint is the next step.
func (e *VolumeInUseError) Hint() string {
	return fmt.Sprintf("stop that machine first: \"lab stop %s\"", e.By.Machine)
}

// VolumeStatus is what there is to say of a volume.
type VolumeStatus struct {
	Name       string           `json:"name"`
	Size       lab.Bytes        `json:"size"`  // virtual, bytes
	Taken      lab.Bytes        `json:"taken"` // bytes on the host's disk, snapshots included
	FS         string           `json:"fs"`
	Made       time.Time        `json:"made"`
	Machine    lab.Name         `json:"machine,omitempty"`    // that wrote to it last
	Generation int              `json:"generation,omitempty"` // likewise
	InUse      []string         `json:"inUse,omitempty"`      // generations that run and have it: "web@3"
	Snapshots  []VolumeSnapshot `json:"snapshots"`            // oldest first
}

// VolumeSnapshot is an earlier state of a volume.
type VolumeSnapshot struct {
	Number    int       `json:"number"`
	Taken     time.Time `json:"taken"`
	Why       string    `json:"why,omitempty"`
	Automatic bool      `json:"automatic"` // taken by lab, which keeps the newest five
	Size      lab.Bytes `json:"size"`      // virtual, bytes
}

// Volumes tells of the lab's volumes, sorted by name. It takes no lock. A lab that
// was destroyed may have some still.
func (l *Lab) Volumes(ctx context.Context) ([]VolumeStatus, error) {
	all, err := l.volumes().List()
	if err != nil || len(all) == 0 {
		return nil, err
	}
	s := &session{Lab: l}
	if s.state, err = l.read(); err != nil {
		return nil, err
	}
	var out []VolumeStatus
	for _, v := range all {
		st := VolumeStatus{
			Name: v.Name, Size: v.Size, Taken: l.volumes().Taken(v), FS: v.FS, Made: v.Made,
			Machine: v.Attached.Machine, Generation: v.Attached.Generation, Snapshots: []VolumeSnapshot{},
		}
		users, err := s.users(ctx, v)
		if err != nil {
			return nil, err
		}
		for _, u := range users {
			st.InUse = append(st.InUse, u.generation.String())
		}
		for _, snap := range v.Snapshots {
			st.Snapshots = append(st.Snapshots, VolumeSnapshot{snap.Number, snap.Taken, snap.Why, snap.Automatic, snap.Size})
		}
		out = append(out, st)
	}
	return out, nil
}

// user is a generation that runs and has a volume.
type volumeUser struct {
	generation lab.Generation
	provider   providers.Provider
	readOnly   bool
}

// users returns who has the volume at this moment.
func (s *session) users(ctx context.Context, v volume.Volume) ([]volumeUser, error) {
	var out []volumeUser
	for _, p := range s.host.candidates(s.state.Opened) {
		all, err := p.List(ctx, s.id)
		if errors.Is(err, providers.ErrIncapable) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("listing the machines of %s: %w", s.id, err)
		}
		for _, m := range all {
			if m.State != providers.StateRunning && m.State != providers.StatePaused {
				continue
			}
			u := volumeUser{generation: m.Generation, provider: p}
			has := v.Attached.Machine == m.Machine && v.Attached.Generation == m.Number
			rec, _ := s.machine(m.Machine).Of(m.Number) // a standby, or one that gives way, has it, too
			for _, w := range rec.Create.Spec.Volumes {
				if w.Name == v.Name {
					has, u.readOnly = true, w.ReadOnly
				}
			}
			if has {
				out = append(out, u)
			}
		}
	}
	return out, nil
}

// idle returns a *VolumeInUseError if a machine that runs has the volume.
func (s *session) idle(ctx context.Context, name string) error {
	v, err := s.volumes().Get(name)
	if err != nil {
		return err
	}
	users, err := s.users(ctx, v)
	if err != nil {
		return err
	}
	for _, u := range users {
		return &VolumeInUseError{Volume: name, By: u.generation}
	}
	return nil
}

// withVolumes carries out something on the lab's volumes, and records it. A lab that
// is destroyed has no ledger to record it in.
func (l *Lab) withVolumes(o Options, t ledger.Type, do func(*session) (ledger.VolumeAct, error)) error {
	lk, err := l.acquire(o.Command)
	if err != nil {
		return err
	}
	s := &session{Lab: l, opt: o, lock: lk, fresh: !l.book.Exists()}
	defer s.end()
	if s.state, err = l.read(); err != nil {
		return err
	}
	if s.state.Machines == nil {
		s.state.Machines = map[lab.Name]ledger.Machine{}
	}
	act, err := do(s)
	if err != nil || !l.book.Exists() {
		return err
	}
	return s.recordVolume(t, act)
}

// SnapshotVolume takes a snapshot of a volume and returns its number. A machine that
// writes to the volume goes on; its guest is asked to write what it holds first.
// Errors: volume.ErrNotFound; *VolumeInUseError if the provider cannot do that.
func (l *Lab) SnapshotVolume(ctx context.Context, name, why string, o Options) (int, error) {
	number := 0
	return number, l.withVolumes(o, ledger.VolumeSnapshotted, func(s *session) (ledger.VolumeAct, error) {
		snap, err := s.snapshotVolume(ctx, name, why, false)
		number = snap.Number
		return ledger.VolumeAct{Volume: name, Snapshot: snap.Number, Why: why}, err
	})
}

// snapshotVolume takes a snapshot of a volume, under the machine that writes to it if
// there is one.
func (s *session) snapshotVolume(ctx context.Context, name, why string, automatic bool) (volume.Snapshot, error) {
	store := s.volumes()
	v, err := store.Get(name)
	if err != nil {
		return volume.Snapshot{}, err
	}
	users, err := s.users(ctx, v)
	if err != nil {
		return volume.Snapshot{}, err
	}
	i := slices.IndexFunc(users, func(u volumeUser) bool { return !u.readOnly })
	if i < 0 {
		return store.Snapshot(name, why, automatic)
	}
	writer := users[i]
	pusher, ok := writer.provider.(providers.VolumePusher)
	if !ok {
		return volume.Snapshot{}, &VolumeInUseError{Volume: name, By: writer.generation}
	}
	if m, ok := s.machine(writer.generation.Machine).Of(writer.generation.Number); ok && m.Create.Agent {
		s.sync(ctx, m)
	}
	if v, err = store.Push(name); err != nil {
		return volume.Snapshot{}, fmt.Errorf("taking a snapshot of volume %s: %w", name, err)
	}
	attached := chain(providers.Volume{Name: serial(name)}, store.Paths(v.Layers))
	if err := pusher.PushVolume(ctx, writer.generation, attached); err != nil {
		return volume.Snapshot{}, fmt.Errorf("taking a snapshot of volume %s: %w", name, err)
	}
	return store.Keep(name, why, automatic)
}

// RestoreVolume makes a volume what it was at a snapshot. What it held becomes a
// snapshot, whose number is returned; 0 if it is one already. Errors as
// SnapshotVolume.
func (l *Lab) RestoreVolume(ctx context.Context, name string, number int, o Options) (int, error) {
	kept := 0
	return kept, l.withVolumes(o, ledger.VolumeRestored, func(s *session) (act ledger.VolumeAct, err error) {
		if err := s.idle(ctx, name); err != nil {
			return act, err
		}
		kept, err = s.volumes().Restore(name, number)
		return ledger.VolumeAct{Volume: name, Snapshot: number, Kept: kept}, err
	})
}

// still returns the number of a snapshot of what the volume holds if a machine writes
// to it and number is 0, and number otherwise.
func (s *session) still(ctx context.Context, name string, number int, why string) (int, error) {
	if number != 0 {
		return number, nil
	}
	var busy *VolumeInUseError
	if err := s.idle(ctx, name); !errors.As(err, &busy) {
		return 0, err
	}
	snap, err := s.snapshotVolume(ctx, name, why, true)
	if err != nil {
		return 0, err
	}
	return snap.Number, s.recordVolume(ledger.VolumeSnapshotted, ledger.VolumeAct{Volume: name, Snapshot: snap.Number, Why: why})
}

// CloneVolume makes a volume of its own of a snapshot, or of what the volume holds if
// number is 0. If a machine writes to it, that is a snapshot taken for it.
func (l *Lab) CloneVolume(ctx context.Context, name string, number int, as string, o Options) error {
	return l.withVolumes(o, ledger.VolumeCloned, func(s *session) (ledger.VolumeAct, error) {
		number, err := s.still(ctx, name, number, "to be cloned")
		if err != nil {
			return ledger.VolumeAct{}, err
		}
		_, err = s.volumes().Clone(ctx, name, number, as)
		return ledger.VolumeAct{Volume: name, Snapshot: number, To: as}, err
	})
}

// RemoveVolume removes a volume with its snapshots, or one snapshot if number is not
// 0. Errors as SnapshotVolume.
func (l *Lab) RemoveVolume(ctx context.Context, name string, number int, o Options) error {
	kind := ledger.VolumeRemoved
	if number > 0 {
		kind = ledger.VolumeForgotten
	}
	return l.withVolumes(o, kind, func(s *session) (ledger.VolumeAct, error) {
		act := ledger.VolumeAct{Volume: name, Snapshot: number}
		if err := s.idle(ctx, name); err != nil {
			return act, err
		}
		if number > 0 {
			return act, s.volumes().Forget(ctx, name, number)
		}
		return act, s.volumes().Remove(name)
	})
}

// ExportVolume writes a snapshot, or what the volume holds if number is 0, into a new
// file, in the format "qcow2" or "raw".
func (l *Lab) ExportVolume(ctx context.Context, name string, number int, format, to string, o Options) error {
	return l.withVolumes(o, ledger.VolumeExported, func(s *session) (ledger.VolumeAct, error) {
		number, err := s.still(ctx, name, number, "to be exported")
		if err != nil {
			return ledger.VolumeAct{}, err
		}
		return ledger.VolumeAct{Volume: name, Snapshot: number, To: to}, s.volumes().Export(ctx, name, number, format, to)
	})
}

// ImportVolume makes a volume of a disk image.
func (l *Lab) ImportVolume(ctx context.Context, from, name string, o Options) error {
	return l.withVolumes(o, ledger.VolumeImported, func(s *session) (ledger.VolumeAct, error) {
		v, err := s.volumes().Import(ctx, from, name)
		return ledger.VolumeAct{Volume: name, From: from, Size: v.Size}, err
	})
}

// removeVolumes removes the volumes that only the machines wrote to which are gone.
func (s *session) removeVolumes(ctx context.Context, gone []ledger.Machine) error {
	for _, m := range gone {
		for _, v := range m.Create.Spec.Volumes {
			if v.ReadOnly || s.writes(v.Name) {
				continue
			}
			if err := s.idle(ctx, v.Name); errors.Is(err, volume.ErrNotFound) {
				continue
			} else if err != nil {
				return err
			}
			if err := s.volumes().Remove(v.Name); err != nil {
				return err
			}
			if err := s.recordVolume(ledger.VolumeRemoved, ledger.VolumeAct{Volume: v.Name}); err != nil {
				return err
			}
		}
	}
	return nil
}

// besidesVolumes returns the paths of what is in the lab's folder besides its
// volumes, the ledger last.
func (s *session) besidesVolumes() ([]string, error) {
	d := s.host.Dirs
	entries, err := os.ReadDir(d.Lab(s.id))
	if err != nil {
		return nil, err
	}
	var paths []string
	for _, e := range entries {
		path := filepath.Join(d.Lab(s.id), e.Name())
		if path != d.Volumes(s.id) && path != d.Ledger(s.id) {
			paths = append(paths, path)
		}
	}
	return append(paths, d.Ledger(s.id)), nil
}

// letGoTime is what a guest may take to shut down that has a volume.
const letGoTime = 30 * time.Second

// letGo shuts a generation down that is about to be ended by force, if it was ready
// once, or failed to be, and writes to a volume: what it has not written yet would be lost, and its
// services would find their data as after a power cut.
func (s *session) letGo(ctx context.Context, g lab.Generation) {
	rec, ok := s.machine(g.Machine).Of(g.Number)
	writes := slices.ContainsFunc(rec.Create.Spec.Volumes, func(v ledger.Volume) bool { return !v.ReadOnly })
	unused := rec.Ready.IsZero() && rec.Failed == (ledger.Failed{})
	if !ok || !writes || unused {
		return
	}
	live, err := s.provider.Inspect(ctx, g)
	if err != nil || live.State != providers.StateRunning {
		return
	}
	s.emit(Event{Machine: g.Machine, Generation: g.Number, Stage: StageStop, Text: "shutting down, so that its volumes are whole"})
	began := time.Now()
	if rec.Create.Agent {
		s.poweroff(ctx, rec, letGoTime)
	}
	if err := s.provider.Stop(ctx, g, max(0, letGoTime-time.Since(began))); err != nil {
		s.host.Log.Debug("shutting a machine down", "machine", g.String(), "err", err)
	}
}

// keptVolumes returns the names of the lab's volumes.
func (l *Lab) keptVolumes() []string {
	all, _ := l.volumes().List() // what cannot be read is kept all the same
	names := make([]string, len(all))
	for i, v := range all {
		names[i] = v.Name
	}
	slices.Sort(names)
	return names
}
