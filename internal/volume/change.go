// SPDX-License-Identifier: Apache-2.0

package volume

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/labfile/lab/internal/fsutil"
	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/providers"
)

// KeepAutomatic is how many of the snapshots that lab took by itself a volume keeps.
const KeepAutomatic = 5

// Create makes an empty volume, with its file system, whose files are kept at a place.
func (s *Store) Create(ctx context.Context, want lab.Volume, at Place) (Volume, error) {
	v, err := s.create(ctx, want, at)
	if err != nil {
		return v, fmt.Errorf("making volume %s: %w", want.Name, err)
	}
	return v, nil
}

func (s *Store) create(ctx context.Context, want lab.Volume, at Place) (Volume, error) {
	v, err := s.begin(want.Name, at)
	if err != nil {
		return v, err
	}
	v.Size, v.FS = want.Size, want.FS
	err = s.found(ctx, &v, func(files providers.VolumeFiles, file string) error {
		switch v.FS {
		case "ext4":
			return s.put(ctx, v, files, file, func(to string) error { return s.makeExt4(ctx, v, to) })
		case "none":
			return files.Make(ctx, file, v.Size)
		}
		return fmt.Errorf("there is no file system %q; write ext4 or none", v.FS)
	})
	return v, err
}

// begin is the description of a volume that is to be made.
func (s *Store) begin(name string, at Place) (Volume, error) {
	v := Volume{Version: versionHere, Name: name, At: at, Made: time.Now().UTC().Round(0)}
	if at != (Place{}) {
		v.Version = versionElsewhere
	}
	if _, err := s.Get(name); err == nil {
		return v, ErrExists
	} else if !errors.Is(err, ErrNotFound) {
		return v, err
	}
	return v, os.MkdirAll(s.dir, 0o700)
}

// found has one new file made that holds all of a volume, and goes on from that.
func (s *Store) found(ctx context.Context, v *Volume, make func(files providers.VolumeFiles, file string) error) error {
	files, err := s.files(ctx, v.At)
	if err != nil {
		return err
	}
	file := v.newLayer()
	if err := make(files, file); err != nil {
		// Nobody may come again who would remove it.
		cleanup, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupTime)
		defer cancel()
		return errors.Join(err, files.Remove(cleanup, file))
	}
	v.Layers = []string{file}
	return s.save(ctx, *v)
}

// cleanupTime bounds what is done after an interruption.
const cleanupTime = 30 * time.Second

// put has a file written here and put where the volume's files are kept.
func (s *Store) put(ctx context.Context, v Volume, files providers.VolumeFiles, file string, write func(to string) error) error {
	scratch, err := s.scratch(v.Name)
	if err != nil {
		return err
	}
	defer os.Remove(scratch)
	if err := write(scratch); err != nil {
		return err
	}
	return files.Put(ctx, file, scratch)
}

// grown puts an empty file above the chain.
func (s *Store) grown(ctx context.Context, v *Volume) error {
	files, err := s.files(ctx, v.At)
	if err != nil {
		return err
	}
	file := v.newLayer()
	if err := files.Make(ctx, file, v.Size); err != nil {
		return err
	}
	v.Layers = append(slices.Clone(v.Layers), file)
	return nil
}

// Snapshot freezes what the volume holds now. It copies nothing.
func (s *Store) Snapshot(ctx context.Context, name, why string) (Snapshot, error) {
	v, err := s.Get(name)
	if err != nil {
		return Snapshot{}, err
	}
	snap, err := s.snapshot(ctx, &v, why, false)
	if err == nil {
		err = s.save(ctx, v)
	}
	if err != nil {
		return snap, fmt.Errorf("taking a snapshot of volume %s: %w", name, err)
	}
	return snap, nil
}

func (s *Store) snapshot(ctx context.Context, v *Volume, why string, automatic bool) (Snapshot, error) {
	snap, err := s.keep(v, v.Layers, why, automatic)
	if err != nil {
		return snap, err
	}
	return snap, s.grown(ctx, v)
}

// maxLayers is how many files a volume may lie on when another one is put on top under
// machines that run. libvirt's documents have one in another, of which libxml2 reads
// 256.
const maxLayers = 128

// deep returns a *DeepError if there are so many.
func (v Volume) deep() error {
	if len(v.Layers) < maxLayers {
		return nil
	}
	return &DeepError{v.Name}
}

// DeepError says that a volume lies on too many files: nobody joins them while a
// machine writes to it.
type DeepError struct{ Volume string }

// Error implements error.
func (e *DeepError) Error() string {
	return fmt.Sprintf("volume %s lies on %d files, one for each time that it was read or frozen since the machine that writes to it started", e.Volume, maxLayers)
}

// Hint is the next step.
func (e *DeepError) Hint() string {
	return "stop that machine and start it again: the files are joined then"
}

