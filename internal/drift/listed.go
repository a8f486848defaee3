// SPDX-License-Identifier: Apache-2.0

package drift

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"strings"
	"time"
)

// CompareManifests returns how two lists of files differ. What is in a file counts as
// changed if its size or its time of modification is another. Of one and the same
// generation, whose birth old is, so it does if its inode is another, or if the time
// of its last change is and nothing else says why: that time no program can set.
func CompareManifests(old, now *Manifest, same bool, o Options) Report {
	c := &listing{
		comparison: comparison{o: o}, same: same, seconds: old.seconds || now.seconds,
		seen: map[[2]uint64]int{}, mounts: map[string]bool{},
	}
	a, b := old.entries, now.entries
	for len(a) > 0 || len(b) > 0 {
		order := -1
		if len(a) == 0 {
			order = 1
		} else if len(b) > 0 {
			order = strings.Compare(a[0].path, b[0].path)
		}
		var m, n *listed
		if order <= 0 {
			m, a = a[0], a[1:]
		}
		if order >= 0 {
			n, b = b[0], b[1:]
		}
		c.pair(m, n)
	}
	return c.report()
}

// listing is a comparison of manifests.
type listing struct {
	comparison
	same, seconds bool
	seen          map[[2]uint64]int // as in comparison
	mounts        map[string]bool   // where another file system stands on one of the sides
}

// pair compares what stands at a path; either may be nil. What another file system
// hides on one side is not known, so nothing is said of it.
func (c *listing) pair(a, b *listed) {
	for _, e := range []*listed{a, b} {
		if e != nil && e.mount {
			c.mounts[e.path] = true
		}
	}
	name := ""
	if a != nil {
		name = a.path
	} else {
		name = b.path
	}
	if c.mounts[name] && a != nil && b != nil || c.hidden(name) {
		return
	}
	switch {
	case a == nil:
		c.add(Change{Op: Added, Path: name, New: &b.meta})
	case b == nil:
		c.add(Change{Op: Deleted, Path: name, Old: &a.meta})
	case a.meta.Kind != b.meta.Kind:
		c.add(Change{Op: Replaced, Path: name, Old: &a.meta, New: &b.meta})
	default:
		c.both(name, a, b)
	}
}

// hidden reports whether another file system stands above a path.
func (c *listing) hidden(name string) bool {
	for len(c.mounts) > 0 {
		i := strings.LastIndexByte(name, '/')
		if i < 0 {
			return false
		}
		if name = name[:i]; c.mounts[name] {
			return true
		}
	}
	return false
}

func (c *listing) both(name string, a, b *listed) {
	key := [2]uint64{a.inode, b.inode}
	linked := a.meta.Kind != KindDir && (a.links > 1 || b.links > 1)
	if linked {
		if n, ok := c.seen[key]; ok {
			if n >= 0 {
				c.changes[n].Links = append(c.changes[n].Links, name)
			}
			return
		}
		c.seen[key] = -1
	}
	var what []string
	if a.meta.Mode != b.meta.Mode {
		what = append(what, Mode)
	}
	if a.meta.UID != b.meta.UID || a.meta.GID != b.meta.GID {
		what = append(what, Owner)
	}
	explained := len(what) > 0 || a.links != b.links
	if a.meta.Target != b.meta.Target {
		what = append(what, Target)
	}
	if a.device != b.device {
		what = append(what, Device)
	}
	modified := !c.equal(a.modified, b.modified)
	if a.meta.Kind == KindFile {
		if a.meta.Size != b.meta.Size || modified ||
			c.same && (a.inode != b.inode || !explained && !c.equal(a.changed, b.changed)) {
			what = append([]string{Content}, what...)
		}
	}
	if len(what) == 0 {
		return
	}
	if linked {
		c.seen[key] = len(c.changes)
	}
	c.add(Change{Op: Modified, Path: name, Old: &a.meta, New: &b.meta, What: what})
}

func (c *listing) equal(a, b time.Time) bool {
	if c.seconds {
		return a.Unix() == b.Unix()
	}
	return a.Equal(b)
}

// Fetch writes at most limit bytes of a guest's file to w.
type Fetch func(ctx context.Context, w io.Writer, path string, limit int64) error

// Asked is the side of a guest that is asked for what is in its files.
func Asked(fetch Fetch) Side { return asked{fetch} }

type asked struct{ fetch Fetch }

func (a asked) contents(ctx context.Context, w io.Writer, path string, _ *Meta, limit int64) (string, error) {
	if err := a.fetch(ctx, w, path, limit); err != nil {
		if ctx.Err() != nil {
			return "", ctx.Err()
		}
		return fmt.Sprintf("could not be read: %v", err), nil
	}
	return "", nil
}

func (a asked) accounts(ctx context.Context, path string) (map[uint32]string, error) {
	var b bytes.Buffer
	if err := a.fetch(ctx, &b, path, maxText); err != nil {
		return nil, ctx.Err()
	}
	return accounts(b.Bytes()), nil
}

// Lost is the side of which nobody has kept what was in its files. The changes tell
// whether the accounts of now are still those of then.
func Lost(now Side, changes []Change) Side {
	l := gone{now: now, other: map[string]bool{}}
	for _, c := range changes {
		l.other[c.Path] = true
	}
	return l
}

type gone struct {
	now   Side
	other map[string]bool
}

func lost(s Side) bool {
	_, yes := s.(gone)
	return yes
}

func (gone) contents(context.Context, io.Writer, string, *Meta, int64) (string, error) {
	return "has contents that were not kept", nil
}

func (g gone) accounts(ctx context.Context, path string) (map[uint32]string, error) {
	if g.now == nil || g.other[path] {
		return nil, nil
	}
	return g.now.accounts(ctx, path)
}
