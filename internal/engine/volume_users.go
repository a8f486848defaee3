// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"fmt"
	"slices"

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
// keeps the volume, or is known to have machines of the lab, must answer: a daemon that is
// down leaves its machines running, and nothing locks files against removal.
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
			asked = append(asked, candidate{Provider: p, known: true})
		}
	}
	for _, p := range asked {
		all, err := p.List(ctx, s.id)
		if err != nil && ctx.Err() == nil && !p.known {
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