// Cover returns what a volume that no machine writes to holds, in files that nobody
// will write to: an empty one is put on top of them. It is no snapshot that is kept:
// the files stay for as long as the volume goes on from them or somebody has them open.
func (s *Store) Cover(ctx context.Context, name string) (Snapshot, error) {
	v, err := s.Get(name)
	if err != nil {
		return Snapshot{}, err
	}
	covered, err := s.Covered(ctx, v)
	if err != nil {
		return Snapshot{}, err
	}
	if !covered {
		if err := v.deep(); err != nil {
			return Snapshot{}, err
		}
		v.Pushing = false
		if err = s.grown(ctx, &v); err == nil {
			err = s.save(ctx, v)
		}
	}
	return v.Below(), err
}

// Push puts an empty file on top of a volume that a machine writes to, for that machine
// to write to from now on. Keep or Settle then end that; until they did, the machine
// may write to what lies below.
func (s *Store) Push(ctx context.Context, name string) (Volume, error) {
	v, err := s.Get(name)
	if err == nil {
		err = v.deep()
	}
	if err == nil {
		err = s.grown(ctx, &v)
	}
	if err != nil {
		return v, err
	}
	v.Pushing = true
	return v, s.save(ctx, v)
}

// Keep makes a snapshot of what lies below the file that Push put on top.
func (s *Store) Keep(ctx context.Context, name, why string) (Snapshot, error) {
	v, err := s.Get(name)
	if err != nil {
		return Snapshot{}, err
	}
	snap, err := s.keep(&v, v.Below().Layers, why, false)
	if err != nil {
		return snap, err
	}
	return snap, s.save(ctx, v)
}

// Settle notes that nobody writes any more to what lies below the file that Push put
// on top, which it returns as Cover does.
func (s *Store) Settle(ctx context.Context, name string) (Snapshot, error) {
	v, err := s.Get(name)
	if err != nil {
		return Snapshot{}, err
	}
	v.Pushing = false
	return v.Below(), s.save(ctx, v)
}

// keep makes a snapshot of files of the volume that nobody writes to.
func (s *Store) keep(v *Volume, layers []string, why string, automatic bool) (Snapshot, error) {
	v.Last++
	v.Pushing = false
	snap := Snapshot{
		Number: v.Last, Taken: time.Now().UTC().Round(0), Why: why, Automatic: automatic,
		Size: v.Size, Layers: layers,
	}
	if v.At == (Place{}) {
		if err := fsutil.SyncFile(folder(s.dir).Path(layers[len(layers)-1])); err != nil {
			return snap, err
		}
	}
	v.Snapshots = append(v.Snapshots, snap)
	return snap, nil
}

// Attach notes that a generation has the volume for writing from now on. If it is
// another one than before, what that left is kept as a snapshot first, which is
// returned.
func (s *Store) Attach(ctx context.Context, name string, to Attachment) (*Snapshot, error) {
	v, err := s.Get(name)
	if err != nil || v.Attached == to {
		return nil, err
	}
	var taken *Snapshot
	kept, err := s.kept(ctx, v)
	if err != nil {
		return nil, fmt.Errorf("attaching volume %s: %w", name, err)
	}
	if v.Attached.Generation > 0 && !kept {
		snap, err := s.snapshot(ctx, &v, fmt.Sprintf("before %s@%d", to.Machine, to.Generation), true)
		if err != nil {
			return nil, fmt.Errorf("taking a snapshot of volume %s: %w", name, err)
		}
		taken = &snap
	}
	v.Attached = to
	if err := s.save(ctx, v); err != nil {
		return nil, fmt.Errorf("attaching volume %s: %w", name, err)
	}
	return taken, nil
}

// Prepared notes the owner and mode that the root folder was given.
func (s *Store) Prepared(ctx context.Context, name, owner, mode string) error {
	v, err := s.Get(name)
	if err != nil || v.Owner == owner && v.Mode == mode {
		return err
	}
	v.Owner, v.Mode = owner, mode
	return s.save(ctx, v)
}

// Restore makes the volume what it was when the snapshot was taken. What it holds
// now becomes a snapshot itself, unless it is one already; its number is
// returned, or 0.
func (s *Store) Restore(ctx context.Context, name string, number int) (int, error) {
	v, err := s.Get(name)
	if err != nil {
		return 0, err
	}
	to, err := v.Snapshot(number)
	if err != nil {
		return 0, err
	}
	kept := 0
	is, err := s.kept(ctx, v)
	if err != nil {
		return 0, fmt.Errorf("restoring volume %s: %w", name, err)
	}
	if !is {
		snap, err := s.snapshot(ctx, &v, fmt.Sprintf("before %s@%d was restored", name, number), true)
		if err != nil {
			return 0, fmt.Errorf("restoring volume %s: %w", name, err)
		}
		kept = snap.Number
	}
	v.Layers, v.Size = to.Layers, to.Size
	if err := s.grown(ctx, &v); err != nil {
		return 0, fmt.Errorf("restoring volume %s: %w", name, err)
	}
	if err := s.save(ctx, v); err != nil {
		return 0, fmt.Errorf("restoring volume %s: %w", name, err)
	}
	return kept, nil
}

// Remove removes a volume with its snapshots. Removing what is absent succeeds.
func (s *Store) Remove(ctx context.Context, name string) error {
	if err := s.remove(ctx, name); err != nil {
		return fmt.Errorf("removing volume %s: %w", name, err)
	}
	_ = os.Remove(s.dir) // when it was the last one
	return nil
}

