// SPDX-License-Identifier: Apache-2.0

// Package volume keeps a lab's volumes: disks that outlive the generations of the
// machines that use them, with numbered snapshots that nothing changes any more.
//
// A volume is a chain of qcow2 files, kept where the lab's machines run, and a description that names them. A machine
// writes to the last file; a snapshot is the chain up to some file, and so is what
// machines read that do not write: nobody but the writer has the last file open. The
// files name no backing file: the description alone says what lies on what.
package volume

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/labfile/lab/internal/fsutil"
	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/providers/qcow2"
)

// Sentinel errors.
var (
	// ErrNotFound says that there is no such volume or snapshot.
	ErrNotFound = errors.New("no such volume")
	// ErrExists says that there is a volume of that name already.
	ErrExists = errors.New("there is such a volume already")
)

// The versions of a description. One has the oldest that tells all of it: an older lab
// would take a volume that is kept elsewhere for one of this host.
const (
	versionHere      = 1
	versionElsewhere = 2 // with At
)

// Volume is the description of a volume.
type Volume struct {
	Version   int        `json:"version"`
	Name      string     `json:"name"`
	Size      lab.Bytes  `json:"size"`            // virtual
	FS        string     `json:"fs"`              // "ext4" or "none"
	Owner     string     `json:"owner,omitempty"` // as last given to its root folder; empty if that was never done
	Mode      string     `json:"mode,omitempty"`
	Made      time.Time  `json:"made"`
	At        Place      `json:"at,omitzero"`         // where its files are
	Attached  Attachment `json:"attached,omitzero"`   // who had it last for writing
	Layers    []string   `json:"layers"`              // file names, lowest first; the last one is written to
	Next      int        `json:"next"`                // number of the next file
	Last      int        `json:"last,omitempty"`      // number of the newest snapshot that there ever was
	Snapshots []Snapshot `json:"snapshots,omitempty"` // oldest first

	// A machine may write to the last file but one, although the last one is there.
	Pushing bool `json:"pushing,omitempty"`
}

// Attachment is the generation that had a volume.
type Attachment struct {
	Machine    lab.Name `json:"machine"`
	Generation int      `json:"generation"`
	Born       string   `json:"born"` // tells generations apart that a destroyed lab and its successor number alike
}

// Snapshot is an earlier state of a volume. It never changes.
type Snapshot struct {
	Number    int       `json:"number"` // 0 if it is not kept: see Cover
	Taken     time.Time `json:"taken"`
	Why       string    `json:"why,omitempty"`
	Automatic bool      `json:"automatic,omitempty"` // taken by lab: old ones go
	Size      lab.Bytes `json:"size"`                // virtual
	Layers    []string  `json:"layers"`
}

// Snapshot returns the snapshot with the number.
func (v Volume) Snapshot(number int) (Snapshot, error) {
	for _, s := range v.Snapshots {
		if s.Number == number {
			return s, nil
		}
	}
	return Snapshot{}, fmt.Errorf("%w: %s@%d", ErrNotFound, v.Name, number)
}

// Store is the folder with the descriptions of a lab's volumes, and the files of those
// that are kept on this host. Whoever changes something holds the lab's lock; what is
// attached to a machine that runs is not to be changed.
type Store struct {
	dir    string
	keeper Keeper
}

// Open returns the store in dir, which the first volume makes. keeper finds what is kept
// elsewhere.
func Open(dir string, keeper Keeper) *Store { return &Store{dir, keeper} }

// described is the path of a volume's description.
func (s *Store) described(name string) string { return filepath.Join(s.dir, name+description) }

const description = ".json"

// Hold keeps other holders out until free is called: machines that start at once
// may have a volume in common.
func (s *Store) Hold(ctx context.Context) (free func(), err error) {
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		return nil, err
	}
	d, err := fsutil.LockDir(ctx, s.dir)
	if err != nil {
		return nil, err
	}
	return func() { d.Close() }, nil
}

// Names returns the names of the volumes, sorted, whatever their descriptions say.
func (s *Store) Names() ([]string, error) {
	entries, err := os.ReadDir(s.dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("listing volumes: %w", err)
	}
	var names []string
	for _, e := range entries {
		if name, ok := strings.CutSuffix(e.Name(), description); ok && lab.ValidLabel(name) {
			names = append(names, name)
		}
	}
	slices.Sort(names) // "a-b.json" comes before "a.json"
	return names, nil
}

// List returns the volumes, sorted by name.
func (s *Store) List() ([]Volume, error) {
	names, err := s.Names()
	if err != nil {
		return nil, err
	}
	var all []Volume
	for _, name := range names {
		v, err := s.Get(name)
		if err != nil {
			return nil, err
		}
		all = append(all, v)
	}
	return all, nil
}

