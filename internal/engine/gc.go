// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/ledger"
	"github.com/labfile/lab/internal/supervise"
	"github.com/labfile/lab/providers"
)

// Garbage is something that no lab needs any more.
type Garbage struct {
	Kind  string    `json:"kind"` // "machine", "lab", "network", "runtime", "download", "image"
	Name  string    `json:"name"` // a generation ("shop-1f3a9c2b web@3"), a lab and where it has networks, or a path
	Bytes lab.Bytes `json:"bytes"`
	Why   string    `json:"why"`
}

// staleDownload is the age from which a partial download is no longer expected
// to be resumed.
const staleDownload = 7 * 24 * time.Hour

// GC finds what interrupted commands, crashes and deleted files left behind,
// and removes it unless dryRun is set. Labs that a command works on are left
// alone. It never touches what a ledger still speaks of, nor boxes: these are
// pruned on their own.
func (h *Host) GC(ctx context.Context, dryRun bool) ([]Garbage, error) {
	ids, err := h.ids(ctx)
	if err != nil {
		return nil, err
	}
	var (
		found []Garbage
		errs  []error
	)
	for _, id := range ids {
		g, err := h.Lab(id).gc(ctx, dryRun)
		found = append(found, g...)
		if err != nil {
			errs = append(errs, fmt.Errorf("lab %s: %w", id, err))
		}
	}
	networks, err := h.gcNetworks(ctx, dryRun)
	found, errs = append(found, networks...), append(errs, err)
	runtime, err := h.gcRuntime(dryRun)
	found, errs = append(found, runtime...), append(errs, err)
	partial, err := h.gcDownloads(dryRun)
	found, errs = append(found, partial...), append(errs, err)
	copies, err := h.gcCopies(ctx, dryRun)
	found, errs = append(found, copies...), append(errs, err)
	return found, errors.Join(errs...)
}

// gc looks for generations that the lab's ledger does not speak of, and for a
// lab that has neither ledger nor machines.
func (l *Lab) gc(ctx context.Context, dryRun bool) (found []Garbage, err error) {
	err = l.whenFree(func() error {
		found, err = l.gcLocked(ctx, dryRun)
		return err
	})
	return found, err
}

func (l *Lab) gcLocked(ctx context.Context, dryRun bool) ([]Garbage, error) {
	state, err := l.read()
	if err != nil {
		return nil, err
	}
	var (
		found []Garbage
		left  int
		errs  []error
	)
	candidates, err := l.candidates(state.Opened)
	if err != nil {
		return nil, err
	}
	for _, p := range candidates {
		all, err := p.List(ctx, l.id)
		if errors.Is(err, providers.ErrIncapable) && (!p.known || l.book.Exists()) {
			continue // a provider that this host does not have, or another host that is off
		}
		if err != nil {
			return found, errors.Join(append(errs, err)...) // there may be machines
		}
		for _, m := range all {
			if why := needless(state, m); why != "" {
				found = append(found, Garbage{Kind: "machine", Name: fmt.Sprintf("%s %s", l.id, m.Generation), Bytes: m.Disk, Why: why})
				if !dryRun {
					errs = append(errs, p.Destroy(ctx, m.Generation))
				}
				continue
			}
			left++
		}
	}
	dir := l.host.Dirs.Lab(l.id)
	kept, err := l.volumes().Names()
	if err != nil {
		return found, errors.Join(append(errs, err)...)
	}
	if _, err := os.Stat(dir); err == nil && left == 0 && !l.book.Exists() && len(kept) == 0 {
		found = append(found, Garbage{Kind: "lab", Name: dir, Bytes: size(dir), Why: "it has neither a ledger nor machines"})
		if !dryRun {
			errs = append(errs, os.RemoveAll(dir))
		}
	}
	return found, errors.Join(errs...)
}

// needless says why nobody needs the generation; empty if somebody may.
func needless(state ledger.State, m providers.Machine) string {
	rec, ok := state.Machines[m.Machine]
	switch {
	case !ok && lab.BakeName(m.Machine):
		return "an interrupted bake left it"
	case !ok && len(state.Machines) > 0:
		return "the ledger does not know it"
	case !ok:
		return "" // a lost ledger: "lab destroy" and "lab up" know what to do
	case rec.Phase != ledger.PhaseGone && kept(rec, m.Number):
		return ""
	case forgotten(rec, m.Number):
		return "" // it failed, and the next command keeps it
	case rec.Standby != nil && m.Number == rec.Standby.Generation:
		return fmt.Sprintf("it never took over from generation %d", rec.Generation)
	case m.Number < rec.Generation && rec.Ready.IsZero() && (rec.Phase != ledger.PhaseGone || lived(rec, m.Number)):
		return "" // what was to take its place was never ready: the next command may go back to it
	case outgoing(rec, m.Number):
		return "" // the next command retires it
	case m.Number < rec.Generation:
		return fmt.Sprintf("generation %d has taken its place", rec.Generation)
	case rec.Phase == ledger.PhaseGone:
		return "it was destroyed, half"
	}
	return ""
}

