// SPDX-License-Identifier: Apache-2.0

package ext4

import (
	"bytes"
	"errors"
	"fmt"
	"io"
)

const (
	attrMagic = 0xea020000
	maxAttr   = 64 << 10 // bytes of a value, as in Linux
)

// prefixes are what the index of an attribute's name stands for.
var prefixes = map[byte]string{
	1: "user.", 2: "system.posix_acl_access", 3: "system.posix_acl_default",
	4: "trusted.", 6: "security.", 7: "system.", 8: "system.richacl",
}

// attr is an extended attribute.
type attr struct {
	index byte
	name  string // without its prefix
	value []byte
	inode uint32 // that has the value instead; 0 if there is none
	size  uint32
}

// own returns the attributes that are kept in the inode.
func (i *Inode) own() ([]attr, error) {
	if len(i.tail) < 4 || le.Uint32(i.tail) != attrMagic {
		return nil, nil
	}
	return attrs(i.tail[4:], i.tail[4:])
}

// attrs reads entries; the places of their values are counted from the beginning of
// values. What is found before a mistake is returned too.
func attrs(entries, values []byte) ([]attr, error) {
	var found []attr
	for e := entries; len(e) >= 4 && le.Uint32(e) != 0; {
		n := int(e[0])
		if len(e) < 16+n {
			return found, errors.New("an attribute is cut off")
		}
		a := attr{index: e[1], name: string(e[16 : 16+n]), inode: le.Uint32(e[4:]), size: le.Uint32(e[8:])}
		if a.size > maxAttr {
			return found, fmt.Errorf("an attribute of %d bytes", a.size)
		}
		if a.inode == 0 {
			at, size := uint64(le.Uint16(e[2:])), uint64(a.size)
			if at > uint64(len(values)) || size > uint64(len(values))-at {
				return found, errors.New("the value of an attribute lies outside")
			}
			a.value = values[at : at+size]
		}
		found = append(found, a)
		step := (16 + n + 3) &^ 3
		if step > len(e) {
			break
		}
		e = e[step:]
	}
	return found, nil
}

// Attrs returns the extended attributes of a file by their full names, as they are kept:
// access control lists have a form of their own there. Nil if it has none.
func (fs *FS) Attrs(i *Inode) (map[string][]byte, error) {
	found, err := i.own()
	if err == nil && i.more != 0 {
		var others []attr
		others, err = fs.attrBlock(i.more)
		found = append(found, others...)
	}
	if err != nil {
		return nil, fmt.Errorf("attributes of inode %d: %w", i.Number, err)
	}
	var all map[string][]byte
	for _, a := range found {
		prefix, known := prefixes[a.index]
		switch {
		case a.index == 7 && a.name == "data":
			continue // content
		case !known:
			prefix = fmt.Sprintf("%d.", a.index)
		}
		if a.inode != 0 {
			if a.value, err = fs.attrInode(a); err != nil {
				return nil, fmt.Errorf("attribute %s%.64q of inode %d: %w", prefix, a.name, i.Number, err)
			}
		}
		if all == nil {
			all = map[string][]byte{}
		}
		all[prefix+a.name] = bytes.Clone(a.value)
	}
	return all, nil
}

// attrBlock reads the attributes that have no room in the inode.
func (fs *FS) attrBlock(n uint64) ([]attr, error) {
	if err := fs.spend(1); err != nil {
		return nil, err
	}
	b := make([]byte, fs.block)
	if err := fs.readBlocks(b, n); err != nil {
		return nil, err
	}
	if le.Uint32(b) != attrMagic || le.Uint32(b[8:]) != 1 {
		return nil, errors.New("their block has no header")
	}
	return attrs(b[32:], b)
}

// attrInode reads a value that is so large that it has an inode of its own.
func (fs *FS) attrInode(a attr) ([]byte, error) {
	i, err := fs.Inode(a.inode)
	if err != nil {
		return nil, err
	}
	const flagEAInode = 0x200000
	if i.flags&flagEAInode == 0 || i.Size != int64(a.size) {
		return nil, errors.New("its inode holds no attribute of that size")
	}
	if err := fs.spend(uint64(i.Size)/uint64(fs.block) + 1); err != nil {
		return nil, err
	}
	f, err := fs.File(i)
	if err != nil {
		return nil, err
	}
	value := make([]byte, i.Size)
	if _, err := f.ReadAt(value, 0); err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	return value, nil
}
