// SPDX-License-Identifier: Apache-2.0

package build

import (
	"archive/tar"
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/labfile/lab/internal/lab"
)

// fsUUID is the UUID and hash seed of every file system the builder makes: a random
// one would give every build another digest.
const fsUUID = "6c61620a-0000-4000-8000-000000000001"

// features are spelled out, because a host's mke2fs.conf may say otherwise. They
// are those of Debian 12, all of which can grow while mounted.
const features = "none,has_journal,ext_attr,resize_inode,dir_index,filetype,extent,64bit," +
	"flex_bg,sparse_super,large_file,huge_file,dir_nlink,extra_isize,metadata_csum"

// mke2fsArgv returns the arguments that make an empty file system over the whole of
// disk, a file of size bytes of zeros.
func mke2fsArgv(disk string, size, journal lab.Bytes) []string {
	return []string{
		"-q", "-F", "-t", "ext4", "-b", "4096", "-I", "256", "-i", "16384", "-m", "1",
		"-O", features, "-U", fsUUID, "-o", "Linux", "-e", "continue",
		"-J", "size=" + strconv.FormatInt(int64(journal/lab.MiB), 10),
		// The file is known to be zeros: nothing needs to be written for inode
		// tables here, nor later by a thread of every guest's kernel.
		"-E", "hash_seed=" + fsUUID + ",root_owner=0:0,nodiscard,lazy_journal_init=1,assume_storage_prezeroed=1",
		disk, strconv.FormatInt(int64(size)/4096, 10),
	}
}

// makeExt4 makes the tree a file system of the given size in the new file disk. What
// it writes depends on the tree alone.
func makeExt4(ctx context.Context, t *tree, disk string, size, journal lab.Bytes) error {
	if err := os.WriteFile(disk, nil, 0o600); err != nil {
		return err
	}
	if err := os.Truncate(disk, int64(size)); err != nil {
		return err
	}
	if _, err := tool(ctx, t.spool, "mke2fs", mke2fsArgv(disk, size, journal)...); err != nil {
		return err
	}
	script := filepath.Join(t.spool, "script")
	f, err := os.OpenFile(script, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	w := bufio.NewWriter(f)
	writeScript(w, t)
	if err := w.Flush(); err != nil {
		f.Close()
		return fmt.Errorf("writing the script of debugfs: %w", err)
	}
	if err := f.Close(); err != nil {
		return err
	}
	stderr, err := tool(ctx, t.spool, "debugfs", "-w", "-f", script, disk)
	if err != nil {
		return err
	}
	// debugfs goes on after a command that did not work, and exits with 0.
	for line := range strings.Lines(stderr) {
		if line = strings.TrimSpace(line); line != "" && !strings.HasPrefix(line, "debugfs 1.") {
			return &ToolError{Argv: []string{"debugfs"}, Err: fmt.Errorf("a command did not work"), Output: line}
		}
	}
	return nil
}

// writeScript writes the commands of debugfs that make the tree, in an order that
// depends on names alone.
func writeScript(w io.Writer, t *tree) {
	nodes := t.sorted()
	for _, n := range nodes {
		if n.Type == tar.TypeDir && n.Path != "." {
			fmt.Fprintf(w, "cd %s\nmkdir %s\n", quote("/"+path.Dir(n.Path)), quote(path.Base(n.Path)))
		}
	}
	cwd := ""
	enter := func(n *node) string {
		if dir := "/" + path.Dir(n.Path); dir != cwd {
			cwd = dir
			fmt.Fprintf(w, "cd %s\n", quote(dir))
		}
		return quote(path.Base(n.Path))
	}
	for _, n := range nodes {
		switch n.Type {
		case tar.TypeReg:
			fmt.Fprintf(w, "write %s %s\n", n.Spool, enter(n))
		case tar.TypeSymlink:
			fmt.Fprintf(w, "symlink %s %s\n", enter(n), quote(n.Target))
		case tar.TypeFifo:
			fmt.Fprintf(w, "mknod %s p\n", enter(n))
		}
	}
	for _, n := range nodes {
		if n.Type == tar.TypeLink {
			name := enter(n)
			fmt.Fprintf(w, "ln %s %s\n", quote("/"+n.Target), name)
		}
	}
	for _, n := range nodes {
		if n.Type == tar.TypeLink {
			continue
		}
		name := enter(n)
		if n.Path == "." {
			name = "/"
		}
		set := func(field string, value any) { fmt.Fprintf(w, "sif %s %s %v\n", name, field, value) }
		if n.Type != tar.TypeSymlink {
			set("mode", fmt.Sprintf("0%o", typeBits[n.Type]|n.Mode))
		}
		if n.UID != 0 {
			set("uid", n.UID)
		}
		if n.GID != 0 {
			set("gid", n.GID)
		}
		if n.Links > 1 {
			set("links_count", n.Links)
		}
		if n.Time != epoch {
			set("mtime", fmt.Sprintf("@%d", n.Time))
		}
		for _, x := range sortedKeys(n.Xattrs) {
			fmt.Fprintf(w, "ea_set %s %s \"%s\"\n", name, x, escape(n.Xattrs[x]))
		}
	}
}

var typeBits = map[byte]int64{tar.TypeReg: 0o100000, tar.TypeDir: 0o040000, tar.TypeFifo: 0o010000}

// quote makes s one word of a debugfs command.
func quote(s string) string {
	if s == "" || strings.ContainsAny(s, " \t\"") {
		return `"` + strings.ReplaceAll(s, `"`, `""`) + `"`
	}
	return s
}

// escape writes the value of an attribute so that debugfs reads the same bytes.
func escape(s string) string {
	var b strings.Builder
	for _, c := range []byte(s) {
		if c < ' ' || c > '~' || c == '"' || c == '\\' {
			fmt.Fprintf(&b, "\\%03o", c)
		} else {
			b.WriteByte(c)
		}
	}
	return b.String()
}

func sortedKeys(m map[string]string) []string {
	var keys []string
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}
