// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/labfile/lab/internal/guest"
	"github.com/labfile/lab/internal/guest/agentapi"
	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/ledger"
	"github.com/labfile/lab/internal/supervise"
	"github.com/labfile/lab/providers"
)

// mountable says what is wrong with a machine's mounts, before anything is changed.
func mountable(m lab.Machine) []error {
	var errs []error
	if len(m.Mounts) > providers.MaxMounts {
		errs = append(errs, fmt.Errorf("%d mounts; a machine can have %d", len(m.Mounts), providers.MaxMounts))
	}
	for _, f := range m.Mounts {
		st, err := os.Stat(f.From)
		switch {
		case errors.Is(err, os.ErrNotExist):
			errs = append(errs, fmt.Errorf("mount at %s: there is no folder %s; make it, or correct %q", f.To, f.From, "from"))
		case err != nil:
			errs = append(errs, fmt.Errorf("mount at %s: %w", f.To, err))
		case !st.IsDir():
			errs = append(errs, fmt.Errorf("mount at %s: %s is not a folder; mount the folder that it is in, or put the file into the image by a provision step (file: …)", f.To, f.From))
		}
	}
	return errs
}

// outermost returns the mounts in the order in which they are mounted: one that is
// within another comes after it.
func outermost(m lab.Machine) []lab.Mount {
	mounts := slices.Clone(m.Mounts)
	slices.SortStableFunc(mounts, func(a, b lab.Mount) int { return strings.Compare(a.To, b.To) })
	return mounts
}

// shared are the machine's mounts as its supervisor serves them.
func shared(m lab.Machine, c ledger.Create) []supervise.Mount {
	var out []supervise.Mount
	for _, f := range outermost(m) {
		out = append(out, supervise.Mount{From: resolved(f.From), To: f.To, Writable: f.Writable, Owner: cmp.Or(f.Owner, user(c))})
	}
	return out
}

// resolved is a folder's path without links: what is shared is what it leads to now, and
// nothing that it is made to lead to later.
func resolved(folder string) string {
	if path, err := filepath.EvalSymlinks(folder); err == nil {
		return path
	}
	return folder // that it is not there is said elsewhere
}

// within reports whether a folder lies in another one, or is that one if equal is set.
func within(folder, above string, equal bool) bool {
	rel, err := filepath.Rel(above, folder)
	if err != nil || rel == ".." || strings.HasPrefix(rel, "../") {
		return false
	}
	return rel != "." || equal
}

// confined says which mounts of a lab would let a guest reach more than they show: a
// guest that writes to a folder chooses what paths into it lead to, and with lab's own
// files what lab does.
func (l *Lab) confined(want *lab.Lab) []error {
	var errs []error
	own := []string{resolved(l.host.Dirs.Data), resolved(l.host.Dirs.Run)}
	for _, m := range want.Machines {
		for _, f := range m.Mounts {
			from := resolved(f.From)
			for _, other := range want.Machines {
				for _, o := range other.Mounts {
					if o.Writable && within(from, resolved(o.From), false) {
						errs = append(errs, fmt.Errorf("machine %q: mount at %s: %s lies in %s, which machine %q may write to; mount the outer folder alone, or let it be read-only", m.Name, f.To, f.From, o.From, other.Name))
					}
				}
			}
			for _, dir := range own {
				if f.Writable && (within(dir, from, true) || within(from, dir, true)) {
					errs = append(errs, fmt.Errorf("machine %q: mount at %s: %s cannot be writable, since lab keeps its own files in %s", m.Name, f.To, f.From, dir))
				}
			}
		}
	}
	return errs
}

// mountFolders mounts folders of the host in the guest: through its agent or, where
// there is none, through one that is handed to it for this alone. What is mounted already stays.
func (s *session) mountFolders(ctx context.Context, target guest.Target, g lab.Generation, m lab.Machine, c ledger.Create) error {
	if len(m.Mounts) == 0 {
		return nil
	}
	if !c.Agent {
		if err := s.awaitLogin(ctx, target, g, "mounting folders of this host"); err != nil {
			return err
		}
	}
	for _, f := range m.Mounts {
		s.emit(Event{Machine: g.Machine, Generation: g.Number, Stage: StageIdentity, Text: "mounting " + describe(f)})
	}
	super, err := s.supervisor(ctx)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, mountTime, fmt.Errorf("the guest did not mount its folders within %s; %s has more", mountTime, s.host.Dirs.SupervisorLog(s.id)))
	defer cancel()
	err = super.Mount(ctx, g, shared(m, c))
	if err != nil && strings.Contains(err.Error(), "knows no such stream") {
		return fmt.Errorf("%w: its image is from before lab could mount folders; take a newer one (\"lab lock --update\")", err)
	}
	return err
}

func describe(f lab.Mount) string {
	if f.Writable {
		return f.From + " at " + f.To + ", writable"
	}
	return f.From + " at " + f.To + ", read-only"
}

// Folder makes a machine without an agent mount a folder: see supervise.Config.
func (l *Lab) Folder(ctx context.Context, g lab.Generation, f agentapi.Folder, dial func(context.Context, uint16) (net.Conn, error)) (io.ReadWriteCloser, error) {
	var agent []byte
	if l.host.Agent != nil {
		agent = l.host.Agent()
	}
	if agent == nil {
		return nil, &agentapi.RefusedError{What: string(agentapi.Mount), Reason: "this lab was built without lab-agent, which mounts folders; build it with \"make build\""}
	}
	state, err := l.read()
	if err != nil {
		return nil, err
	}
	rec, ok := state.Machines[g.Machine].Of(g.Number)
	if !ok {
		return nil, fmt.Errorf("%s: %w", g, providers.ErrNotFound)
	}
	target, err := l.target(g.Machine, rec.Create, "")
	if err != nil {
		return nil, err
	}
	target.Port = dial
	ctx, cancel := context.WithTimeout(ctx, mountTime)
	defer cancel()
	return guest.MountFolder(ctx, target, agent, f)
}