func (s *Store) remove(ctx context.Context, name string) error {
	if !lab.ValidLabel(name) {
		return fmt.Errorf("%q is not the name of a volume", name)
	}
	v, _ := s.Get(name) // a description that cannot be read is removed, too
	if v.At != (Place{}) {
		// The description says where the files are, and goes when they have gone.
		if err := s.sweep(ctx, name, v.At, nil); err != nil {
			return err
		}
	}
	if err := os.Remove(s.described(name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return s.sweep(ctx, name, Place{}, nil)
}

// Tidy removes the files at a place that are no volume's: a command that was killed while
// it made one left them.
func (s *Store) Tidy(ctx context.Context, at Place) error {
	files, err := s.files(ctx, at)
	if err != nil {
		return err
	}
	there, err := files.List(ctx)
	if err != nil {
		return fmt.Errorf("listing volumes %s: %w", at, err)
	}
	known, err := s.Names()
	if err != nil {
		return err
	}
	for _, file := range there {
		if name, _, ok := strings.Cut(file, "@"); ok && !slices.Contains(known, name) {
			if err := files.Remove(ctx, file); err != nil {
				return err
			}
		}
	}
	return nil
}

// Forget removes one snapshot. What only it needed goes; files are joined but for those
// that open says somebody has open, by their paths.
func (s *Store) Forget(ctx context.Context, name string, number int, open func(path string) bool) error {
	v, err := s.Get(name)
	if err != nil {
		return err
	}
	if _, err := v.Snapshot(number); err != nil {
		return err
	}
	v.Snapshots = slices.DeleteFunc(v.Snapshots, func(snap Snapshot) bool { return snap.Number == number })
	if err := s.save(ctx, v); err != nil {
		return fmt.Errorf("removing %s@%d: %w", name, number, err)
	}
	return s.merge(ctx, name, open)
}

// Thin removes all but the newest KeepAutomatic of the snapshots that lab took by
// itself, and joins files as Forget does.
func (s *Store) Thin(ctx context.Context, name string, open func(path string) bool) error {
	v, err := s.Get(name)
	if err != nil {
		return err
	}
	surplus := -KeepAutomatic
	for _, snap := range v.Snapshots {
		if snap.Automatic {
			surplus++
		}
	}
	if surplus <= 0 {
		return s.merge(ctx, name, open) // what an earlier one did not get done
	}
	v.Snapshots = slices.DeleteFunc(v.Snapshots, func(snap Snapshot) bool {
		if snap.Automatic && surplus > 0 {
			surplus--
			return true
		}
		return false
	})
	if err := s.save(ctx, v); err != nil {
		return fmt.Errorf("removing old snapshots of volume %s: %w", name, err)
	}
	return s.merge(ctx, name, open)
}

// merge joins files of which no snapshot needs the lower one alone. A file that
// stands in several chains stays as it is unless all of them go on the same way.
func (s *Store) merge(ctx context.Context, name string, open func(path string) bool) error {
	for {
		v, err := s.Get(name)
		if err != nil {
			return err
		}
		if len(v.Layers) < 3 {
			return nil
		}
		files, err := s.files(ctx, v.At)
		if err != nil {
			return err
		}
		chain, ok := v.mergeable(func(file string) bool { return open(files.Path(file)) })
		if !ok {
			return nil
		}
		// Whoever is interrupted here does it again: what the lower file says
		// where the upper one says something, too, nobody sees.
		if err := files.Commit(ctx, chain); err != nil {
			return fmt.Errorf("joining files of volume %s: %w", name, err)
		}
		v.without(chain[len(chain)-1])
		if err := s.save(ctx, v); err != nil {
			return fmt.Errorf("joining files of volume %s: %w", name, err)
		}
	}
}

// chains returns what the volume and its snapshots lie on.
func (v Volume) chains() [][]string {
	all := [][]string{v.Layers}
	for _, snap := range v.Snapshots {
		all = append(all, snap.Layers)
	}
	return all
}

// mergeable returns a chain whose last two files are nowhere one without the other and
// that nobody has open. The file that is written to stays on its own.
func (v Volume) mergeable(open func(file string) bool) (chain []string, ok bool) {
	for i := 0; i+2 < len(v.Layers); i++ {
		lower, upper := v.Layers[i], v.Layers[i+1]
		pair := !open(lower) && !open(upper)
		for _, chain := range v.chains() {
			if at := slices.Index(chain, lower); at >= 0 && (at+1 == len(chain) || chain[at+1] != upper) {
				pair = false
			}
		}
		if pair {
			return v.Layers[:i+2], true
		}
	}
	return nil, false
}

// without takes a file out of all chains.
func (v *Volume) without(file string) {
	cut := func(chain []string) []string {
		return slices.DeleteFunc(slices.Clone(chain), func(f string) bool { return f == file })
	}
	v.Layers = cut(v.Layers)
	for i := range v.Snapshots {
		v.Snapshots[i].Layers = cut(v.Snapshots[i].Layers)
	}
}
