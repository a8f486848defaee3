// SPDX-License-Identifier: Apache-2.0

package supervise

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/labfile/lab/internal/guest/agentapi"
	"github.com/labfile/lab/internal/share"
	"github.com/labfile/lab/providers"
)

// mount is a folder of the host that a machine sees.
type mount struct {
	Mount
	old   bool          // the machine has had it before: it is tried until it works
	tried chan struct{} // closed when the agent has mounted it, or refused to
	err   error         // why it refused; valid once tried is closed

	served  bool          // the guest has it mounted; under machine.mu
	changed chan struct{} // closed and replaced when served changes; likewise
}

// mount carries out a request.
func (s *supervisor) mount(ctx context.Context, q request) error {
	m, err := s.asked(ctx, q)
	if err != nil {
		return err
	}
	if _, ok := s.cfg.Provider.(providers.AgentDialer); (!ok || !m.spec.Agent) && s.cfg.Folder == nil {
		return fmt.Errorf("machine %q: %w", m.spec.Generation.Machine, ErrNoAgent)
	}
	// One after the other: one may be mounted in another.
	for _, want := range q.Mounts {
		f := m.keepMounts([]Mount{want}, false)[0]
		select {
		case <-f.tried:
		case <-m.ctx.Done():
			return fmt.Errorf("machine %q: %w", m.spec.Generation.Machine, ErrNotPlugged)
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		if f.err != nil {
			return fmt.Errorf("mounting %s at %s: %w", f.From, f.To, f.err)
		}
	}
	return nil
}

// keepMounts serves folders for as long as the machine runs; those that are served
// already stay.
func (m *machine) keepMounts(want []Mount, old bool) []*mount {
	m.mu.Lock()
	defer m.mu.Unlock()
	var out []*mount
	for _, w := range want {
		i := slices.IndexFunc(m.mounts, func(f *mount) bool { return f.Mount == w })
		if i >= 0 {
			out = append(out, m.mounts[i])
			continue
		}
		f := &mount{Mount: w, old: old, tried: make(chan struct{}), changed: make(chan struct{})}
		m.mounts = append(m.mounts, f)
		out = append(out, f)
		if m.ctx.Err() == nil { // else its end may be waited for
			m.wg.Go(func() { m.keepMount(f) })
		}
	}
	return out
}

// The agent is not asked more often than this, and ever more rarely if it refuses.
const (
	mountPause = 50 * time.Millisecond
	mountMost  = 10 * time.Second
)

// outerTime is how long a folder waits for the one that it is in.
const outerTime = 30 * time.Second

// keepMount serves a folder, over one stream after the other.
func (m *machine) keepMount(f *mount) {
	met := false
	for wait := mountPause; ; wait = min(2*wait, mountMost) {
		if !m.awaitOuter(f) {
			return
		}
		began := time.Now()
		err := m.serveMount(f, func() {
			m.setServed(f, true)
			if !met {
				met = true
				close(f.tried)
			}
		})
		m.setServed(f, false)
		var refused *agentapi.RefusedError
		if errors.As(err, &refused) && !met && !f.old { // whoever asked for it is told, and may ask again
			m.mu.Lock()
			m.mounts = slices.DeleteFunc(m.mounts, func(other *mount) bool { return other == f })
			close(f.changed) // nobody is to wait for it any more
			m.mu.Unlock()
			f.err = errors.New(refused.Reason)
			close(f.tried)
			return
		}
		if m.ctx.Err() == nil {
			m.s.log.Debug("a folder is no longer served", "machine", m.spec.Generation, "folder", f.To, "err", err)
		}
		if time.Since(began) > mountMost {
			wait = mountPause
		}
		if !m.sleep(wait) {
			return
		}
	}
}

// awaitOuter waits until the folders are mounted in which this one is: a guest that
// starts again has none of them, and one mounted later would hide it. One that stays away
// is not waited for for ever. It reports whether the machine still runs.
func (m *machine) awaitOuter(f *mount) bool {
	late := time.NewTimer(outerTime)
	defer late.Stop()
	for {
		m.mu.Lock()
		var changed chan struct{}
		for _, o := range m.mounts {
			if !o.served && strings.HasPrefix(f.To, strings.TrimSuffix(o.To, "/")+"/") {
				changed = o.changed
			}
		}
		m.mu.Unlock()
		if changed == nil {
			return m.ctx.Err() == nil
		}
		select {
		case <-changed:
		case <-late.C:
			m.s.log.Warn("a folder is mounted before the one that it is in", "machine", m.spec.Generation, "folder", f.To)
			return true
		case <-m.ctx.Done():
			return false
		}
	}
}

func (m *machine) setServed(f *mount, served bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if f.served == served {
		return
	}
	f.served = served
	close(f.changed)
	f.changed = make(chan struct{})
}

// serveMount makes the guest mount a folder, and serves it until the connection ends.
func (m *machine) serveMount(f *mount, mounted func()) error {
	folder := agentapi.Folder{Path: f.To, Writable: f.Writable, Owner: f.Owner, Source: "host:" + f.From}
	open := m.openMount
	if !m.spec.Agent && m.s.cfg.Folder != nil {
		open = func(folder agentapi.Folder) (io.ReadWriteCloser, error) {
			return m.s.cfg.Folder(m.ctx, m.spec.Generation, folder, m.dial)
		}
	}
	conn, err := open(folder)
	if err != nil {
		return err
	}
	mounted()
	defer context.AfterFunc(m.ctx, func() { conn.Close() })()
	if m.spec.Agent {
		ctx, cancel := context.WithCancel(m.ctx)
		defer cancel()
		m.wg.Go(func() { m.serveCache(ctx, f, folder) })
	}
	return share.Serve(conn, share.Folder{Path: f.From, Writable: f.Writable})
}

// serveCache tells the guest of the folder in advance, for as long as it is served. An
// agent of an earlier lab refuses it, and does without.
func (m *machine) serveCache(ctx context.Context, f *mount, folder agentapi.Folder) {
	for wait := mountPause; ctx.Err() == nil; wait = min(2*wait, mountMost) {
		conn, err := m.openAgent(ctx)
		if err != nil {
			return
		}
		if err = agentapi.BeginCache(ctx, conn, folder); err != nil {
			conn.Close()
			var refused *agentapi.RefusedError
			if errors.As(err, &refused) {
				m.s.log.Debug("a folder is served without a cache", "machine", m.spec.Generation, "folder", f.To, "err", err)
				return
			}
		} else {
			stop := context.AfterFunc(ctx, func() { conn.Close() })
			err = share.ServeCache(conn, share.Folder{Path: f.From, Writable: f.Writable})
			stop()
			m.s.log.Debug("the cache of a folder ended", "machine", m.spec.Generation, "folder", f.To, "err", err)
		}
		if !m.pause(ctx, wait) {
			return
		}
	}
}

// openMount asks the agent to mount a folder.
func (m *machine) openMount(f agentapi.Folder) (io.ReadWriteCloser, error) {
	conn, err := m.openAgent(m.ctx)
	if err != nil {
		return nil, err
	}
	if err := agentapi.BeginMount(m.ctx, conn, f); err != nil {
		conn.Close()
		return nil, err
	}
	return conn, nil
}
