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
	Taken      lab.Bytes        `json:"taken"` // bytes on its host's disk, snapshots included
	FS         string           `json:"fs"`
	Made       time.Time        `json:"made"`
	URI        string           `json:"uri,omitempty"`        // of the daemon on whose host it is, if that is another one
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
			Name: v.Name, Size: v.Size, FS: v.FS, Made: v.Made, URI: v.At.URI,
			Machine: v.Attached.Machine, Generation: v.Attached.Generation, Snapshots: []VolumeSnapshot{},
		}
		if st.Taken, err = l.volumes().Taken(ctx, v); err != nil {
			return nil, err
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

// volumeUser is a generation that runs and has a volume.
type volumeUser struct {
	generation lab.Generation
	provider   providers.Provider
	disk       providers.Volume
}

// has reports whether the machine has the file open, by its path.
func (u volumeUser) has(path string) bool {
	return u.disk.Path == path || slices.Contains(u.disk.Layers, path)
}

// users returns who has the volume at this moment, by what the providers say. One that
// cannot be asked counts only if it keeps the volume, or is known to have machines of the
// lab and is there: a machine of another provider keeps its locks on the files all the same.
func (s *session) users(ctx context.Context, v volume.Volume) ([]volumeUser, error) {
	var out []volumeUser
	asked, err := s.candidates(s.state.Opened)
	if err != nil {
		return nil, err
	}
	if v.At != (volume.Place{}) {
		p, err := s.host.Provider(ledger.Opened{Provider: v.At.Provider, URI: v.At.URI})
		if err != nil {
			return nil, err
		}
		if !slices.ContainsFunc(asked, func(c candidate) bool { return c.Provider == p }) {
			asked = append(asked, candidate{p, true})
		}
	}
	for _, p := range asked {
		all, err := p.List(ctx, s.id)
		keeps := v.At != (volume.Place{}) && placeOf(p.Provider) == v.At
		if err != nil && ctx.Err() == nil && !keeps && (errors.Is(err, providers.ErrIncapable) || !p.known) {
			s.host.Log.Debug("asking for users of a volume", "provider", p.Name(), "err", err)
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("listing the machines of %s: %w", s.id, err)
		}
		for _, m := range all {
			if m.State != providers.StateRunning && m.State != providers.StatePaused {
				continue
			}
			for _, disk := range m.Volumes {
				if disk.Name == serial(v.Name) {
					out = append(out, volumeUser{m.Generation, p.Provider, disk})
				}
			}
		}
	}
	return out, nil
}

// writer returns who writes to a volume; ok is false if nobody does.
func writer(users []volumeUser) (u volumeUser, ok bool) {
	i := slices.IndexFunc(users, func(u volumeUser) bool { return !u.disk.ReadOnly })
	if i < 0 {
		return u, false
	}
	return users[i], true
}

// unwritten returns a *VolumeInUseError if a machine other than g writes to the volume,
// or has the file open that is written to.
func (s *session) unwritten(ctx context.Context, v volume.Volume, users []volumeUser, g lab.Generation) error {
	paths, err := s.volumes().Paths(ctx, v, v.Layers)
	if err != nil {
		return err
	}
	top := paths[len(paths)-1]
	for _, u := range users {
		if u.generation != g && (!u.disk.ReadOnly || u.has(top)) {
			return &VolumeInUseError{Volume: v.Name, By: u.generation}
		}
	}
	return nil
}

// opened says of a path whether any of the users has it open.
func opened(users []volumeUser) func(path string) bool {
	return func(path string) bool {
		return slices.ContainsFunc(users, func(u volumeUser) bool { return u.has(path) })
	}
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
		snap, err := s.snapshotVolume(ctx, name, why)
		number = snap.Number
		return ledger.VolumeAct{Volume: name, Snapshot: snap.Number, Why: why}, err
	})
}

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
	if ok && !booting && (m.Create.Agent || m.Phase == ledger.PhaseReady) {
		s.sync(ctx, m)
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
	return on, pusher.PushVolume(ctx, by.generation, attached)
}

func snapshotError(name string, err error) error {
	if err == nil || errors.Is(err, volume.ErrNotFound) || errors.Is(err, providers.ErrInUse) {
		return err
	}
	return fmt.Errorf("taking a snapshot of volume %s: %w", name, err)
}

