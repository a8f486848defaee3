// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/ledger"
	"github.com/labfile/lab/internal/volume"
)

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
	Problem    string           `json:"problem,omitempty"`    // why Taken and InUse could not be told
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
		err := s.weigh(ctx, v, &st)
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		if err != nil { // a host that is off takes nothing from what is known here
			st.Problem = err.Error()
		}
		for _, snap := range v.Snapshots {
			st.Snapshots = append(st.Snapshots, VolumeSnapshot{snap.Number, snap.Taken, snap.Why, snap.Automatic, snap.Size})
		}
		out = append(out, st)
	}
	return out, nil
}

// VolumeNames returns what the lab's volumes and their snapshots are called: "db", "db@3".
// It asks nobody.
func (l *Lab) VolumeNames() ([]string, error) {
	all, err := l.volumes().List()
	if err != nil {
		return nil, err
	}
	var names []string
	for _, v := range all {
		names = append(names, v.Name)
		for _, snap := range v.Snapshots {
			names = append(names, fmt.Sprintf("%s@%d", v.Name, snap.Number))
		}
	}
	return names, nil
}

// weigh finds out what a volume takes and who has it.
func (s *session) weigh(ctx context.Context, v volume.Volume, st *VolumeStatus) (err error) {
	if st.Taken, err = s.volumes().Taken(ctx, v); err != nil {
		return err
	}
	users, err := s.users(ctx, v)
	for _, u := range users {
		st.InUse = append(st.InUse, u.generation.String())
	}
	return err
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
	if !l.book.Exists() {
		l.forget()
		return err
	}
	if err != nil {
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
		v, err := s.volumes().Import(ctx, from, name, declared(want, name), placeOf(p))
		if err == nil && want != nil && !s.book.Exists() {
			opened.Name, opened.File, opened.Folder = want.Name, want.File, folderOf(want.File)
			err = s.writeOrigin(opened)
		}
		return ledger.VolumeAct{Volume: name, From: from, Size: v.Size}, err
	})
}

// declared returns what a Labfile says of a volume, nil if nothing.
func declared(l *lab.Lab, name string) *lab.Volume {
	if l == nil {
		return nil
	}
	for _, m := range l.Machines {
		for _, v := range m.Volumes {
			if v.Name == name {
				return &v
			}
		}
	}
	return nil
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
		if path != d.Volumes(s.id) && path != d.Origin(s.id) && path != d.Ledger(s.id) {
			paths = append(paths, path)
		}
	}
	return append(paths, d.Ledger(s.id)), nil
}
