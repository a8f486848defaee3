// SPDX-License-Identifier: Apache-2.0

// Package build makes the built-in boxes from signed Debian packages, without root
// where the host allows it, so that the same packages give the same bytes.
package build

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/labfile/lab/boxes"
	"github.com/labfile/lab/boxes/recipes"
)

// Progress says how far a build is. Done and Total count steps of the stage; Total is
// 0 where that is not known.
type Progress struct {
	Stage string
	Done  int
	Total int
}

// The stages of a build, in order.
const (
	StagePackages = "installing packages"
	StageDisk     = "making the disk"
	StageImage    = "packing the disk"
)

// Artifacts are the files of a box that was built.
type Artifacts struct {
	Config boxes.Config
	Disk   string // absolute paths
	Kernel string
	Initrd string
}

// Builder builds the built-in boxes.
type Builder struct {
	// Mirror is where Debian's packages come from: a URL with Debian's own layout
	// below it ("https://mirror.example"), a line of sources.list, or the absolute
	// path of such a file. Empty leaves it to mmdebstrap.
	Mirror string
	// Log gets every line that the tools print; nil discards them.
	Log func(line string)
}

// MirrorEnv is the environment variable that sets Builder.Mirror.
const MirrorEnv = "LAB_DEBIAN_MIRROR"

// BuildFiles builds the box called name into the directory dir, as disk.qcow2, vmlinuz,
// initrd and config.json. An error wraps ErrIncapable if this host can't, and
// recipes.ErrNotFound if there is no such box; it is a *ToolError if a program did not
// succeed. progress is called from one goroutine at a time. Whatever happens, nothing
// is left outside of dir.
func (b *Builder) BuildFiles(ctx context.Context, name, dir string, progress func(Progress)) (_ Artifacts, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("building box %q: %w", name, err)
		}
	}()
	r, err := recipes.Get(name)
	if err != nil {
		return Artifacts{}, err
	}
	boot, err := recipes.GetBoot()
	if err != nil {
		return Artifacts{}, err
	}
	how, err := mode(ctx, os.Getuid(), "/etc")
	if err != nil {
		return Artifacts{}, err
	}
	if dir, err = filepath.Abs(dir); err != nil {
		return Artifacts{}, err
	}
	w, err := newWorkshop(ctx, how)
	if err != nil {
		return Artifacts{}, err
	}
	defer w.close()

	root, k, pkgs, err := b.packages(ctx, w, how, r, boot, progress)
	if err != nil {
		return Artifacts{}, err
	}
	progress(Progress{Stage: StageDisk})
	if err := furnish(root, k, r); err != nil {
		return Artifacts{}, err
	}
	a := Artifacts{
		Config: boxes.Config{
			Architecture: "amd64", Created: time.Unix(epoch, 0).UTC(),
			Format: "qcow2", Size: int64(r.Size), Append: r.Append, User: r.User,
			Agent: AgentIncluded(), CloudInit: r.CloudInit, MinMemory: int64(r.MinMemory), Has: r.Has, Packages: pkgs,
		},
		Disk:   filepath.Join(dir, "disk.qcow2"),
		Kernel: filepath.Join(dir, "vmlinuz"),
		Initrd: filepath.Join(dir, "initrd"),
	}
	raw := filepath.Join(w.dir, "disk.raw")
	if err := makeExt4(ctx, root, raw, r.Size, r.Journal); err != nil {
		return Artifacts{}, err
	}
	progress(Progress{Stage: StageImage})
	// One coroutine, in order: clusters then lie in the image as they do on the disk.
	if _, err := tool(ctx, dir, "qemu-img", "convert", "-m", "1", "-f", "raw", "-O", "qcow2",
		"-o", "compat=1.1,cluster_size=65536", raw, a.Disk); err != nil {
		return Artifacts{}, err
	}
	if err := os.Chmod(a.Disk, 0o600); err != nil {
		return Artifacts{}, err
	}
	return a, a.writeBoot(k, boot)
}

// writeBoot writes kernel, initrd and config.
func (a Artifacts) writeBoot(k *kernel, boot recipes.Boot) error {
	image, err := k.tree.content(k.image)
	if err != nil {
		return err
	}
	initrd, err := k.initrd(boot)
	if err != nil {
		return fmt.Errorf("making the initrd: %w", err)
	}
	config, err := json.MarshalIndent(a.Config, "", "  ")
	if err != nil {
		return err
	}
	for file, content := range map[string][]byte{
		a.Kernel: image, a.Initrd: initrd, filepath.Join(filepath.Dir(a.Disk), "config.json"): append(config, '\n'),
	} {
		if err := os.WriteFile(file, content, 0o600); err != nil {
			return err
		}
	}
	return nil
}

