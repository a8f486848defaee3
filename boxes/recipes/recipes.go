// SPDX-License-Identifier: Apache-2.0

// Package recipes holds the built-in boxes as data: which packages of which
// Debian suite each is made of, and what lab lays over them.
package recipes

import (
	"bytes"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"gopkg.in/yaml.v3"

	"github.com/labfile/lab/internal/lab"
)

//go:embed all:boot all:tiny all:debian-12
var data embed.FS

// ErrNotFound says that no recipe has the name.
var ErrNotFound = errors.New("no such built-in box")

// Recipe says how a built-in box is made. It names packages, never a mirror.
type Recipe struct {
	Name      string    // as in "builtin/<name>"
	Suite     string    // Debian's code name: "bookworm"
	Variant   string    // mmdebstrap's --variant
	Packages  []string  // besides what the variant brings
	Others    []Other   // packages of other suites, sorted by suite
	Exclude   []string  // dpkg path-exclude patterns
	Include   []string  // dpkg path-include patterns, stronger than Exclude
	Customize []string  // shell commands run in the host's sh, the root directory being $1
	Keep      []string  // patterns of what stays in the box; empty keeps everything
	Drop      []string  // patterns of what does not, stronger than Keep
	Modules   []string  // kernel modules in the box, besides what they need; "all" means all
	Links     []Link    // symbolic links, sorted by path
	Dirs      []Entry   // directories with other than the default mode, or without files
	Modes     []Entry   // modes of Files that are not 0644
	Files     fs.FS     // laid over the root directory
	Size      lab.Bytes // virtual size of the disk
	Journal   lab.Bytes // size of the file system's journal
	MinMemory lab.Bytes // below which the box does not boot
	Append    string    // kernel command line
	User      string    // whom to log in as
	CloudInit bool      // reads a NoCloud seed
	Has       []string  // what is in the box, for people
}

// Other names packages of another suite, which are unpacked over those of the recipe's
// own, with what they depend on.
type Other struct {
	Suite    string
	Packages []string
}

// Link is a symbolic link.
type Link struct{ Path, Target string }

// Entry is the mode of a path, nine bits and the three above them.
type Entry struct {
	Path string
	Mode fs.FileMode
}

// Boot says what every built-in box boots with.
type Boot struct {
	Kernel  string   // package of the kernel
	Shell   string   // package of the static busybox that the initrd runs
	Modules []string // kernel modules that the initrd loads, in this order
	Init    []byte   // the initrd's /init
}

// recipe is the file recipe.yaml; paths in it are relative to the root directory.
type recipe struct {
	Suite     string              `yaml:"suite"`
	Variant   string              `yaml:"variant"`
	Packages  []string            `yaml:"packages"`
	Others    map[string][]string `yaml:"other_suites"`
	Exclude   []string            `yaml:"exclude"`
	Include   []string            `yaml:"include"`
	Customize []string            `yaml:"customize"`
	Keep      []string            `yaml:"keep"`
	Drop      []string            `yaml:"drop"`
	Modules   []string            `yaml:"modules"`
	Mask      []string            `yaml:"mask"`    // systemd units
	Applets   []string            `yaml:"applets"` // commands that are links to busybox
	Links     map[string]string   `yaml:"links"`
	Dirs      map[string]string   `yaml:"dirs"`
	Modes     map[string]string   `yaml:"modes"`
	Size      int64               `yaml:"size_mib"`
	Journal   int64               `yaml:"journal_mib"`
	MinMemory int64               `yaml:"min_memory_mib"`
	Append    []string            `yaml:"append"`
	User      string              `yaml:"user"`
	CloudInit bool                `yaml:"cloud_init"`
	Has       []string            `yaml:"has"`
}

// boot is the file boot/boot.yaml.
type boot struct {
	Kernel  string   `yaml:"kernel"`
	Shell   string   `yaml:"shell"`
	Modules []string `yaml:"modules"`
}

// Names lists the built-in boxes, sorted.
func Names() []string { return []string{"debian-12", "tiny"} }