// outgoing reports whether a generation gave way, is to be kept, and was not retired
// yet because a command was killed.
func outgoing(rec ledger.Machine, number int) bool {
	if rec.Phase == ledger.PhaseGone || rec.Create.Spec.Machine(rec.Name).Replace.Keep < 1 {
		return false
	}
	return slices.Contains(recorded(rec, nil).Outgoing, number)
}

// forgotten reports whether a generation failed beside the present one and is to be kept,
// which is not recorded yet.
func forgotten(rec ledger.Machine, number int) bool {
	other, ok := rec.Of(number)
	return ok && failedBeside(rec, other)
}

// lived reports whether a generation that is not the present one was ready once, and was
// not retired.
func lived(rec ledger.Machine, number int) bool {
	p, ok := rec.Of(number)
	return ok && !p.Retired && !p.Ready.IsZero()
}

// kept reports whether a generation that is not the present one is kept on purpose.
func kept(rec ledger.Machine, number int) bool {
	p, _ := rec.Of(number)
	return p.Retired
}

// gcNetworks looks for networks of labs that are no more, in which there are no machines.
func (h *Host) gcNetworks(ctx context.Context, dryRun bool) ([]Garbage, error) {
	var found []Garbage
	err := eachOf(h, func(name string, n providers.Networker) error {
		all, err := n.Networked(ctx)
		errs := []error{err}
		for _, at := range all {
			unused, err := h.removeUnused(ctx, name, at, dryRun)
			if err != nil {
				errs = append(errs, fmt.Errorf("networks of lab %s: %w", at.Lab, err))
			} else if unused {
				found = append(found, Garbage{Kind: "network", Name: fmt.Sprintf("%s at %s", at.Lab, at.URI), Why: "its lab is gone"})
			}
		}
		return errors.Join(errs...)
	})
	return found, err
}

// removeUnused removes the networks that a lab has at a daemon if it has nothing else, and
// reports whether that is so.
func (h *Host) removeUnused(ctx context.Context, provider string, at providers.Networked, dryRun bool) (unused bool, err error) {
	p, err := h.Provider(ledger.Opened{Provider: provider, URI: at.URI})
	if err != nil {
		return false, err
	}
	n, ok := p.(providers.Networker)
	if !ok {
		return false, nil
	}
	l := h.Lab(at.Lab)
	gone := func() (bool, error) {
		if _, err := os.Stat(h.Dirs.Lab(at.Lab)); err == nil { // a lab has a folder before it has networks
			return false, nil
		}
		machines, err := p.List(ctx, at.Lab)
		return len(machines) == 0, err // else "lab destroy" knows what to do
	}
	if unused, err = gone(); err != nil || !unused || dryRun {
		return unused && !l.locked(), err
	}
	unused = false
	err = l.whenFree(func() error {
		if unused, err = gone(); err != nil || !unused { // somebody may have had the lock until now
			return err
		}
		return n.RemoveNetworks(ctx, at.Lab)
	})
	return unused, err
}

// eachOf calls do with the providers that can do what T says, in the order of their names,
// and joins the errors.
func eachOf[T any](h *Host, do func(name string, p T) error) error {
	var errs []error
	for _, name := range slices.Sorted(maps.Keys(h.Providers)) {
		if p, ok := h.Providers[name].(T); ok {
			errs = append(errs, do(name, p))
		}
	}
	return errors.Join(errs...)
}

// whenFree calls do with the lab locked, and does nothing while a command works on it.
func (l *Lab) whenFree(do func() error) error {
	lk, err := l.acquire("lab gc")
	var busy *LockedError
	if errors.As(err, &busy) {
		return nil
	}
	if err != nil {
		return err
	}
	defer lk.release()
	return do()
}

// gcRuntime looks for runtime directories of labs that are no more. A lab of
// another data directory may have its sockets there, too: what somebody locks or
// listens on is in use.
func (h *Host) gcRuntime(dryRun bool) ([]Garbage, error) {
	judge := func(e fs.DirEntry) (kind, why string) {
		if !lab.ValidLabel(e.Name()) || h.Lab(lab.ID(e.Name())).locked() || h.inUse(lab.ID(e.Name())) {
			return "", ""
		}
		return "runtime", "its lab is gone"
	}
	return sweep(h.Dirs.Run, dryRun, judge, func(path string) (gone bool, err error) {
		id := lab.ID(filepath.Base(path))
		err = h.Lab(id).whenFree(func() error {
			if h.inUse(id) { // by whoever had the lock until now
				return nil
			}
			gone = true
			return os.RemoveAll(path)
		})
		return gone, err
	})
}

// socketTimeout bounds how long a unix socket may take to accept a connection.
const socketTimeout = 250 * time.Millisecond