// RestoreVolume makes a volume what it was at a snapshot. What it held becomes a
// snapshot, whose number is returned; 0 if it is one already. Machines that only read
// it go on with what they have. Errors: volume.ErrNotFound; *VolumeInUseError if a
// machine writes to it.
func (l *Lab) RestoreVolume(ctx context.Context, name string, number int, o Options) (int, error) {
	kept := 0
	return kept, l.withVolumes(o, ledger.VolumeRestored, func(s *session) (act ledger.VolumeAct, err error) {
		v, err := s.volumes().Get(name)
		if err != nil {
			return act, err
		}
		if _, err := v.Snapshot(number); err != nil {
			return act, err
		}
		users, err := s.users(ctx, v)
		if err != nil {
			return act, err
		}
		if err := s.unwritten(ctx, v, users, lab.Generation{}); err != nil {
			return act, err
		}
		kept, err = s.volumes().Restore(ctx, name, number)
		return ledger.VolumeAct{Volume: name, Snapshot: number, Kept: kept}, err
	})
}

// at returns the snapshot with the number; 0 means what the volume holds now.
func (s *session) at(ctx context.Context, name string, number int) (volume.Snapshot, error) {
	if number == 0 {
		return s.cover(ctx, name)
	}
	v, err := s.volumes().Get(name)
	if err != nil {
		return volume.Snapshot{}, err
	}
	return v.Snapshot(number)
}

// CloneVolume makes a volume of its own of a snapshot, or of what the volume holds if
// number is 0. A machine that writes to it goes on. Errors: volume.ErrNotFound;
// volume.ErrExists; *VolumeInUseError if the provider cannot do that.
func (l *Lab) CloneVolume(ctx context.Context, name string, number int, as string, o Options) error {
	return l.withVolumes(o, ledger.VolumeCloned, func(s *session) (act ledger.VolumeAct, err error) {
		if _, err := s.volumes().Get(as); err == nil {
			return act, fmt.Errorf("cloning volume %s as %s: %w", name, as, volume.ErrExists)
		}
		from, err := s.at(ctx, name, number)
		if err != nil {
			return act, err
		}
		_, err = s.volumes().Clone(ctx, name, from, as)
		return ledger.VolumeAct{Volume: name, Snapshot: number, To: as}, err
	})
}

// RemoveVolume removes a volume with its snapshots, or one snapshot if number is not
// 0. Errors: volume.ErrNotFound; *VolumeInUseError if a machine that runs has it.
func (l *Lab) RemoveVolume(ctx context.Context, name string, number int, o Options) error {
	if number > 0 {
		return l.forgetSnapshot(ctx, name, number, o)
	}
	return l.withVolumes(o, ledger.VolumeRemoved, func(s *session) (ledger.VolumeAct, error) {
		act := ledger.VolumeAct{Volume: name}
		if err := s.idle(ctx, name); err != nil {
			return act, err
		}
		return act, s.volumes().Remove(ctx, name)
	})
}

// forgetSnapshot removes a snapshot. What lies below the file that a machine writes to
// is joined when that machine has stopped.
func (l *Lab) forgetSnapshot(ctx context.Context, name string, number int, o Options) error {
	return l.withVolumes(o, ledger.VolumeForgotten, func(s *session) (ledger.VolumeAct, error) {
		act := ledger.VolumeAct{Volume: name, Snapshot: number}
		v, err := s.volumes().Get(name)
		if err != nil {
			return act, err
		}
		users, err := s.users(ctx, v)
		if err != nil {
			return act, err
		}
		return act, s.volumes().Forget(ctx, name, number, opened(users))
	})
}

// ExportVolume writes a snapshot, or what the volume holds if number is 0, into a new
// file, in the format "qcow2" or "raw". Errors as CloneVolume.
func (l *Lab) ExportVolume(ctx context.Context, name string, number int, format, to string, o Options) error {
	return l.withVolumes(o, ledger.VolumeExported, func(s *session) (act ledger.VolumeAct, err error) {
		if err := volume.Exportable(to); err != nil {
			return act, fmt.Errorf("exporting volume %s: %w", name, err)
		}
		from, err := s.at(ctx, name, number)
		if err != nil {
			return act, err
		}
		if err := s.volumes().Export(ctx, name, from, format, to); err != nil {
			return act, fmt.Errorf("exporting volume %s: %w", name, err)
		}
		return ledger.VolumeAct{Volume: name, Snapshot: number, To: to}, nil
	})
}

// ImportVolume makes a volume of a disk image. want is what the Labfile says, if there is
// one: the volume is kept where its machines are to run.
func (l *Lab) ImportVolume(ctx context.Context, from, name string, want *lab.Lab, o Options) error {
	return l.withVolumes(o, ledger.VolumeImported, func(s *session) (act ledger.VolumeAct, err error) {
		opened := s.state.Opened
		if want != nil {
			if opened, err = s.host.choose(opened, want, len(s.state.Names()) > 0); err != nil {
				return act, fmt.Errorf("lab %s: %w", s.id, err)
			}
		}
		p, err := s.host.Provider(opened)
		if err != nil {
			return act, err
		}
		v, err := s.volumes().Import(ctx, from, name, placeOf(p))
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
			if err := s.volumes().Remove(ctx, v.Name); err != nil {
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
