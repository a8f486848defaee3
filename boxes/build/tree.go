// SPDX-License-Identifier: Apache-2.0

package build

import (
	"archive/tar"
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// node is one file of a tree.
type node struct {
	Path   string // relative, slash-separated, clean; "." is the root directory
	Type   byte   // tar.TypeReg, TypeDir, TypeSymlink, TypeLink, TypeChar, TypeBlock or TypeFifo
	Mode   int64  // twelve bits
	UID    int
	GID    int
	Time   int64             // of modification, in seconds since 1970
	Target string            // of a symbolic link; path of another node for a hard link
	Spool  string            // name of the file in the spool that holds the content
	Size   int64             // of the content
	Major  int64             // of a device
	Minor  int64             // of a device
	Xattrs map[string]string // extended attributes
	Links  int               // names that a regular file has
}

// tree is a root directory: names in memory, contents in a spool directory, so that
// neither root nor a user namespace is needed for files of any owner and mode.
type tree struct {
	nodes map[string]*node
	spool string
	next  int
}

func newTree(spool string) *tree {
	t := &tree{nodes: map[string]*node{}, spool: spool}
	t.nodes["."] = &node{Path: ".", Type: tar.TypeDir, Mode: 0o755, Time: epoch}
	return t
}

// merged moves what packages ship in the directories that /usr has swallowed.
func merged(p string) string {
	first, rest, more := strings.Cut(p, "/")
	if more && (first == "bin" || first == "sbin" || strings.HasPrefix(first, "lib")) {
		return path.Join("usr", first, rest)
	}
	return p
}

// read adds what a tar holds and keep wants. Device files are left out: the
// kernel provides /dev.
func (t *tree) read(r io.Reader, keep func(p string) bool) error {
	tr := tar.NewReader(bufio.NewReaderSize(r, 1<<20))
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		p := path.Clean(strings.TrimPrefix(h.Name, "./"))
		if p == "." {
			continue
		}
		if !fs.ValidPath(p) || strings.ContainsAny(p, "\n\x00") {
			return fmt.Errorf("bad path %q in the tar", h.Name)
		}
		if strings.HasPrefix(p, "dev/") || !keep(p) {
			continue
		}
		n := &node{Path: merged(p), Type: h.Typeflag, Mode: h.Mode & 0o7777, UID: h.Uid, GID: h.Gid, Time: h.ModTime.Unix(), Links: 1}
		for k, v := range h.PAXRecords {
			if name, ok := strings.CutPrefix(k, "SCHILY.xattr."); ok {
				if n.Xattrs == nil {
					n.Xattrs = map[string]string{}
				}
				n.Xattrs[name] = v
			}
		}
		switch h.Typeflag {
		case tar.TypeReg:
			if n.Spool, n.Size, err = t.store(tr); err != nil {
				return fmt.Errorf("unpacking %s: %w", p, err)
			}
		case tar.TypeDir, tar.TypeFifo:
		case tar.TypeSymlink:
			n.Target = h.Linkname
		case tar.TypeLink:
			n.Target = merged(path.Clean(strings.TrimPrefix(h.Linkname, "./")))
		default:
			return fmt.Errorf("%s has a type that boxes do not hold (%q)", p, h.Typeflag)
		}
		t.add(n)
	}
}

// store copies content to a new file of the spool.
func (t *tree) store(r io.Reader) (string, int64, error) {
	name := strconv.Itoa(t.next)
	t.next++
	f, err := os.OpenFile(filepath.Join(t.spool, name), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return "", 0, err
	}
	n, err := io.Copy(f, r)
	return name, n, errors.Join(err, f.Close())
}

// add puts a node in the tree, over what was there, with the directories above it.
func (t *tree) add(n *node) {
	for dir := path.Dir(n.Path); dir != "." && t.nodes[dir] == nil; dir = path.Dir(dir) {
		t.nodes[dir] = &node{Path: dir, Type: tar.TypeDir, Mode: 0o755, Time: epoch}
	}
	t.nodes[n.Path] = n
}

// overlay moves the nodes of another tree into this one, over what was there.
// Directories that are there stay as they are.
func (t *tree) overlay(other *tree) error {
	for p, n := range other.nodes {
		if here := t.nodes[p]; here != nil && here.Type == tar.TypeDir && n.Type == tar.TypeDir {
			continue
		}
		if n.Spool != "" {
			name := strconv.Itoa(t.next)
			t.next++
			if err := os.Rename(filepath.Join(other.spool, n.Spool), filepath.Join(t.spool, name)); err != nil {
				return err
			}
			n.Spool = name
		}
		t.nodes[p] = n
	}
	return nil
}

// file puts a regular file of root's in the tree.
func (t *tree) file(p string, content []byte, mode int64) error {
	name, size, err := t.store(bytes.NewReader(content))
	if err != nil {
		return err
	}
	t.add(&node{Path: p, Type: tar.TypeReg, Mode: mode, Time: epoch, Spool: name, Size: size, Links: 1})
	return nil
}

// link puts a symbolic link in the tree.
func (t *tree) link(p, target string) {
	t.add(&node{Path: p, Type: tar.TypeSymlink, Mode: 0o777, Time: epoch, Target: target})
}

// dir puts a directory in the tree, or changes the mode of the one that is there.
func (t *tree) dir(p string, mode int64) {
	if n := t.nodes[p]; n != nil && n.Type == tar.TypeDir {
		n.Mode = mode
		return
	}
	t.add(&node{Path: p, Type: tar.TypeDir, Mode: mode, Time: epoch})
}

// remove takes a path and everything below it out of the tree.
func (t *tree) remove(p string) {
	for q := range t.nodes {
		if q == p || strings.HasPrefix(q, p+"/") {
			delete(t.nodes, q)
		}
	}
}

// open opens the content of a regular file.
func (t *tree) open(p string) (*os.File, error) {
	n := t.nodes[p]
	if n != nil && n.Type == tar.TypeLink {
		n = t.nodes[n.Target]
	}
	if n == nil || n.Type != tar.TypeReg {
		return nil, &fs.PathError{Op: "open", Path: p, Err: fs.ErrNotExist}
	}
	return os.Open(filepath.Join(t.spool, n.Spool))
}

// content returns the content of a regular file.
func (t *tree) content(p string) ([]byte, error) {
	f, err := t.open(p)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(f)
}

// finish counts hard links, once nothing is added any more, and checks that the
// tree can be made: a parent that is a file or a link makes it impossible.
func (t *tree) finish() error {
	for _, n := range t.sorted() {
		if up := t.nodes[path.Dir(n.Path)]; n.Path != "." && (up == nil || up.Type != tar.TypeDir) {
			return fmt.Errorf("%s is not in a directory", n.Path)
		}
		if n.Type != tar.TypeLink {
			continue
		}
		to := t.nodes[n.Target]
		if to == nil || to.Type != tar.TypeReg {
			return fmt.Errorf("%s is a hard link to %s, which is no file", n.Path, n.Target)
		}
		to.Links++
	}
	return nil
}

// sorted returns the nodes, a directory before what is in it, in an order that
// depends on names alone.
func (t *tree) sorted() []*node {
	out := make([]*node, 0, len(t.nodes))
	for _, n := range t.nodes {
		out = append(out, n)
	}
	key := func(n *node) string {
		if n.Path == "." {
			return ""
		}
		return strings.ReplaceAll(n.Path, "/", "\x00")
	}
	slices.SortFunc(out, func(a, b *node) int { return strings.Compare(key(a), key(b)) })
	return out
}
