// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/labfile/lab/internal/engine"
	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/ui"
	"github.com/labfile/lab/internal/volume"
)

// volumesJSON is the schema of "lab volume list --json".
type volumesJSON struct {
	Lab     lab.ID                `json:"lab"`
	Volumes []engine.VolumeStatus `json:"volumes"`
}

func (a *app) volumeCommand() *command {
	return &command{
		name: "volume", group: groupLook,
		short: "data that outlives machines: snapshots, copies",
		long: `A volume of the Labfile is made by "lab up" and survives every replacement, rollback
and "lab destroy" (unless --volumes). A snapshot is its state at one moment, never
changes, and has a number: db@3. One is taken before every replacement; of those
the newest five are kept, of yours all. "snapshot" and "clone" print the name of
what they made.`,
		examples: []string{
			"lab volume list", "what there is",
			"lab volume clone db@3", "look at an earlier state beside today's",
			"lab volume restore db@3", "go back to it",
		},
		subs: []*command{
			a.volumeListCommand(), a.volumeSnapshotCommand(), a.volumeRestoreCommand(), a.volumeCloneCommand(),
			a.volumeRemoveCommand(), a.volumeExportCommand(), a.volumeImportCommand(),
		},
	}
}

func (a *app) volumeListCommand() *command {
	return &command{
		name: "list", aliases: []string{"ls"}, lab: true, reports: true,
		short: "list the lab's volumes and their snapshots",
		long:  `Also those that a destroyed lab has left.`,
		examples: []string{
			"lab volume list", "for the eye",
			"lab volume list --json | jq '.volumes[].snapshots'", "for a program",
		},
		run: func(ctx context.Context, _ request) error {
			l, err := a.existing(ctx)
			if err != nil {
				return err
			}
			all, err := l.Volumes(ctx)
			if err != nil {
				return err
			}
			if a.asJSON {
				if all == nil {
					all = []engine.VolumeStatus{}
				}
				return ui.JSON(a.Out, volumesJSON{l.ID(), all})
			}
			return ui.Volumes(a.Out, all, time.Now(), a.ui.OutPage())
		},
	}
}

func (a *app) volumeSnapshotCommand() *command {
	return &command{
		name: "snapshot", args: "VOLUME", min: 1, max: 1, lab: true,
		short: "take a snapshot",
		long: `Freezes what the volume holds; nothing is copied. A machine that writes to it goes on:
the snapshot holds what a power cut at that moment would leave, with what the guest
had in its caches written before.`,
		flags:    []cli.Flag{&cli.StringFlag{Name: "why", Usage: "note `TEXT` with the snapshot"}},
		complete: a.completeVolumes,
		examples: []string{"lab volume snapshot db --why 'before the import'", "with a note"},
		run: func(ctx context.Context, r request) error {
			l, name, _, err := a.volume(ctx, r.args[0], never)
			if err != nil {
				return err
			}
			number, err := l.SnapshotVolume(ctx, name, r.String("why"), a.options())
			if err != nil {
				return noVolume(err)
			}
			_, err = fmt.Fprintf(a.Out, "%s@%d\n", name, number)
			return err
		},
	}
}

func (a *app) volumeRestoreCommand() *command {
	return &command{
		name: "restore", args: "VOLUME@SNAPSHOT", min: 1, max: 1, lab: true,
		short: "go back to a snapshot",
		long: `The volume holds again what it held then. What it holds now becomes a snapshot itself.
The machine that has it must be stopped.`,
		complete: a.completeVolumes,
		examples: []string{"lab volume restore db@3", "\"lab volume list\" shows the numbers"},
		run: func(ctx context.Context, r request) error {
			l, name, number, err := a.volume(ctx, r.args[0], always)
			if err != nil {
				return err
			}
			kept, err := l.RestoreVolume(ctx, name, number, a.options())
			if err != nil {
				return noVolume(err)
			}
			if kept > 0 {
				a.ui.Note("%s is as at %s@%d; what it held before is %s@%d", name, name, number, name, kept)
			} else {
				a.ui.Note("%s is as at %s@%d", name, name, number)
			}
			return nil
		},
	}
}

func (a *app) volumeCloneCommand() *command {
	return &command{
		name: "clone", args: "VOLUME[@SNAPSHOT] [NEW]", min: 1, max: 2, lab: true,
		short: "copy a volume or a snapshot of it",
		long: `Makes a volume of its own, to be named in the Labfile like any other. Without NEW it is
called VOLUME-SNAPSHOT or VOLUME-copy. A machine that writes to the volume goes on:
the copy holds what a snapshot at that moment would.`,
		complete: a.completeVolumes,
		examples: []string{
			"lab volume clone db@3", "an earlier state, as db-3",
			"lab volume clone db experiment", "today's, under a name",
		},
		run: func(ctx context.Context, r request) error {
			l, name, number, err := a.volume(ctx, r.args[0], maybe)
			if err != nil {
				return err
			}
			as := name + "-copy"
			if number > 0 {
				as = fmt.Sprintf("%s-%d", name, number)
			}
			if len(r.args) > 1 {
				as = r.args[1]
			}
			if !lab.ValidLabel(as) {
				return usage("names of volumes are lower-case letters, digits and dashes", "%q is no name of a volume", ui.Clean(as))
			}
			if err := l.CloneVolume(ctx, name, number, as, a.options()); err != nil {
				return noVolume(err)
			}
			_, err = fmt.Fprintln(a.Out, as)
			return err
		},
	}
}