// packages fetches the packages of the box and those of its kernel, side by side, and
// lists them all.
func (b *Builder) packages(ctx context.Context, w *workshop, how string, r recipes.Recipe, boot recipes.Boot, progress func(Progress)) (root *tree, k *kernel, pkgs []string, err error) {
	var mu sync.Mutex
	var count counter
	progress(Progress{Stage: StagePackages})
	log := func(line string) {
		mu.Lock()
		defer mu.Unlock()
		if b.Log != nil {
			b.Log(line)
		}
		if count.line(line) {
			progress(Progress{StagePackages, count.done, count.total})
		}
	}
	var trees []*tree
	g, gctx := errgroup.WithContext(ctx)
	fetch := func(name string, d debootstrap, log func(string), keep func(string) bool) error {
		spool, err := w.spool(name)
		if err != nil {
			return err
		}
		t := newTree(spool)
		trees = append(trees, t)
		d.Mode, d.Mirror = how, b.Mirror
		g.Go(func() error { return d.run(gctx, w.tmp, log, func(r io.Reader) error { return t.read(r, keep) }) })
		return nil
	}
	silent := func(string) {}
	err = errors.Join(
		fetch("root", debootstrap{Suite: r.Suite, Variant: r.Variant, Packages: r.Packages, Exclude: r.Exclude, Include: r.Include, Customize: r.Customize}, log, keeper(r)),
		fetch("kernel", debootstrap{Suite: r.Suite, Variant: "extract", Packages: []string{boot.Kernel, boot.Shell}, Customize: []string{kernelHook}}, silent, keepKernel),
	)
	for _, o := range r.Others {
		d := debootstrap{Suite: o.Suite, Variant: "extract", Packages: o.Packages, Exclude: r.Exclude, Include: r.Include}
		err = errors.Join(err, fetch(o.Suite, d, silent, keeper(r)))
	}
	if err = errors.Join(g.Wait(), err); err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return nil, nil, nil, err
	}
	if pkgs, err = packageList(trees[0], trees[1], trees[2:], boot); err != nil {
		return nil, nil, nil, err
	}
	root = trees[0]
	for _, o := range trees[2:] {
		if err := root.overlay(o); err != nil {
			return nil, nil, nil, err
		}
	}
	k, err = readKernel(trees[1])
	return root, k, pkgs, err
}

// keeper returns what of a recipe's packages stays in the box.
func keeper(r recipes.Recipe) func(string) bool {
	match := func(patterns []string, p string) bool {
		return slices.ContainsFunc(patterns, func(pattern string) bool {
			ok, _ := path.Match(pattern, p) // the recipe has been validated
			return ok
		})
	}
	return func(p string) bool {
		for q := p; q != "."; q = path.Dir(q) {
			if match(r.Drop, q) {
				return false
			}
		}
		return len(r.Keep) == 0 || p == manifestName || match(r.Keep, p)
	}
}

// packageList lists the packages that the box has files of: all of its own, and of those
// that came with the kernel only the kernel and the initrd's shell.
func packageList(root, kernel *tree, others []*tree, boot recipes.Boot) ([]string, error) {
	all, err := installed(slices.Concat(others, []*tree{root})...)
	if err != nil {
		return nil, err
	}
	came, err := installed(kernel)
	if err != nil {
		return nil, err
	}
	for _, p := range came {
		if strings.HasPrefix(p, "linux-image-") || strings.HasPrefix(p, boot.Shell+"=") {
			all = append(all, p)
		}
	}
	slices.Sort(all)
	return slices.Compact(all), nil
}

// installed lists the packages of the trees as "name=version", sorted, and takes the
// lists that are not dpkg's own out of them.
func installed(trees ...*tree) ([]string, error) {
	var out []string
	for _, t := range trees {
		if list, err := t.content(manifestName); err == nil {
			out = append(out, strings.Fields(string(list))...)
			t.remove(manifestName)
			continue
		}
		status, err := t.content("var/lib/dpkg/status")
		if err != nil {
			return nil, fmt.Errorf("reading the list of packages: %w", err)
		}
		name := ""
		for line := range strings.Lines(string(status)) {
			key, value, _ := strings.Cut(strings.TrimSuffix(line, "\n"), ": ")
			switch key {
			case "Package":
				name = value
			case "Version":
				out = append(out, name+"="+value)
			}
		}
	}
	slices.Sort(out)
	return slices.Compact(out), nil
}

// furnish lays over a tree of packages what the recipe adds.
func furnish(t *tree, k *kernel, r recipes.Recipe) error {
	for _, l := range r.Links {
		t.remove(l.Path)
		t.link(l.Path, l.Target)
	}
	for _, d := range r.Dirs {
		t.dir(d.Path, int64(d.Mode))
	}
	for _, d := range []string{"dev", "proc", "sys", "run"} {
		if t.nodes[d] == nil {
			t.dir(d, 0o755)
		}
	}
	if err := k.install(t, r.Modules); err != nil {
		return err
	}
	modes := map[string]fs.FileMode{}
	for _, m := range r.Modes {
		modes[m.Path] = m.Mode
	}
	err := fs.WalkDir(r.Files, ".", func(p string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		content, err := fs.ReadFile(r.Files, p)
		if err != nil {
			return err
		}
		mode, ok := modes[p]
		if !ok {
			mode = 0o644
		}
		if p == "etc/inittab" && !AgentIncluded() {
			content = withoutAgent(content)
		}
		if n := t.nodes[p]; n != nil && n.Type != tar.TypeReg {
			t.remove(p)
		}
		return t.file(p, content, int64(mode))
	})
	if err != nil {
		return fmt.Errorf("adding the recipe's files: %w", err)
	}
	if a := Agent(); a != nil {
		if err := t.file("usr/sbin/lab-agent", a, 0o755); err != nil {
			return err
		}
	}
	return t.finish()
}

// withoutAgent takes the agent's line out of an inittab: init would try to start it
// for ever.
func withoutAgent(inittab []byte) []byte {
	var out []byte
	for line := range bytes.Lines(inittab) {
		if !bytes.Contains(line, []byte("/usr/sbin/lab-agent")) {
			out = append(out, line...)
		}
	}
	return out
}
