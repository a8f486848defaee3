// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/labfile/lab/internal/guest"
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
		out = append(out, supervise.Mount{From: f.From, To: f.To, Writable: f.Writable, Owner: cmp.Or(f.Owner, user(c))})
	}
	return out
}

// devices are the machine's mounts as devices of a guest without an agent.
func devices(m lab.Machine) []providers.Mount {
	var out []providers.Mount
	for i, f := range outermost(m) {
		out = append(out, providers.Mount{Tag: tag(i), Path: f.From, Writable: f.Writable})
	}
	return out
}

func tag(i int) string { return fmt.Sprintf("lab%d", i) }

// mountFolders mounts folders of the host in the guest: through its agent or, where
// there is none, by 9p. What is mounted already stays.
func (s *session) mountFolders(ctx context.Context, target guest.Target, g lab.Generation, m lab.Machine, c ledger.Create) error {
	if len(m.Mounts) == 0 {
		return nil
	}
	if !c.Agent {
		return s.runAsRoot(ctx, target, g, c, "mounting folders of this host", folderScript(m))
	}
	for _, f := range m.Mounts {
		s.emit(Event{Machine: g.Machine, Generation: g.Number, Stage: StageIdentity, Text: "mounting " + describe(f)})
	}
	super, err := s.supervisor(ctx)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, mountTime)
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

// folderScript is what the root of a guest without an agent runs.
func folderScript(m lab.Machine) string {
	var b strings.Builder
	b.WriteString(folderFunctions)
	for i, f := range outermost(m) {
		mode := "ro"
		if f.Writable {
			mode = "rw"
		}
		b.WriteString(guest.Quote([]string{"folder", tag(i), f.To, mode}) + "\n")
	}
	return b.String()
}

// folderFunctions are in what any sh and busybox have. The kernel loads the modules
// of 9p when it is asked for the file system, if the image has them.
const folderFunctions = `fail() { echo "$*" >&2; exit 1; }
mounted() { while read -r _ at type _; do [ "$at $type" = "$1 9p" ] && return 0; done </proc/mounts; return 1; }
folder() {
	mounted "$2" && return
	mkdir -p "$2" || fail "$2 cannot be made"
	modprobe -q 9pnet_virtio 2>/dev/null; modprobe -q 9p 2>/dev/null
	grep -qw 9p /proc/filesystems || fail "mounts need lab-agent in the image, or 9p in its kernel ($(uname -r) has none); take a box that has one of them, use \"lab cp\", or put the files into the image by a provision step (file: …)"
	mount -t 9p -o "trans=virtio,version=9p2000.L,msize=262144,nosuid,nodev,$3" "$1" "$2" || fail "$2 cannot be mounted by 9p"
}
`
