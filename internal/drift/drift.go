// SPDX-License-Identifier: Apache-2.0

// Package drift says how the files on two disks differ, above all those of one
// machine at its birth and now. It reads the disks from outside of the guest and
// trusts nothing on them. What both disks keep in the same place of the same file
// is equal without being read, so that the cost is that of what was written.
package drift

import (
	"bytes"
	"maps"
	"slices"

	"github.com/labfile/lab/internal/drift/ext4"
)

// Op is what happened to a path.
type Op string

// The operations.
const (
	Added    Op = "A"
	Modified Op = "M"
	Deleted  Op = "D"
	Replaced Op = "R" // something of another kind stands there
)

// Kind is the type of a file.
type Kind string

// The kinds of files.
const (
	KindFile    Kind = "file"
	KindDir     Kind = "dir"
	KindSymlink Kind = "symlink"
	KindChar    Kind = "char"
	KindBlock   Kind = "block"
	KindFIFO    Kind = "fifo"
	KindSocket  Kind = "socket"
	KindUnknown Kind = "unknown"
)

// The aspects in Change.What.
const (
	Content = "content"
	Mode    = "mode"
	Owner   = "owner"
	Target  = "target" // of a symbolic link
	Device  = "device" // the number of a device node
	XAttr   = "xattr"  // extended attributes: capabilities, access control lists, labels
	MTime   = "mtime"  // only the time of modification
)

// Change is a path that differs.
type Change struct {
	Op     Op       `json:"op"`
	Path   string   `json:"path"` // absolute; bytes, not necessarily UTF-8
	Old    *Meta    `json:"old,omitempty"`
	New    *Meta    `json:"new,omitempty"`
	What   []string `json:"what,omitempty"`   // what differs, if Op is Modified
	Links  []string `json:"links,omitempty"`  // other paths of the same file
	Hidden bool     `json:"hidden,omitempty"` // an ignore rule hides it
}

// Meta is what is known of a file on one of the disks.
type Meta struct {
	Kind   Kind   `json:"kind"`
	Mode   string `json:"mode"` // octal, with setuid, setgid and sticky: "0644"
	UID    uint32 `json:"uid"`
	GID    uint32 `json:"gid"`
	Size   int64  `json:"size"`             // bytes
	Target string `json:"target,omitempty"` // of a symbolic link

	XAttrs map[string][]byte `json:"xattrs,omitempty"` // by their full names, as ext4 keeps them

	inode *ext4.Inode
}

// XAttrs names the extended attributes that differ, sorted, if Op is Modified.
func (c Change) XAttrs() []string {
	all := maps.Clone(c.Old.XAttrs)
	if all == nil {
		all = map[string][]byte{}
	}
	for name, value := range c.New.XAttrs {
		if old, had := all[name]; had && bytes.Equal(old, value) {
			delete(all, name)
		} else {
			all[name] = value
		}
	}
	return slices.Sorted(maps.Keys(all))
}

// Report is the drift between two disks.
type Report struct {
	Changes []Change `json:"changes"` // sorted by path
	Hidden  int      `json:"hidden"`  // changes that an ignore rule hides, and that are not listed
}