func (a *app) volumeRemoveCommand() *command {
	return &command{
		name: "rm", args: "VOLUME[@SNAPSHOT]", min: 1, max: 1, lab: true,
		short: "remove a volume with its snapshots, or one snapshot",
		long: `It asks on a terminal and wants --yes elsewhere. A machine that runs and has the volume
must be stopped first.`,
		flags:    []cli.Flag{yesFlag()},
		complete: a.completeVolumes,
		examples: []string{
			"lab volume rm db", "the volume, with all it ever held",
			"lab volume rm db@3", "one snapshot",
		},
		run: func(ctx context.Context, r request) error {
			l, name, number, err := a.volume(ctx, r.args[0], maybe)
			if err != nil {
				return err
			}
			if !r.Bool("yes") {
				what := fmt.Sprintf("volume %s of lab %s with all its snapshots", name, l.ID())
				if number > 0 {
					what = fmt.Sprintf("snapshot %s@%d of lab %s", name, number, l.ID())
				}
				if !a.interactive() {
					return usage("add --yes", "there is no terminal to ask on whether to remove %s", what)
				}
				if err := a.ask(ctx, fmt.Sprintf("Remove %s?", what)); err != nil {
					return err
				}
			}
			return noVolume(l.RemoveVolume(ctx, name, number, a.options()))
		},
	}
}

func (a *app) volumeExportCommand() *command {
	return &command{
		name: "export", args: "VOLUME[@SNAPSHOT] FILE", min: 2, max: 2, lab: true,
		short: "write a volume into one file",
		long: `The file is a disk image that any tool reads: raw if its name ends in .raw or .img, else
qcow2. A machine that writes to the volume goes on: the file holds what a snapshot at
that moment would.`,
		complete: a.completeVolumes,
		examples: []string{"lab volume export db@3 db.qcow2", "to keep it, or for another lab"},
		run: func(ctx context.Context, r request) error {
			l, name, number, err := a.volume(ctx, r.args[0], maybe)
			if err != nil {
				return err
			}
			to, err := a.output(r.args[1])
			if err != nil {
				return err
			}
			format := "qcow2"
			if ext := filepath.Ext(to); ext == ".raw" || ext == ".img" {
				format = "raw"
			}
			if err := l.ExportVolume(ctx, name, number, format, to, a.options()); err != nil {
				return noVolume(err)
			}
			a.ui.Note("wrote %s", to)
			return nil
		},
	}
}

func (a *app) volumeImportCommand() *command {
	return &command{
		name: "import", args: "FILE VOLUME", min: 2, max: 2, lab: true,
		short: "make a volume of a disk image",
		long: `The image is raw or qcow2 and stands on its own; it is copied. The Labfile's volume of
that name must have its size, or more, and its file system.`,
		examples: []string{"lab volume import db.qcow2 db", "what \"lab volume export\" wrote"},
		run: func(ctx context.Context, r request) error {
			from, err := a.absolute(r.args[0])
			if err != nil {
				return err
			}
			name, _, err := volumeArg(r.args[1], never)
			if err != nil {
				return err
			}
			want, l, err := a.existingAnd(ctx)
			if err != nil {
				return err
			}
			if err := l.ImportVolume(ctx, from, name, want, a.options()); err != nil {
				return noVolume(err)
			}
			a.ui.Note("volume %s is there", name)
			return nil
		},
	}
}

// options are those of a command that needs no more than to be recorded.
func (a *app) options() engine.Options { return engine.Options{Command: a.typed, Events: a.noted} }

// noted tells what is to be known of a machine, and no progress.
func (a *app) noted(e engine.Event) {
	if e.Stage == engine.StageNote && e.Machine != "" {
		a.ui.Note("%s %s", e.Machine, e.Text)
	}
}

func (a *app) absolute(path string) (string, error) {
	if filepath.IsAbs(path) {
		return path, nil
	}
	dir, err := a.Dir()
	return filepath.Join(dir, path), err
}

// numbered says whether a volume is named with the number of a snapshot.
type numbered int

const (
	never numbered = iota
	maybe
	always
)

// volume reads an argument such as "db@3" and finds the lab that is meant.
func (a *app) volume(ctx context.Context, arg string, with numbered) (*engine.Lab, string, int, error) {
	name, number, err := volumeArg(arg, with)
	if err != nil {
		return nil, "", 0, err
	}
	l, err := a.existing(ctx)
	return l, name, number, err
}

// volumeArg reads an argument such as "db@3"; number is 0 if it has none.
func volumeArg(arg string, with numbered) (name string, number int, err error) {
	name, digits, found := strings.Cut(arg, "@")
	if !lab.ValidLabel(name) {
		return "", 0, usage("names of volumes are lower-case letters, digits and dashes", "%q is no name of a volume", ui.Clean(name))
	}
	number, err = strconv.Atoi(digits)
	hint := "\"lab volume list\" shows the numbers"
	switch {
	case !found && with != always:
		return name, 0, nil
	case !found:
		return "", 0, usage(hint, "a snapshot is wanted here, such as %s@3", name)
	case with == never:
		return "", 0, usage("write "+name, "%q is a snapshot; a volume is wanted here", ui.Clean(arg))
	case err != nil || number < 1 || digits != strconv.Itoa(number):
		return "", 0, usage(hint, "%q is no snapshot", ui.Clean(arg))
	}
	return name, number, nil
}

// volumeError adds the next step to an error about a volume that is not there.
type volumeError struct{ error }

func (e *volumeError) Unwrap() error { return e.error }

// Hint is the next step.
func (e *volumeError) Hint() string { return "\"lab volume list\" shows what there is" }

func noVolume(err error) error {
	if errors.Is(err, volume.ErrNotFound) {
		return &volumeError{err}
	}
	return err
}

// completeVolumes offers the lab's volumes and their snapshots.
func (a *app) completeVolumes(ctx context.Context, _ []string) []string {
	l, err := a.existing(ctx)
	if err != nil {
		return nil
	}
	names, err := l.VolumeNames()
	if err != nil {
		return nil
	}
	return names
}
