// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/urfave/cli/v2"

	"github.com/labfile/lab/boxes"
	"github.com/labfile/lab/boxes/source"
	"github.com/labfile/lab/internal/engine"
	"github.com/labfile/lab/internal/ui"
)

// boxJSON is a box in the output of "lab box … --json".
type boxJSON struct {
	Names        []string   `json:"names"`
	Digest       string     `json:"digest"`
	Architecture string     `json:"architecture,omitempty"`
	Format       string     `json:"format,omitempty"` // of the disk
	Size         int64      `json:"size"`             // virtual size of the disk, in bytes
	Bytes        int64      `json:"bytes"`            // that it takes in the store
	User         string     `json:"user,omitempty"`
	Agent        bool       `json:"agent"`
	CloudInit    bool       `json:"cloudInit"`
	Vagrant      bool       `json:"vagrant,omitempty"`
	MinMemory    int64      `json:"minMemory,omitempty"` // bytes
	Created      *time.Time `json:"created,omitempty"`
	Origin       string     `json:"origin,omitempty"`
	Damage       string     `json:"damage,omitempty"`
	Has          []string   `json:"has,omitempty"`      // what is in it; by "box show" only, as all that follow
	Packages     []string   `json:"packages,omitempty"` // "name=version"
	Kernel       string     `json:"kernel,omitempty"`   // path, as the next two
	Initrd       string     `json:"initrd,omitempty"`
	Disk         string     `json:"disk,omitempty"`
}

func boxOf(e boxes.Entry) boxJSON {
	out := boxJSON{
		Names: e.Names, Digest: e.Digest.String(), Architecture: e.Config.Architecture, Format: e.Config.Format,
		Size: e.Config.Size, Bytes: e.Bytes, User: e.Config.User, Agent: e.Config.Agent, CloudInit: e.Config.CloudInit, Vagrant: e.Config.Vagrant,
		MinMemory: e.Config.MinMemory, Origin: e.Origin,
	}
	if out.Names == nil {
		out.Names = []string{}
	}
	if t := e.Config.Created; !t.IsZero() {
		t = t.UTC()
		out.Created = &t
	}
	if e.Damage != nil {
		out.Damage = e.Damage.Error()
	}
	return out
}

func (a *app) boxCommand() *command {
	return &command{
		name: "box", group: groupKeep,
		short: "the boxes that machines are born from",
		long: `A box is an immutable machine image, named by the digest of its content. "lab up"
fetches or builds the boxes of a Labfile by itself; these commands are for looking
after them.`,
		examples: []string{
			"lab box list", "what is there",
			"lab box build tiny", "build a built-in box now",
		},
		subs: []*command{
			a.boxListCommand(), a.boxShowCommand(), a.boxAddCommand(), a.boxBuildCommand(),
			a.boxRemoveCommand(), a.boxVerifyCommand(), a.boxPruneCommand(),
		},
	}
}

func (a *app) boxes() (Boxes, error) { return a.Boxes(a.log()) }

func (a *app) boxListCommand() *command {
	return &command{
		name: "list", aliases: []string{"ls"}, reports: true,
		short:    "list the boxes in the store",
		examples: []string{"lab box list --json", "for a program"},
		run: func(ctx context.Context, _ request) error {
			b, err := a.boxes()
			if err != nil {
				return err
			}
			entries, err := b.Store.List(ctx)
			if err != nil {
				return err
			}
			if a.asJSON {
				out := []boxJSON{}
				for _, e := range entries {
					out = append(out, boxOf(e))
				}
				return ui.JSON(a.Out, map[string]any{"boxes": out})
			}
			return ui.Boxes(a.Out, entries, a.ui.OutPage())
		},
	}
}

func (a *app) boxShowCommand() *command {
	return &command{
		name: "show", args: "BOX", min: 1, max: 1, reports: true,
		short:    "show all that is known of a box",
		complete: a.completeBoxes,
		examples: []string{"lab box show builtin/tiny", "by name", "lab box show 3f9a0c", "by the beginning of its digest"},
		run: func(ctx context.Context, r request) error {
			b, err := a.boxes()
			if err != nil {
				return err
			}
			box, err := b.Store.Get(ctx, r.args[0])
			if err != nil {
				return err
			}
			entry := boxes.Entry{Box: box}
			all, err := b.Store.List(ctx)
			if err != nil {
				return err
			}
			for _, e := range all {
				if e.Digest == box.Digest {
					entry.Names, entry.Origin = e.Names, e.Origin
				}
			}
			out := boxOf(entry)
			out.Has, out.Packages = box.Config.Has, box.Config.Packages
			out.Disk, out.Kernel, out.Initrd = box.Disk.Path, box.Kernel.Path, box.Initrd.Path
			if a.asJSON {
				return ui.JSON(a.Out, out)
			}
			return a.printBox(out)
		},
	}
}