// inUse reports whether the runtime directory of a lab belongs to somebody: to a
// lab of this data directory, to a supervisor, or to a process that listens on a
// socket in it.
func (h *Host) inUse(id lab.ID) bool {
	if _, err := os.Stat(h.Dirs.Lab(id)); err == nil || supervise.Alive(h.Dirs, id) {
		return true
	}
	entries, err := os.ReadDir(h.Dirs.RunLab(id))
	if err != nil {
		return false // a plain file, or gone
	}
	for _, e := range entries {
		if e.Type()&fs.ModeSocket == 0 {
			continue
		}
		conn, err := net.DialTimeout("unix", filepath.Join(h.Dirs.RunLab(id), e.Name()), socketTimeout)
		if err == nil {
			conn.Close()
		}
		// Whoever listens but has no time to answer listens all the same.
		if !errors.Is(err, syscall.ECONNREFUSED) && !errors.Is(err, fs.ErrNotExist) {
			return true
		}
	}
	return false
}

// gcCopies removes copies of images that providers keep where machines run.
func (h *Host) gcCopies(ctx context.Context, dryRun bool) ([]Garbage, error) {
	var found []Garbage
	err := eachOf(h, func(_ string, p providers.Pruner) error {
		copies, err := p.Prune(ctx, dryRun)
		for _, c := range copies {
			found = append(found, Garbage{Kind: "image", Name: c.Name, Bytes: c.Size, Why: "no machine there is born from it"})
		}
		return err
	})
	return found, err
}

// gcDownloads looks for partial downloads that nobody came back for.
func (h *Host) gcDownloads(dryRun bool) ([]Garbage, error) {
	return sweep(h.Dirs.Downloads(), dryRun, func(e fs.DirEntry) (kind, why string) {
		info, err := e.Info()
		if err != nil || time.Since(info.ModTime()) < staleDownload {
			return "", ""
		}
		return "download", "it was never finished"
	}, func(path string) (bool, error) { return true, os.RemoveAll(path) })
}

// sweep removes the entries of dir for which judge gives a reason. remove reports
// whether the entry was garbage still.
func sweep(
	dir string, dryRun bool, judge func(fs.DirEntry) (kind, why string), remove func(path string) (bool, error),
) ([]Garbage, error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var (
		found []Garbage
		errs  []error
	)
	for _, e := range entries {
		kind, why := judge(e)
		if why == "" {
			continue
		}
		path := filepath.Join(dir, e.Name())
		garbage := Garbage{Kind: kind, Name: path, Bytes: size(path), Why: why}
		if !dryRun {
			ok, err := remove(path)
			errs = append(errs, err)
			if !ok {
				continue
			}
		}
		found = append(found, garbage)
	}
	return found, errors.Join(errs...)
}

// size adds up the files below path.
func size(path string) lab.Bytes {
	var total lab.Bytes
	_ = filepath.WalkDir(path, func(_ string, d fs.DirEntry, err error) error {
		if err != nil {
			return nil //nolint:nilerr // what vanishes meanwhile has no size
		}
		if info, err := d.Info(); err == nil && info.Mode().IsRegular() {
			total += lab.Bytes(info.Size())
		}
		return nil
	})
	return total
}

// Doctor says what the host lacks, as the provider at uri, or at its default address,
// sees it.
func (h *Host) Doctor(ctx context.Context, provider, uri string) ([]providers.Finding, error) {
	p, err := h.Provider(ledger.Opened{Provider: provider, URI: uri})
	if err != nil {
		return nil, err
	}
	return p.Check(ctx)
}

// BoxesInUse returns the digests of the boxes and images of every lab's machines:
// what a prune must keep.
func (h *Host) BoxesInUse(ctx context.Context) ([]string, error) {
	ids, err := h.ids(ctx)
	if err != nil {
		return nil, err
	}
	var used []string
	for _, id := range ids {
		state, err := h.Lab(id).read()
		var damaged *ledger.CorruptError
		if err != nil && !errors.As(err, &damaged) {
			return nil, err
		}
		for _, m := range state.Machines {
			if m.Phase != ledger.PhaseGone {
				used = append(used, m.Create.Image)
				if m.Create.Box != "" {
					used = append(used, m.Create.Box)
				}
			}
			others := m.Past
			if m.Standby != nil {
				others = append(slices.Clone(others), *m.Standby)
			}
			for _, o := range others { // their disks stand on layers, and those on the box
				if o.Create.Box != "" {
					used = append(used, o.Create.Box)
				}
			}
		}
	}
	for _, p := range h.Providers {
		all, err := p.List(ctx, "")
		if errors.Is(err, providers.ErrIncapable) {
			continue // a provider that this host does not have
		}
		if err != nil {
			return nil, err // a prune would take what it cannot see
		}
		for _, m := range all {
			used = append(used, m.Image)
		}
	}
	slices.Sort(used)
	return slices.Compact(used), nil
}