// Get returns the recipe called name, with or without "builtin/" before it.
func Get(name string) (Recipe, error) {
	name = strings.TrimPrefix(name, "builtin/")
	if !slices.Contains(Names(), name) {
		return Recipe{}, fmt.Errorf("%w: %q (there are %s)", ErrNotFound, name, strings.Join(Names(), ", "))
	}
	var r recipe
	if err := decode(name+"/recipe.yaml", &r); err != nil {
		return Recipe{}, err
	}
	files, err := fs.Sub(data, name+"/files")
	if err != nil {
		return Recipe{}, err
	}
	out := Recipe{
		Name: name, Suite: r.Suite, Variant: r.Variant, Packages: r.Packages,
		Exclude: r.Exclude, Include: r.Include, Customize: r.Customize,
		Keep: r.Keep, Drop: r.Drop, Modules: r.Modules, Files: files,
		Size: lab.Bytes(r.Size) * lab.MiB, Journal: lab.Bytes(r.Journal) * lab.MiB,
		MinMemory: lab.Bytes(r.MinMemory) * lab.MiB,
		Append:    strings.Join(r.Append, " "), User: r.User, CloudInit: r.CloudInit, Has: r.Has,
	}
	for suite, packages := range r.Others {
		out.Others = append(out.Others, Other{suite, packages})
	}
	slices.SortFunc(out.Others, func(a, b Other) int { return strings.Compare(a.Suite, b.Suite) })
	for p, target := range r.Links {
		out.Links = append(out.Links, Link{p, target})
	}
	for _, unit := range r.Mask {
		out.Links = append(out.Links, Link{"etc/systemd/system/" + unit, "/dev/null"})
	}
	for _, a := range r.Applets {
		out.Links = append(out.Links, Link{a, "/bin/busybox"})
	}
	slices.SortFunc(out.Links, func(a, b Link) int { return strings.Compare(a.Path, b.Path) })
	if out.Dirs, err = entries(r.Dirs); err != nil {
		return Recipe{}, fmt.Errorf("recipe %q: dirs: %w", name, err)
	}
	if out.Modes, err = entries(r.Modes); err != nil {
		return Recipe{}, fmt.Errorf("recipe %q: modes: %w", name, err)
	}
	if err := out.validate(); err != nil {
		return Recipe{}, fmt.Errorf("recipe %q: %w", name, err)
	}
	return out, nil
}

// GetBoot returns what every built-in box boots with.
func GetBoot() (Boot, error) {
	var b boot
	if err := decode("boot/boot.yaml", &b); err != nil {
		return Boot{}, err
	}
	script, err := data.ReadFile("boot/init")
	if err != nil {
		return Boot{}, err
	}
	return Boot{Kernel: b.Kernel, Shell: b.Shell, Modules: b.Modules, Init: script}, nil
}

func decode(name string, into any) error {
	raw, err := data.ReadFile(name)
	if err != nil {
		return err
	}
	d := yaml.NewDecoder(bytes.NewReader(raw))
	d.KnownFields(true)
	if err := d.Decode(into); err != nil {
		return fmt.Errorf("reading %s: %w", name, err)
	}
	return nil
}

func entries(m map[string]string) ([]Entry, error) {
	var out []Entry
	for p, s := range m {
		mode, err := strconv.ParseUint(s, 8, 12)
		if err != nil {
			return nil, fmt.Errorf("%s: mode %q: %w", p, s, err)
		}
		out = append(out, Entry{p, fs.FileMode(mode)})
	}
	slices.SortFunc(out, func(a, b Entry) int { return strings.Compare(a.Path, b.Path) })
	return out, nil
}

var packageName = regexp.MustCompile(`^[a-z0-9][a-z0-9+.-]+$`)

// validate finds what a slip in a recipe would otherwise show only in a build.
func (r Recipe) validate() error {
	var errs []error
	bad := func(format string, a ...any) { errs = append(errs, fmt.Errorf(format, a...)) }
	if r.Suite == "" || r.Variant == "" {
		bad("suite and variant are needed")
	}
	if r.Size <= 0 || r.Journal <= 0 || r.MinMemory <= 0 {
		bad("size_mib, journal_mib and min_memory_mib must be positive")
	}
	packages := slices.Clone(r.Packages)
	for _, o := range r.Others {
		if r.Variant != "extract" {
			bad("other_suites: packages of %s cannot be installed over those of %s, only unpacked (variant: extract)", o.Suite, r.Suite)
		}
		packages = append(packages, o.Packages...)
	}
	for _, p := range packages {
		if !packageName.MatchString(p) {
			bad("%q is not the name of a package", p)
		}
	}
	for _, p := range slices.Concat(r.Keep, r.Drop) {
		if _, err := path.Match(p, ""); err != nil || strings.HasPrefix(p, "/") {
			bad("bad pattern %q", p)
		}
	}
	seen := map[string]bool{}
	for _, l := range r.Links {
		if !fs.ValidPath(l.Path) || l.Target == "" {
			bad("bad link %q to %q", l.Path, l.Target)
		}
		if seen[l.Path] {
			bad("two links %q", l.Path)
		}
		seen[l.Path] = true
	}
	for _, e := range slices.Concat(r.Dirs, r.Modes) {
		if !fs.ValidPath(e.Path) {
			bad("bad path %q", e.Path)
		}
	}
	for _, e := range r.Modes {
		if _, err := fs.Stat(r.Files, e.Path); err != nil {
			bad("modes: no file %s", e.Path)
		}
	}
	return errors.Join(errs...)
}