func (a *app) printBox(b boxJSON) error {
	var rows [][2]string
	row := func(k, v string) {
		if v != "" {
			rows = append(rows, [2]string{k, v})
		}
	}
	yes := map[bool]string{true: "yes", false: "no"}
	row("names", strings.Join(b.Names, ", "))
	row("digest", b.Digest)
	row("from", b.Origin)
	row("architecture", b.Architecture)
	row("disk", fmt.Sprintf("%s (%s), %s", ui.Size(b.Size), b.Format, b.Disk))
	row("kernel", b.Kernel)
	row("initrd", b.Initrd)
	row("stored", ui.Size(b.Bytes))
	row("user", b.User)
	row("agent", yes[b.Agent])
	row("cloud-init", yes[b.CloudInit])
	if b.Vagrant {
		row("vagrant", "yes")
	}
	if b.MinMemory > 0 {
		row("memory", ui.Size(b.MinMemory)+" at least")
	}
	list := func(name string, all []string) {
		for _, one := range all {
			rows = append(rows, [2]string{name, one})
			name = ""
		}
	}
	list("has", b.Has)
	list("packages", b.Packages)
	return ui.Facts(a.Out, rows, a.ui.OutPage())
}

func (a *app) boxAddCommand() *command {
	return &command{
		name: "add", args: "NAME SOURCE", min: 2, max: 2, reports: true,
		short: "add a box from a file or a URL",
		long: `The source is a qcow2 or raw disk image, or a Vagrant box for the libvirt provider: a
local file, or an http or https URL. The disk is inspected before anything opens it,
and refused unless it stands on its own. An interrupted download goes on where it was.`,
		flags: []cli.Flag{&cli.StringFlag{
			Name: "checksum", Usage: "what the file must be: `SUM` is sha256:HEX, sha512:HEX or file:URL of a list of sums",
		}},
		examples: []string{
			"lab box add mine ./disk.qcow2", "a local image",
			"lab box add cloud https://… --checksum sha256:…", "a cloud image",
		},
		run: func(ctx context.Context, r request) error {
			name, from := r.args[0], r.args[1]
			if err := boxes.ValidName(name); err != nil {
				return usage("such as \"mine\" or \"team/base\"", "%v", err)
			}
			if strings.HasPrefix(name, "builtin/") {
				return usage("choose another name", "names that begin with builtin/ belong to the boxes that lab builds")
			}
			b, err := a.boxes()
			if err != nil {
				return err
			}
			dir, err := a.Dir()
			if err != nil {
				return err
			}
			from = fileOrURL(from)
			show := a.show()
			res, err := b.Resolver.Resolve(ctx, source.Request{
				Ref: from, Name: name, Checksum: r.String("checksum"), BaseDir: dir, Progress: boxProgress(show, name),
			})
			show.close()
			if err != nil {
				return err
			}
			if r.String("checksum") == "" {
				a.ui.Note("no checksum was given; the file that was added has %s", res.Checksum)
			}
			return a.printAdded(name, res.Box)
		},
	}
}

// fileOrURL returns from as a reference to a file or a URL: for "box add" a bare
// word is a file, not the name of a box.
func fileOrURL(from string) string {
	if strings.Contains(from, "://") {
		return from
	}
	for _, prefix := range []string{"/", "./", "../", "~/"} {
		if strings.HasPrefix(from, prefix) {
			return from
		}
	}
	return "./" + from
}

// boxProgress shows the progress of one box.
func boxProgress(show *shown, box string) func(string, int64, int64) {
	return func(text string, done, total int64) {
		show.event(engine.Event{Time: time.Now(), Box: box, Stage: engine.StageBox, Text: text, Done: done, Total: total})
	}
}

func (a *app) printAdded(name string, b boxes.Box) error {
	if a.asJSON {
		return ui.JSON(a.Out, boxOf(boxes.Entry{Box: b, Names: []string{name}}))
	}
	_, err := fmt.Fprintf(a.Out, "%s %s\n", name, b.Digest)
	return err
}

