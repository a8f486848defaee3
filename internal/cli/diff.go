// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/urfave/cli/v2"

	"github.com/labfile/lab/internal/drift"
	"github.com/labfile/lab/internal/engine"
	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/ui"
)

func (a *app) diffCommand() *command {
	return &command{
		name: "diff", group: groupLook, args: "MACHINE[@N] [MACHINE[@N]]", min: 1, max: 2, lab: true, reports: true,
		short: "say what changed on a machine's disk since its birth",
		long: `Reads the disk from outside of the guest, which is not asked and not trusted.
Where the root file system can't be read from outside (only ext4 can), the guest is asked
for its files, at its birth and now, and lab says so: then a file counts as changed by its
size, its times and its inode, and what was in it at birth is not known. With two
names it compares the disks of two machines or generations. What every
running system touches (logs, leases, caches) is hidden; a file .labignore
beside the Labfile hides more, one pattern a line as in .gitignore. Exit code 0 if nothing
changed, 2 if something did.

  A  added     M  modified     D  deleted     R  replaced by another kind`,
		flags: []cli.Flag{
			&cli.BoolFlag{Name: "content", Usage: "show how text files differ"},
			&cli.BoolFlag{Name: "all", Usage: "show what is hidden too, and files with only a new time"},
			&cli.BoolFlag{Name: "taint", Usage: "if something changed, mark the machine: the next \"lab up\" replaces it"},
			&cli.BoolFlag{Name: "as-provision", Usage: "print the drift as steps for the Labfile's provision"},
			&cli.StringFlag{Name: "files", Usage: "with --as-provision: put binary and large files into the folder `DIR`"},
			&cli.StringSliceFlag{Name: "ignore", Usage: "hide paths that fit `PATTERN`; !PATTERN shows them"},
		},
		complete: a.completeMachines,
		examples: []string{
			"lab diff web", "what was changed by hand",
			"lab diff web --content", "line by line",
			"lab diff web@3 web@5", "two generations",
			"lab diff web --as-provision --files web", "a manual fix becomes part of the next generation",
		},
		run: a.diff,
	}
}

func (a *app) diff(ctx context.Context, r request) error {
	subjects := make([]engine.Subject, len(r.args))
	for i, arg := range r.args {
		var err error
		if subjects[i], err = subject(arg); err != nil {
			return err
		}
	}
	if r.Bool("taint") && (len(subjects) == 2 || subjects[0].Generation != 0) {
		return usage("name one machine, without a generation", "--taint marks a machine that differs from its birth")
	}
	if r.String("files") != "" && !r.Bool("as-provision") {
		return usage("add --as-provision", "--files says where --as-provision puts files")
	}
	if r.Bool("content") && r.Bool("as-provision") {
		return usage("ask for one of them", "--content and --as-provision say the same in two ways")
	}
	want, l, err := a.existingAnd(ctx)
	if err != nil {
		return err
	}
	for i := range subjects {
		if subjects[i].Machine, err = l.One(subjects[i].Machine); err != nil {
			return err
		}
	}
	o := engine.DiffOptions{New: subjects[len(subjects)-1], Content: r.Bool("content")}
	if len(subjects) == 2 {
		o.Old = &subjects[0]
	}
	file := ""
	if want != nil {
		file = want.File
	} else if st, err := l.Status(ctx); err == nil {
		file = st.Labfile
	}
	if r.Bool("as-provision") {
		if o.AsProvision, err = asProvision(r.String("files"), filepath.Dir(file)); err != nil {
			return err
		}
	}
	own, err := os.ReadFile(filepath.Join(filepath.Dir(file), ".labignore"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("reading the ignore list: %w", err)
	}
	o.All = r.Bool("all")
	if o.Ignore, err = drift.ParseIgnore(drift.Defaults(), string(own), strings.Join(r.StringSlice("ignore"), "\n")); err != nil {
		return usage("a pattern is written as in .gitignore", "%v", err)
	}
	o.Events = a.noted
	d, err := l.Diff(ctx, o)
	if err != nil {
		return err
	}
	if len(d.Asked) > 0 {
		a.ui.Note("%s: the guest was asked what files it has, and believed: the root file system can't be read from outside (%s)", strings.Join(d.Asked, ", "), d.Unreadable)
	}
	if r.Bool("taint") && len(d.Changes) > 0 {
		why := fmt.Sprintf("drift: %d paths changed since birth", len(d.Changes))
		if err := l.Taint(ctx, []lab.Name{subjects[0].Machine}, why, engine.Options{Command: a.typed}); err != nil {
			return err
		}
	}
	switch {
	case a.asJSON:
		err = ui.JSON(a.Out, d)
	case o.AsProvision != nil:
		err = ui.Provision(a.Out, d)
	default:
		err = ui.Drift(a.Out, d)
	}
	if err == nil && len(d.Changes) > 0 {
		return exitCode(ExitDifferent)
	}
	return err
}

// asProvision says where files go, and how a Labfile in the folder site names that.
func asProvision(files, site string) (*drift.ProvisionOptions, error) {
	if files == "" {
		return &drift.ProvisionOptions{}, nil
	}
	abs, err := filepath.Abs(files)
	if err != nil {
		return nil, fmt.Errorf("naming the folder %q: %w", files, err)
	}
	from, err := filepath.Rel(site, abs)
	if err != nil {
		from = abs
	}
	if !filepath.IsAbs(from) {
		from = "./" + filepath.ToSlash(from)
	}
	return &drift.ProvisionOptions{Files: abs, From: strings.TrimSuffix(from, "/.")}, nil
}

// subject reads MACHINE or MACHINE@N.
func subject(arg string) (engine.Subject, error) {
	name, number, ok := strings.Cut(arg, "@")
	s := engine.Subject{Machine: lab.Name(name)}
	if !ok {
		return s, nil
	}
	n, err := strconv.Atoi(number)
	if err != nil || n < 1 {
		return s, usage("write it as web@3", "%q names no generation", arg)
	}
	s.Generation = n
	return s, nil
}
