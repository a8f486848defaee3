// SPDX-License-Identifier: Apache-2.0

package drift

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"

	"github.com/labfile/lab/internal/drift/ext4"
)

// Options say what Compare lists.
type Options struct {
	Ignore *Ignore // nil hides nothing
	All    bool    // list what is hidden too, and files of which only the time changed

	// Proxies says that lab wrote proxy settings into proxy.File: where its content is not
	// known, it is hidden.
	Proxies bool
}

const (
	maxDepth = 1024    // of folders within each other
	maxPath  = 1 << 15 // bytes
	chunk    = 1 << 20 // bytes that are compared at once
)

// Compare walks both file systems and returns how they differ.
func Compare(ctx context.Context, old, now *Root, o Options) (Report, error) {
	c := &comparison{
		ctx: ctx, old: old, now: now, o: o,
		seen: map[[2]uint32]int{}, dirs: map[[2]uint32]bool{},
	}
	a, err := old.meta(ext4.RootInode)
	if err != nil {
		return Report{}, err
	}
	b, err := now.meta(ext4.RootInode)
	if err != nil {
		return Report{}, err
	}
	if err := c.pair("/", a, b, 0); err != nil {
		return Report{}, err
	}
	return c.report(), nil
}

type comparison struct {
	ctx      context.Context
	old, now *Root
	o        Options

	changes []Change
	seen    map[[2]uint32]int  // pairs of files with several links; index of their change, or -1
	dirs    map[[2]uint32]bool // folders that were entered
	read    int64              // bytes that were compared
}

func (c *comparison) report() Report {
	r := Report{Changes: []Change{}}
	for _, ch := range c.changes {
		if ch.Hidden && !c.o.All {
			r.Hidden++
			continue
		}
		r.Changes = append(r.Changes, ch)
	}
	slices.SortStableFunc(r.Changes, func(a, b Change) int { return strings.Compare(a.Path, b.Path) })
	return r
}

func (c *comparison) add(ch Change) {
	m := ch.New
	if m == nil {
		m = ch.Old
	}
	ch.Hidden = c.o.Ignore.Match(ch.Path, m.Kind == KindDir) || c.onlyProxies(ch)
	c.changes = append(c.changes, ch)
}

// meta reads an inode.
func (r *Root) meta(n uint32) (*Meta, error) {
	i, err := r.fs.Inode(n)
	if err != nil {
		return nil, err
	}
	m := &Meta{Kind: kind(i.Type()), Mode: fmt.Sprintf("%04o", i.Mode&0o7777), UID: i.UID, GID: i.GID, Size: i.Size, inode: i}
	if m.Kind == KindSymlink {
		if m.Target, err = r.fs.Target(i); err != nil {
			return m, err
		}
	}
	m.XAttrs, err = r.fs.Attrs(i)
	return m, err
}

func kind(t uint16) Kind {
	switch t {
	case ext4.TypeFile:
		return KindFile
	case ext4.TypeDir:
		return KindDir
	case ext4.TypeSymlink:
		return KindSymlink
	case ext4.TypeChar:
		return KindChar
	case ext4.TypeBlock:
		return KindBlock
	case ext4.TypeFIFO:
		return KindFIFO
	case ext4.TypeSocket:
		return KindSocket
	}
	return KindUnknown
}

// pair compares what stands at a path on both disks; either may be nil.
func (c *comparison) pair(path string, a, b *Meta, depth int) error {
	if depth > maxDepth || len(path) > maxPath {
		return fmt.Errorf("%.64q...: folders lie too deep", path)
	}
	switch {
	case a == nil:
		c.add(Change{Op: Added, Path: path, New: b})
	case b == nil:
		c.add(Change{Op: Deleted, Path: path, Old: a})
	case a.Kind != b.Kind:
		c.add(Change{Op: Replaced, Path: path, Old: a, New: b})
	default:
		if err := c.both(path, a, b); err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
	}
	aDir, bDir := a != nil && a.Kind == KindDir, b != nil && b.Kind == KindDir
	if !aDir && !bDir {
		return nil
	}
	return c.dir(path, a, b, aDir, bDir, depth)
}

// dir compares what two folders have; only one of them need be one.
func (c *comparison) dir(path string, a, b *Meta, aDir, bDir bool, depth int) error {
	if err := c.ctx.Err(); err != nil {
		return err
	}
	var key [2]uint32
	var olds, news []ext4.Entry
	var err error
	if aDir {
		key[0] = a.inode.Number
		if olds, err = c.old.fs.ReadDir(a.inode); err != nil {
			return fmt.Errorf("%s at birth: %w", path, err)
		}
	}
	if bDir {
		key[1] = b.inode.Number
		if news, err = c.now.fs.ReadDir(b.inode); err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
	}
	if c.dirs[key] {
		return fmt.Errorf("%s: a folder that lies in two places", path)
	}
	c.dirs[key] = true
	for len(olds) > 0 || len(news) > 0 {
		var name string
		order := -1
		if len(olds) == 0 {
			order = 1
		} else if len(news) > 0 {
			order = strings.Compare(olds[0].Name, news[0].Name)
		}
		var m, n *Meta
		if order <= 0 {
			name = olds[0].Name
			if m, err = c.old.meta(olds[0].Inode); err != nil {
				return err
			}
			olds = olds[1:]
		}
		if order >= 0 {
			name = news[0].Name
			if n, err = c.now.meta(news[0].Inode); err != nil {
				return err
			}
			news = news[1:]
		}
		if err := c.pair(strings.TrimSuffix(path, "/")+"/"+name, m, n, depth+1); err != nil {
			return err
		}
	}
	return nil
}

