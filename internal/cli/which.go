// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/labfile/lab/internal/engine"
	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/labfile"
	"github.com/labfile/lab/internal/ui"
)

// setting returns the value of a flag, else of the environment variable that
// stands for it.
func (a *app) setting(flag, env string) string {
	if v := a.set.string(flag); v != "" {
		return v
	}
	return a.Getenv(env)
}

// labfilePath returns the absolute path of the Labfile that is meant.
func (a *app) labfilePath() (string, error) {
	dir, err := a.Dir()
	if err != nil {
		return "", err
	}
	path := a.setting("file", "LAB_FILE")
	if path == "" {
		return findLabfile(dir)
	}
	if !filepath.IsAbs(path) {
		path = filepath.Join(dir, path)
	}
	if fi, err := os.Stat(path); err == nil && fi.IsDir() {
		found, err := findLabfile(path)
		above := err == nil && filepath.Dir(found) != filepath.Clean(path)
		if above || errors.Is(err, labfile.ErrNotFound) { // who names a folder means that one
			return "", fmt.Errorf("%w in %s", labfile.ErrNotFound, path)
		}
		return found, err
	}
	return path, nil
}

// findLabfile is labfile.Find, with a *labfileError if a folder cannot be looked into.
func findLabfile(dir string) (string, error) {
	path, err := labfile.Find(dir)
	if err != nil && !errors.Is(err, labfile.ErrNotFound) {
		return "", &labfileError{err}
	}
	return path, err
}

// vars returns the variables that were set by --var.
func (a *app) vars() (map[string]string, error) {
	vars := map[string]string{}
	for _, v := range a.set["var"] {
		name, value, ok := strings.Cut(v, "=")
		if !ok || name == "" {
			return nil, usage("write --var NAME=VALUE", "--var needs a name and a value, got %q", v)
		}
		vars[name] = value
	}
	return vars, nil
}

// load reads the Labfile at path.
func (a *app) load(path string) (*lab.Lab, error) { return a.read(path, false) }

// loadWhole is load, and looks at the files of this host that the Labfile names.
func (a *app) loadWhole(path string) (*lab.Lab, error) { return a.read(path, true) }

func (a *app) read(path string, files bool) (*lab.Lab, error) {
	vars, err := a.vars()
	if err != nil {
		return nil, err
	}
	want, err := labfile.Load(path, labfile.Options{
		Vars: vars, Name: a.setting("name", "LAB_NAME"), HostFiles: files,
		LookupEnv: func(name string) (string, bool) {
			v := a.Getenv(name)
			return v, v != ""
		},
	})
	var bad *labfile.Problems
	if err != nil && !errors.As(err, &bad) {
		return nil, &labfileError{err}
	}
	if err != nil {
		return nil, err
	}
	if p := a.setting("provider", "LAB_PROVIDER"); p != "" {
		want.Provider = p
	}
	if u := a.uri(want.Provider); u != "" {
		want.URI = u
	}
	return want, nil
}

// uri is what the user says, beside the Labfile, about the provider's daemon. The
// environment's word is about libvirt alone.
func (a *app) uri(provider string) string {
	if provider == "libvirt" {
		return a.setting("uri", "LAB_LIBVIRT_URI")
	}
	return a.set.string("uri")
}

// wanted returns what the Labfile says and the lab that it is about. With --lab
// the Labfile is the one that the lab was made from. The files of this host that the
// Labfile names are looked at: machines are to be made.
func (a *app) wanted(ctx context.Context) (*lab.Lab, *engine.Lab, error) {
	return a.wantedBy(ctx, a.loadWhole)
}

