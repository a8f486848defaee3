// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"

	"github.com/opencontainers/go-digest"

	"github.com/labfile/lab/boxes/source"
	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/labfile"
	"github.com/labfile/lab/providers"
)

// Boxes finds boxes: in the store, or where they come from.
type Boxes interface {
	Resolve(ctx context.Context, r source.Request) (source.Result, error)
}

// Image is what machines of a box are born from, and how one gets into them.
type Image struct {
	providers.Image
	Agent     bool   // carries lab-agent
	CloudInit bool   // reads a seed
	Vagrant   bool   // lets in the published keys, until it is told others
	User      string // whom to log in as
	MinMemory lab.Bytes
	From      string // where the box came from, as the Labfile says it

	Box     string      // digest of the box
	Layers  []lab.Layer // what is baked on top of the box
	Missing int         // how many of the layers, the last ones, are not baked yet
	limits  []lab.Bytes // how large the disk of each layer may be
}

// noLockError says that there is no lock file, and --locked wants one.
type noLockError struct{ name string }

func (e *noLockError) Error() string { return "there is no " + e.name }
func (e *noLockError) Unwrap() error { return ErrStaleLock }

// images resolves all boxes of the Labfile, as the lock file pins them, so that a
// lock file is never half written. What was not pinned yet is remembered for
// writeLock.
func (s *session) images(ctx context.Context, want *lab.Lab, o UpOptions) (map[string]Image, error) {
	path := labfile.LockPath(want.File)
	old, err := labfile.ReadLock(path)
	if err != nil {
		return nil, err
	}
	if stale := labfile.Stale(want, old); o.Locked && len(stale) > 0 {
		if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
			return nil, &noLockError{filepath.Base(path)}
		}
		return nil, fmt.Errorf("%w: %s: %s", ErrStaleLock, path, stale[0])
	}
	s.pins = old.Clone()
	images := map[string]Image{}
	for _, b := range want.Boxes {
		pinned, ok := s.pins.Boxes[b.Name]
		if !ok || pinned.From != b.From || pinned.Arch != runtime.GOARCH {
			pinned = labfile.LockedBox{}
		}
		img, entry, err := s.resolve(ctx, want, b, pinned)
		if err != nil {
			return nil, fmt.Errorf("box %q: %w", b.Name, err)
		}
		images[b.Name] = img
		if pinned != entry {
			s.pins.Boxes[b.Name] = entry
			s.pinned = append(s.pinned, LockChange{Box: b.Name, From: b.From, Old: pinned.Digest, New: entry.Digest})
		}
	}
	for name := range s.pins.Boxes {
		if !names(want.Boxes)[name] {
			delete(s.pins.Boxes, name)
			s.pinned = append(s.pinned, LockChange{Box: name, From: old.Boxes[name].From, Old: old.Boxes[name].Digest})
		}
	}
	return images, nil
}

func names(boxes []lab.Box) map[string]bool {
	set := map[string]bool{}
	for _, b := range boxes {
		set[b.Name] = true
	}
	return set
}

// resolve finds one box, as pinned if pinned has a digest.
func (s *session) resolve(ctx context.Context, want *lab.Lab, b lab.Box, pinned labfile.LockedBox) (Image, labfile.LockedBox, error) {
	checksum := b.Checksum
	if checksum == "" {
		checksum = pinned.Checksum
	}
	res, err := s.host.Boxes.Resolve(ctx, source.Request{
		Ref: b.From, Checksum: checksum, Pin: digest.Digest(pinned.Digest), BaseDir: filepath.Dir(want.File),
		Progress: func(text string, done, total int64) {
			s.emit(Event{Box: b.Name, Stage: StageBox, Text: text, Done: done, Total: total})
		},
	})
	if err != nil {
		return Image{}, labfile.LockedBox{}, err
	}
	img := imageFrom(res, b.From)
	entry := labfile.LockedBox{From: b.From, Arch: img.Arch, Digest: img.Digest, Checksum: res.Checksum}
	return img, entry, nil
}

// imageFrom returns what machines of a box are born from.
func imageFrom(res source.Result, from string) Image {
	c := res.Box.Config
	img := Image{
		Image: providers.Image{
			Digest: res.Box.Digest.String(), Arch: c.Architecture,
			Disk: res.Box.Disk.Path, Format: c.Format, Size: lab.Bytes(c.Size),
			Kernel: res.Box.Kernel.Path, Initrd: res.Box.Initrd.Path, Append: c.Append,
		},
		Agent: c.Agent, CloudInit: c.CloudInit, Vagrant: c.Vagrant, User: c.User,
		MinMemory: lab.Bytes(c.MinMemory), From: from,
	}
	img.Box = img.Digest
	if img.Arch == "" {
		img.Arch = runtime.GOARCH
	}
	return img
}

// writeLock writes the lock file if the boxes of this session are not pinned in
// it yet. A folder that can't be written to is worth a note, not a failure.
func (s *session) writeLock(want *lab.Lab) {
	if len(s.pinned) == 0 {
		return
	}
	path := labfile.LockPath(want.File)
	if err := labfile.WriteLock(path, s.pins); err != nil {
		s.emit(Event{Stage: StageNote, Text: fmt.Sprintf("the boxes are not pinned: %v", err), Err: err})
		return
	}
	for _, c := range s.pinned {
		if c.New != "" {
			s.emit(Event{Stage: StageNote, Text: fmt.Sprintf("pinned box %s to %s in %s", c.Box, c.New, filepath.Base(path))})
		}
	}
}

// LockChange is a change to one entry of the lock file.
type LockChange struct {
	Box  string `json:"box"`
	From string `json:"from"`
	Old  string `json:"old,omitempty"` // digest; empty if the box was not pinned
	New  string `json:"new,omitempty"` // digest; empty if the Labfile no longer has the box
}

// PinBoxes writes the lock file of want. With update, boxes that are pinned
// already are looked up anew; this is the only thing that ever moves a pin.
func (l *Lab) PinBoxes(ctx context.Context, want *lab.Lab, update bool, o Options) ([]LockChange, error) {
	s := &session{Lab: l, opt: o}
	path := labfile.LockPath(want.File)
	old, err := labfile.ReadLock(path)
	if err != nil {
		return nil, err
	}
	s.pins = old.Clone()
	if update {
		s.pins.Boxes = map[string]labfile.LockedBox{}
		for _, b := range want.Boxes {
			_, entry, err := s.resolve(ctx, want, b, labfile.LockedBox{})
			if err != nil {
				return nil, fmt.Errorf("box %q: %w", b.Name, err)
			}
			s.pins.Boxes[b.Name] = entry
		}
		s.pinned = changes(old, s.pins)
	} else if _, err := s.images(ctx, want, UpOptions{Options: o}); err != nil {
		return nil, err
	}
	if len(s.pinned) == 0 {
		return nil, nil
	}
	return s.pinned, labfile.WriteLock(path, s.pins)
}

// changes says how the lock file changed.
func changes(old, now labfile.Lock) []LockChange {
	var cs []LockChange
	for name, b := range now.Boxes {
		if b != old.Boxes[name] {
			cs = append(cs, LockChange{Box: name, From: b.From, Old: old.Boxes[name].Digest, New: b.Digest})
		}
	}
	for name, b := range old.Boxes {
		if _, ok := now.Boxes[name]; !ok {
			cs = append(cs, LockChange{Box: name, From: b.From, Old: b.Digest})
		}
	}
	return cs
}