// Get returns a volume, or ErrNotFound.
func (s *Store) Get(name string) (Volume, error) {
	var v Volume
	if !lab.ValidLabel(name) {
		return v, fmt.Errorf("%q is not the name of a volume", name)
	}
	text, err := os.ReadFile(s.described(name))
	if errors.Is(err, fs.ErrNotExist) {
		return v, fmt.Errorf("%w: %s", ErrNotFound, name)
	}
	if err != nil {
		return v, fmt.Errorf("reading volume %s: %w", name, err)
	}
	if err := json.Unmarshal(text, &v); err != nil {
		return v, fmt.Errorf("reading %s: %w", s.described(name), err)
	}
	if v.Version < versionHere || v.Version > versionElsewhere {
		return v, fmt.Errorf("%s has version %d, this lab knows version %d", s.described(name), v.Version, versionElsewhere)
	}
	if v.Name != name || len(v.Layers) == 0 {
		return v, fmt.Errorf("%s does not describe a volume %s", s.described(name), name)
	}
	for _, f := range v.files() {
		if f != filepath.Base(f) || !strings.HasPrefix(f, name+"@") {
			return v, fmt.Errorf("%s names a file that is not the volume's: %q", s.described(name), f)
		}
	}
	return v, nil
}

// files returns the files of a volume and its snapshots.
func (v Volume) files() []string {
	all := slices.Clone(v.Layers)
	for _, snap := range v.Snapshots {
		all = append(all, snap.Layers...)
	}
	slices.Sort(all)
	return slices.Compact(all)
}

// Taken returns what a volume takes on the disk of the host that keeps it, snapshots
// included.
func (s *Store) Taken(ctx context.Context, v Volume) (lab.Bytes, error) {
	files, err := s.files(ctx, v.At)
	if err != nil {
		return 0, err
	}
	var total lab.Bytes
	for _, f := range v.files() {
		_, takes, err := files.Usage(ctx, f)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return 0, fmt.Errorf("asking for the size of volume %s: %w", v.Name, err)
		}
		total += takes
	}
	return total, nil
}

// untouched reports whether nothing was written to the file that a machine writes to.
func (s *Store) untouched(ctx context.Context, v Volume) (bool, error) {
	files, err := s.files(ctx, v.At)
	if err != nil || v.Pushing {
		return false, err
	}
	length, _, err := files.Usage(ctx, v.Layers[len(v.Layers)-1])
	return err == nil && length <= qcow2.EmptySize, err
}

// Covered reports whether nothing was written to the last file, and there are others:
// they hold what the volume holds.
func (s *Store) Covered(ctx context.Context, v Volume) (bool, error) {
	if len(v.Layers) == 1 {
		return false, nil
	}
	return s.untouched(ctx, v)
}

// kept reports whether what the volume holds is a snapshot, or nothing at all.
func (s *Store) kept(ctx context.Context, v Volume) (bool, error) {
	if is, err := s.untouched(ctx, v); !is || err != nil {
		return false, err
	}
	below := v.Below().Layers
	return len(below) == 0 || slices.ContainsFunc(v.Snapshots, func(snap Snapshot) bool { return slices.Equal(snap.Layers, below) }), nil
}

// Below is what lies below the last file, as Cover returns it.
func (v Volume) Below() Snapshot {
	return Snapshot{Size: v.Size, Layers: slices.Clone(v.Layers[:len(v.Layers)-1])}
}

// newLayer takes the number of a file that is still to be made.
func (v *Volume) newLayer() string {
	v.Next++
	return fmt.Sprintf("%s@%d.qcow2", v.Name, v.Next)
}

// save writes the description, from where on it holds, and removes the files that
// it no longer names.
func (s *Store) save(ctx context.Context, v Volume) error {
	text, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	d, err := fsutil.NewDraftIn(s.dir, "."+v.Name+"@", s.described(v.Name), 0o600) // sweep knows the prefix
	if err != nil {
		return err
	}
	defer d.Drop()
	if _, err := d.Write(append(text, '\n')); err != nil {
		return err
	}
	if err := d.Commit(); err != nil {
		return err
	}
	// The change holds: what a host that went away has still, the next one sweeps.
	if err := s.sweep(ctx, v.Name, v.At, v.files()); v.At == (Place{}) {
		return err
	}
	return nil
}

// sweep removes the files of a volume that are not among those to keep: what an
// interrupted command left, and what nothing needs any more.
func (s *Store) sweep(ctx context.Context, name string, at Place, keep []string) error {
	places := []Place{{}} // copies of what is elsewhere are here
	if at != (Place{}) {
		places = append(places, at)
	}
	for _, place := range places {
		files, err := s.files(ctx, place)
		if err != nil {
			return err
		}
		there, err := files.List(ctx)
		if err != nil {
			return err
		}
		for _, file := range there {
			ours := strings.HasPrefix(strings.TrimPrefix(file, "."), name+"@")
			if ours && !slices.Contains(keep, file) {
				if err := files.Remove(ctx, file); err != nil {
					return err
				}
			}
		}
	}
	return nil
}