func (a *app) boxBuildCommand() *command {
	return &command{
		name: "build", args: "BOX...", min: 1, max: -1, reports: true,
		short: "build a built-in box from its recipe",
		long: `Builds the box from signed Debian packages, without root where the host allows
user namespaces, and replaces the one of that name. The same versions of the
packages give the same digest. LAB_DEBIAN_MIRROR names a mirror.`,
		complete: func(context.Context, []string) []string {
			b, err := a.boxes()
			if err != nil {
				return nil
			}
			return b.Builtin
		},
		examples: []string{"lab box build tiny", "or builtin/tiny"},
		run: func(ctx context.Context, r request) error {
			b, err := a.boxes()
			if err != nil {
				return err
			}
			for _, name := range r.args {
				name = strings.TrimPrefix(name, "builtin/")
				if !slices.Contains(b.Builtin, name) {
					hint := "there are " + strings.Join(b.Builtin, " and ")
					if near := nearest(name, b.Builtin); near != "" {
						hint = fmt.Sprintf("did you mean %q?", near)
					}
					return usage(hint, "there is no built-in box %q", name)
				}
				show := a.show()
				box, err := b.Build(ctx, name, boxProgress(show, "builtin/"+name))
				show.close()
				if err != nil {
					return err
				}
				if err := a.printAdded("builtin/"+name, box); err != nil {
					return err
				}
			}
			return nil
		},
	}
}

func (a *app) boxRemoveCommand() *command {
	return &command{
		name: "remove", aliases: []string{"rm"}, args: "BOX...", min: 1, max: -1,
		short: "take boxes out of the store",
		long: `Removes the names. What machines were born from stays until they are gone and
"lab box prune" is run, which frees the space.`,
		complete: a.completeBoxes,
		examples: []string{"lab box remove mine", "and \"lab box prune\" to free its space"},
		run: func(ctx context.Context, r request) error {
			b, err := a.boxes()
			if err != nil {
				return err
			}
			for _, ref := range r.args {
				if err := b.Store.Remove(ctx, ref); err != nil {
					return err
				}
				a.ui.Note("removed %s; \"lab box prune\" frees its space", ref)
			}
			return nil
		},
	}
}

func (a *app) boxVerifyCommand() *command {
	return &command{
		name: "verify", args: "[BOX...]", max: -1,
		short:    "check that boxes are what their digests say",
		long:     `Reads every file of the boxes, or of all. Exit code 2 if one is damaged.`,
		complete: a.completeBoxes,
		examples: []string{"lab box verify", "all boxes"},
		run: func(ctx context.Context, r request) error {
			b, err := a.boxes()
			if err != nil {
				return err
			}
			show := a.show()
			progress := boxProgress(show, "store")
			err = b.Store.Verify(ctx, func(done, total int64) { progress("verifying", done, total) }, r.args...)
			show.close()
			if ctx.Err() != nil {
				return ctx.Err()
			}
			var damaged *boxes.DamagedError
			if errors.As(err, &damaged) {
				a.ui.Error(err.Error(), damaged.Hint())
				return exitCode(ExitDifferent)
			}
			if err != nil {
				return err
			}
			_, err = fmt.Fprintln(a.Out, "no damage found")
			return err
		},
	}
}

func (a *app) boxPruneCommand() *command {
	return &command{
		name: "prune", reports: true,
		short: "free the space of boxes that nothing needs",
		long: `Removes the boxes that have no name and that no machine was born from, and what
interrupted commands left in the store.`,
		examples: []string{"lab box prune", "frees space"},
		run: func(ctx context.Context, _ request) error {
			h, err := a.host()
			if err != nil {
				return err
			}
			b, err := a.boxes()
			if err != nil {
				return err
			}
			used, err := h.BoxesInUse(ctx)
			if err != nil {
				return err
			}
			pruned, err := b.Store.Prune(ctx, func(d digest.Digest) bool { return slices.Contains(used, d.String()) })
			if err != nil {
				return err
			}
			if a.asJSON {
				gone := []string{}
				for _, d := range pruned.Boxes {
					gone = append(gone, d.String())
				}
				return ui.JSON(a.Out, map[string]any{"boxes": gone, "bytes": pruned.Bytes})
			}
			for _, d := range pruned.Boxes {
				if _, err := fmt.Fprintln(a.Out, "removed", d); err != nil {
					return err
				}
			}
			_, err = fmt.Fprintf(a.Out, "freed %s\n", ui.Size(pruned.Bytes))
			return err
		},
	}
}