// both compares two files of the same kind.
func (c *comparison) both(path string, a, b *Meta) error {
	key := [2]uint32{a.inode.Number, b.inode.Number}
	linked := a.Kind != KindDir && (a.inode.Links > 1 || b.inode.Links > 1)
	if linked {
		if n, ok := c.seen[key]; ok {
			if n >= 0 {
				c.changes[n].Links = append(c.changes[n].Links, path)
			}
			return nil
		}
		c.seen[key] = -1
	}
	var what []string
	if a.Kind == KindFile {
		equal, err := c.content(a, b)
		if err != nil {
			return err
		}
		if !equal {
			what = append(what, Content)
		}
	}
	if a.Mode != b.Mode {
		what = append(what, Mode)
	}
	if a.UID != b.UID || a.GID != b.GID {
		what = append(what, Owner)
	}
	if a.Target != b.Target {
		what = append(what, Target)
	}
	if a.inode.Device != b.inode.Device {
		what = append(what, Device)
	}
	if !maps.EqualFunc(a.XAttrs, b.XAttrs, bytes.Equal) {
		what = append(what, XAttr)
	}
	if len(what) == 0 && c.o.All && a.Kind == KindFile && !a.inode.Modified.Equal(b.inode.Modified) {
		what = append(what, MTime)
	}
	if len(what) == 0 {
		return nil
	}
	if linked {
		c.seen[key] = len(c.changes)
	}
	c.add(Change{Op: Modified, Path: path, Old: a, New: b, What: what})
	return nil
}

// content reports whether two files have the same bytes. Blocks that both disks keep
// in the same place are not read.
func (c *comparison) content(a, b *Meta) (bool, error) {
	if a.Size != b.Size {
		return false, nil
	}
	fa, err := c.old.fs.File(a.inode)
	if err != nil {
		return false, err
	}
	fb, err := c.now.fs.File(b.inode)
	if err != nil {
		return false, err
	}
	as, bs := c.old.runs(fa), c.now.runs(fb)
	for off := int64(0); off < a.Size; {
		ra, rb := as.at(off), bs.at(off)
		n := min(ra.end, rb.end, a.Size) - off
		equal := ra.hole && rb.hole
		if !equal && ra.known && rb.known {
			// What is kept in one place may span many clusters, of which few changed.
			n = min(n, chunk)
			if equal, err = same(c.old.view, ra.disk, c.now.view, rb.disk, n); err != nil {
				return false, err
			}
		}
		if !equal {
			n = min(n, 1<<16)
			if equal, err = c.bytes(fa, fb, off, n); err != nil || !equal {
				return false, err
			}
		}
		off += n
	}
	return true, nil
}

func (c *comparison) bytes(fa, fb *ext4.File, off, n int64) (bool, error) {
	if err := c.ctx.Err(); err != nil {
		return false, err
	}
	// No block belongs to two files: more than both disks is a trap.
	if c.read += n; c.read > 2*(c.old.view.Size()+c.now.view.Size()) {
		return false, errors.New("the files claim more blocks than the disk has")
	}
	x, y := make([]byte, n), make([]byte, n)
	if _, err := fa.ReadAt(x, off); err != nil && !errors.Is(err, io.EOF) {
		return false, err
	}
	if _, err := fb.ReadAt(y, off); err != nil && !errors.Is(err, io.EOF) {
		return false, err
	}
	return bytes.Equal(x, y), nil
}

// runs walks over a file's extents in ascending order.
type runs struct {
	root    *Root
	extents []ext4.Extent
	inline  bool
}

// run is what a file has from an offset on.
type run struct {
	end   int64 // offset in the file at which it ends
	hole  bool  // it reads as zeros
	known bool  // it is kept at disk, and not in the journal
	disk  int64 // offset on the disk
}

func (r *Root) runs(f *ext4.File) *runs {
	return &runs{root: r, extents: f.Extents(), inline: f.Inline()}
}

func (s *runs) at(off int64) run {
	const far = 1 << 62
	if s.inline {
		return run{end: far}
	}
	bs := s.root.fs.BlockSize()
	n := uint64(off / bs)
	for len(s.extents) > 0 && s.extents[0].Logical+s.extents[0].Len <= n {
		s.extents = s.extents[1:]
	}
	if len(s.extents) == 0 {
		return run{end: far, hole: true}
	}
	e := s.extents[0]
	if e.Logical > n {
		return run{end: int64(e.Logical) * bs, hole: true}
	}
	end := int64(e.Logical+e.Len) * bs
	block := e.Block + n - e.Logical
	if e.Zero {
		return run{end: end, hole: true}
	}
	return run{
		end: end, known: !s.root.fs.InJournal(block, e.Logical+e.Len-n),
		disk: s.root.at + int64(block)*bs + off%bs,
	}
}
