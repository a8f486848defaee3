// SPDX-License-Identifier: Apache-2.0

package build

import (
	"bytes"
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/labfile/lab/boxes/recipes"
)

// kernelHook lists the modules' dependencies with the depmod that was unpacked
// beside them.
const kernelHook = `set -e; cd "$1"; for v in lib/modules/*; do chroot . /sbin/depmod "${v##*/}"; done`

// keepKernel says what of the kernel's packages matters.
func keepKernel(p string) bool {
	return p == manifestName || p == "bin/busybox" || p == "usr/bin/busybox" || strings.HasPrefix(p, "boot/vmlinuz-") ||
		strings.HasPrefix(p, "lib/modules/") || strings.HasPrefix(p, "usr/lib/modules/")
}

// kernel is what a tree of kernel packages holds.
type kernel struct {
	tree    *tree
	version string            // as uname -r says
	image   string            // path of the kernel in the tree
	base    string            // directory of the modules
	files   map[string]string // module -> path below base; names with "_" for "-"
	deps    map[string][]string
}

// readKernel finds the kernel in a tree.
func readKernel(t *tree) (*kernel, error) {
	k := &kernel{tree: t, files: map[string]string{}, deps: map[string][]string{}}
	for p := range t.nodes {
		if v, ok := strings.CutPrefix(p, "boot/vmlinuz-"); ok {
			if k.version != "" {
				return nil, fmt.Errorf("two kernels, %s and %s", k.version, v)
			}
			k.version, k.image = v, p
		}
	}
	if k.version == "" {
		return nil, fmt.Errorf("the kernel's package holds no /boot/vmlinuz-*")
	}
	k.base = "usr/lib/modules/" + k.version
	dep, err := t.content(k.base + "/modules.dep")
	if err != nil {
		return nil, fmt.Errorf("reading what modules need: %w", err)
	}
	for line := range strings.Lines(string(dep)) {
		file, needs, ok := strings.Cut(strings.TrimSpace(line), ":")
		if !ok {
			continue
		}
		k.files[moduleName(file)] = file
		k.deps[moduleName(file)] = strings.Fields(needs)
	}
	return k, nil
}

// moduleName is how the kernel calls the module in a file: "virtio_net".
func moduleName(file string) string {
	name, _, _ := strings.Cut(path.Base(file), ".")
	return strings.ReplaceAll(name, "-", "_")
}

// closure returns the files of modules and of all they need, sorted, and the lines of
// modules.dep that belong to them.
func (k *kernel) closure(modules []string) (files []string, dep []byte, err error) {
	for _, m := range modules {
		m = moduleName(m)
		file, ok := k.files[m]
		if !ok {
			return nil, nil, fmt.Errorf("kernel %s has no module %s", k.version, m)
		}
		files = append(append(files, file), k.deps[m]...)
	}
	slices.Sort(files)
	files = slices.Compact(files)
	var b bytes.Buffer
	for _, f := range files {
		b.WriteString(f + ":")
		for _, d := range k.deps[moduleName(f)] {
			b.WriteString(" " + d)
		}
		b.WriteString("\n")
	}
	return files, b.Bytes(), nil
}

// install puts modules into a box: all that there are if modules is ["all"].
func (k *kernel) install(into *tree, modules []string) error {
	if slices.Equal(modules, []string{"all"}) {
		for _, n := range k.tree.sorted() {
			if !strings.HasPrefix(n.Path, k.base+"/") {
				continue
			}
			if err := copyNode(into, k.tree, n); err != nil {
				return err
			}
		}
		return nil
	}
	files, dep, err := k.closure(modules)
	if err != nil {
		return err
	}
	for _, f := range files {
		if err := copyNode(into, k.tree, k.tree.nodes[k.base+"/"+f]); err != nil {
			return err
		}
	}
	return into.file(k.base+"/modules.dep", dep, 0o644)
}

// copyNode copies a node, content included, from one tree to another.
func copyNode(into, from *tree, n *node) error {
	c := *n
	if n.Spool != "" {
		f, err := from.open(n.Path)
		if err != nil {
			return err
		}
		defer f.Close()
		if c.Spool, c.Size, err = into.store(f); err != nil {
			return err
		}
	}
	into.add(&c)
	return nil
}

// initrd returns the archive that every built-in box boots from.
func (k *kernel) initrd(b recipes.Boot) ([]byte, error) {
	busybox, err := k.tree.content("usr/bin/busybox")
	if err != nil {
		return nil, err
	}
	files, dep, err := k.closure(b.Modules)
	if err != nil {
		return nil, err
	}
	var out bytes.Buffer
	c := &cpioWriter{w: &out}
	base := "lib/modules/" + k.version
	made := map[string]bool{}
	var mkdir func(string)
	mkdir = func(d string) {
		if d != "." && !made[d] {
			mkdir(path.Dir(d))
			made[d] = true
			c.dir(d)
		}
	}
	for _, d := range []string{"bin", "dev", "root", base} {
		mkdir(d)
	}
	c.char("dev/console", 0o600, 5, 1)
	c.file("init", 0o755, b.Init)
	c.file("bin/busybox", 0o755, busybox)
	c.file("modules", 0o644, []byte(strings.Join(b.Modules, " ")+"\n"))
	c.file(base+"/modules.dep", 0o644, dep)
	for _, f := range files {
		content, err := k.tree.content(k.base + "/" + f)
		if err != nil {
			return nil, err
		}
		mkdir(path.Dir(base + "/" + f))
		c.file(base+"/"+f, 0o644, content)
	}
	if err := c.close(); err != nil {
		return nil, err
	}
	return out.Bytes(), nil
}
