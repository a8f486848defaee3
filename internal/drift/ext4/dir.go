// SPDX-License-Identifier: Apache-2.0

package ext4

import (
	"errors"
	"fmt"
	"io"
	iofs "io/fs"
	"slices"
	"strings"
)

// Entry is a name in a directory.
type Entry struct {
	Name  string // bytes, not necessarily UTF-8
	Inode uint32
}

const maxDir = 1 << 30 // bytes of one directory

// ReadDir returns the entries of a directory but "." and "..", sorted by name. The
// blocks of a hashed directory's index read as empty ones.
func (fs *FS) ReadDir(i *Inode) ([]Entry, error) {
	if i.Type() != TypeDir {
		return nil, fmt.Errorf("inode %d is not a directory", i.Number)
	}
	f, err := fs.File(i)
	if err != nil {
		return nil, err
	}
	entries, err := fs.entries(i, f)
	if err != nil {
		return nil, fmt.Errorf("directory inode %d: %w", i.Number, err)
	}
	slices.SortFunc(entries, func(a, b Entry) int { return strings.Compare(a.Name, b.Name) })
	for n := 1; n < len(entries); n++ {
		if entries[n].Name == entries[n-1].Name {
			return nil, fmt.Errorf("directory inode %d has %q twice", i.Number, entries[n].Name)
		}
	}
	return entries, nil
}

func (fs *FS) entries(i *Inode, f *File) ([]Entry, error) {
	if i.Size > maxDir {
		return nil, fmt.Errorf("it has %d bytes", i.Size)
	}
	if f.isIn {
		return fs.inlineDir(i)
	}
	var all []Entry
	b := make([]byte, fs.block)
	for _, e := range f.extents {
		if e.Zero {
			continue
		}
		for n := range e.Len {
			if int64(e.Logical+n)*fs.block >= i.Size {
				break
			}
			if err := fs.spend(1); err != nil {
				return nil, err
			}
			if err := fs.readBlocks(b, e.Block+n); err != nil {
				return nil, err
			}
			var err error
			if all, err = parseDir(all, b); err != nil {
				return nil, err
			}
		}
	}
	return all, nil
}

// inlineDir reads a directory that is kept in its inode: the parent's number and
// entries, then more of them in the attribute system.data.
func (fs *FS) inlineDir(i *Inode) ([]Entry, error) {
	all, err := parseDir(nil, i.block[4:])
	if err != nil {
		return nil, err
	}
	if i.Size > int64(len(i.block)) {
		return parseDir(all, i.attr(7, "data"))
	}
	return all, nil
}

// parseDir appends the entries of one block.
func parseDir(all []Entry, b []byte) ([]Entry, error) {
	size := len(b)
	for len(b) >= 8 {
		length := int(le.Uint16(b[4:]))
		if size >= 65536 && (length == 65535 || length == 0) {
			length = size
		}
		name := int(b[6])
		if length < 8 || length%4 != 0 || length > len(b) {
			return nil, errors.New("an entry has an impossible length")
		}
		if inode := le.Uint32(b); inode != 0 {
			if 8+name > length || name == 0 {
				return nil, errors.New("a name is longer than its entry")
			}
			s := string(b[8 : 8+name])
			if strings.ContainsAny(s, "/\x00") {
				return nil, fmt.Errorf("an entry has the impossible name %q", s)
			}
			if s != "." && s != ".." {
				all = append(all, Entry{s, inode})
			}
		}
		b = b[length:]
	}
	return all, nil
}

// Lookup returns the inode of a path, whose parts are separated by single slashes,
// following no links. io/fs.ErrNotExist if there is none.
func (fs *FS) Lookup(path string) (*Inode, error) {
	i, err := fs.Inode(RootInode)
	if err != nil {
		return nil, err
	}
	for _, name := range strings.Split(strings.Trim(path, "/"), "/") {
		if name == "" {
			continue
		}
		entries, err := fs.ReadDir(i)
		if err != nil {
			return nil, err
		}
		n, ok := slices.BinarySearchFunc(entries, name, func(e Entry, s string) int { return strings.Compare(e.Name, s) })
		if !ok {
			return nil, iofs.ErrNotExist
		}
		if i, err = fs.Inode(entries[n].Inode); err != nil {
			return nil, err
		}
	}
	return i, nil
}

// ReadFile returns a file's content, which must not be longer than limit.
func (fs *FS) ReadFile(i *Inode, limit int64) ([]byte, error) {
	if i.Size > limit {
		return nil, fmt.Errorf("inode %d: %d bytes are more than %d", i.Number, i.Size, limit)
	}
	f, err := fs.File(i)
	if err != nil {
		return nil, err
	}
	return io.ReadAll(io.NewSectionReader(f, 0, i.Size))
}