// wantedBy is wanted, with the Labfile read by load.
func (a *app) wantedBy(ctx context.Context, load func(path string) (*lab.Lab, error)) (*lab.Lab, *engine.Lab, error) {
	h, err := a.host()
	if err != nil {
		return nil, nil, err
	}
	if id := a.set.string("lab"); id != "" {
		l, err := a.byID(ctx, h, id)
		if err != nil {
			return nil, nil, err
		}
		st, err := l.Status(ctx)
		if err != nil {
			return nil, nil, err
		}
		a.set["name"] = []string{st.Name}
		want, err := load(st.Labfile)
		delete(a.set, "name")
		return want, l, err
	}
	path, err := a.labfilePath()
	if err != nil {
		return nil, nil, err
	}
	want, err := load(path)
	if err != nil {
		return nil, nil, err
	}
	l, err := a.labOf(h, want)
	return want, l, err
}

// labOf returns the lab of a Labfile. If its folder was moved, the lab is taken over, and
// that is said.
func (a *app) labOf(h *engine.Host, want *lab.Lab) (*engine.Lab, error) {
	found, err := h.Find(want.Name, want.File)
	if err != nil {
		return nil, err
	}
	l := h.Lab(found.ID)
	if a.completing {
		return l, nil
	}
	if found.From != "" {
		taken, err := l.TakeOver(want.Name, want.File, a.typed)
		if err != nil {
			return nil, fmt.Errorf("taking over lab %s, whose folder was moved: %w", found.ID, err)
		}
		a.ui.Note("this folder was moved here from %s: lab %s moves with it", filepath.Dir(found.From), found.ID)
		if len(taken.Mounts) > 0 {
			a.ui.Note("folders in it that are mounted in %s are seen there again after %q and %q", ui.Names(taken.Mounts), a.say("stop"), a.say("start"))
		}
	}
	for _, lost := range found.Lost {
		a.ui.Note("lab %s was made from %s, which is gone: if that is this one, %q takes it over",
			lost.ID, lost.File, a.say("adopt "+string(lost.ID)))
	}
	return l, nil
}

// existing returns the lab that is meant, for commands that need no Labfile. When
// there is none, or none that can be read, the lab is found by the folder it
// was made in: a lab must be usable, and above all removable, without its
// Labfile.
func (a *app) existing(ctx context.Context) (*engine.Lab, error) {
	_, l, err := a.existingAnd(ctx)
	return l, err
}

// existingAnd is existing; it also returns what the Labfile says, or nil if the
// lab was found without it.
func (a *app) existingAnd(ctx context.Context) (*lab.Lab, *engine.Lab, error) {
	h, err := a.host()
	if err != nil {
		return nil, nil, err
	}
	if id := a.set.string("lab"); id != "" {
		l, err := a.byID(ctx, h, id)
		return nil, l, err
	}
	path, err := a.labfilePath()
	dir := ""
	if err == nil {
		var want *lab.Lab
		if want, err = a.load(path); err == nil {
			l, err := a.labOf(h, want)
			return want, l, err
		}
		dir = filepath.Dir(path)
	}
	var (
		bad   *labfile.Problems
		apart *labfileError
	)
	if !errors.As(err, &bad) && !errors.Is(err, labfile.ErrNotFound) && !errors.As(err, &apart) {
		return nil, nil, err
	}
	id, found := a.byDir(h, dir)
	if !found {
		return nil, nil, err
	}
	a.ui.Note("the Labfile is missing or cannot be read: this is about lab %s, which was made from it", id)
	return nil, h.Lab(id), nil
}

// byDir finds the one lab whose Labfile stood in dir or, if dir is empty, in the
// working directory or above. --name chooses among several.
func (a *app) byDir(h *engine.Host, dir string) (lab.ID, bool) {
	up := dir == ""
	if up {
		var err error
		if dir, err = a.Dir(); err != nil {
			return "", false
		}
	}
	if real, err := filepath.EvalSymlinks(dir); err == nil {
		dir = real // as the Labfile's path was recorded
	}
	for {
		ids, err := h.FindByDir(dir)
		if err != nil {
			return "", false
		}
		if name := a.setting("name", "LAB_NAME"); name != "" {
			ids = slices.DeleteFunc(ids, func(id lab.ID) bool { return !strings.HasPrefix(string(id), name+"-") })
		}
		if len(ids) == 1 {
			return ids[0], true
		}
		if parent := filepath.Dir(dir); up && len(ids) == 0 && parent != dir {
			dir = parent
			continue
		}
		return "", false
	}
}

// byID returns the lab called id, which must exist. An unambiguous beginning is
// enough.
func (a *app) byID(ctx context.Context, h *engine.Host, id string) (*engine.Lab, error) {
	if !lab.ValidLabel(id) {
		return nil, usage("\"lab list\" shows the labs there are", "%q is no lab's ID", ui.Clean(id))
	}
	labs, err := h.List(ctx)
	if err != nil {
		return nil, err
	}
	var match []lab.ID
	for _, s := range labs {
		if string(s.ID) == id {
			return h.Lab(s.ID), nil
		}
		if strings.HasPrefix(string(s.ID), id) {
			match = append(match, s.ID)
		}
	}
	switch len(match) {
	case 1:
		return h.Lab(match[0]), nil
	case 0:
		// Leftovers of a lab that List does not show can still be destroyed.
		return h.Lab(lab.ID(id)), nil
	}
	return nil, usage("\"lab list\" shows the labs there are", "%q is the beginning of several labs' IDs", id)
}

// several turns arguments into names of machines for a command that takes all
// machines where none are named. The word "all", which no machine can be called,
// names none.
func several(args []string) ([]lab.Name, error) {
	if !slices.Contains(args, everyMachine) {
		return machines(args)
	}
	if len(args) > 1 {
		return nil, usage("leave out the other names", "\"all\" means every machine and stands alone")
	}
	return nil, nil
}

// everyMachine may be written for all machines.
const everyMachine = "all"

// one returns the lab that the command is about and the one machine that its argument
// names, which may be the role of a single replica; none if there is no argument.
func (a *app) one(ctx context.Context, r request) (*engine.Lab, lab.Name, error) {
	names, err := machines(r.args)
	if err != nil {
		return nil, "", err
	}
	l, err := a.existing(ctx)
	if err != nil || len(names) == 0 {
		return l, "", err
	}
	name, err := l.One(names[0])
	return l, name, err
}

// output returns the absolute path of a file that a command is to write, before it does
// anything else. Errors: a usage error if its folder is not there.
func (a *app) output(path string) (string, error) {
	path, err := a.absolute(path)
	if err != nil {
		return "", err
	}
	if fi, err := os.Stat(filepath.Dir(path)); err != nil || !fi.IsDir() {
		return "", usage("make it first, or name another", "there is no folder %s", filepath.Dir(path))
	}
	return path, nil
}

// named returns the labs that are up from the Labfile which is meant, under other names
// than the one that was asked for.
func (a *app) named() []engine.Summary {
	if a.Host == nil || a.set.string("lab") != "" {
		return nil
	}
	path, err := a.labfilePath()
	if err != nil {
		return nil
	}
	h, err := a.host()
	if err != nil {
		return nil
	}
	dir := filepath.Dir(path)
	if real, err := filepath.EvalSymlinks(dir); err == nil {
		dir = real
	}
	ids, err := h.FindByDir(dir)
	if err != nil {
		return nil
	}
	labs, err := h.Summaries(context.Background(), ids)
	if err != nil {
		return nil
	}
	return labs
}

// machines turns arguments into names of machines.
func machines(args []string) ([]lab.Name, error) {
	var names []lab.Name
	for _, arg := range args {
		if !lab.ValidLabel(arg) {
			return nil, usage("names of machines are lower-case letters, digits and dashes", "%q is no name of a machine", ui.Clean(arg))
		}
		if n := lab.Name(arg); !slices.Contains(names, n) {
			names = append(names, n)
		}
	}
	return names, nil
}
