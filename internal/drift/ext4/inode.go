// SPDX-License-Identifier: Apache-2.0

package ext4

import (
	"errors"
	"fmt"
	"math"
	"time"
)

// Inode is what the file system knows of a file but its name.
type Inode struct {
	Number   uint32
	Mode     uint16 // as in st_mode: type and permissions
	UID, GID uint32
	Size     int64
	Links    uint16
	Modified time.Time
	Changed  time.Time // of the inode itself
	Device   uint64    // major<<32 | minor, of a device node

	flags uint32
	block [60]byte
	tail  []byte // what follows the fixed part: the attributes
	more  uint64 // the block with further attributes; 0 if there is none
}

// The types in Inode.Mode.
const (
	TypeMask    = 0xf000
	TypeFIFO    = 0x1000
	TypeChar    = 0x2000
	TypeDir     = 0x4000
	TypeBlock   = 0x6000
	TypeFile    = 0x8000
	TypeSymlink = 0xa000
	TypeSocket  = 0xc000
)

const (
	flagExtents = 0x80000
	flagInline  = 0x10000000
)

// Type is the type bits of the mode.
func (i *Inode) Type() uint16 { return i.Mode & TypeMask }

// Inode reads inode n.
func (fs *FS) Inode(n uint32) (*Inode, error) {
	b, err := fs.rawInode(n)
	if err != nil {
		return nil, fmt.Errorf("inode %d: %w", n, err)
	}
	i := &Inode{
		Number: n,
		Mode:   le.Uint16(b[0:]),
		UID:    uint32(le.Uint16(b[2:])) | uint32(le.Uint16(b[0x78:]))<<16,
		GID:    uint32(le.Uint16(b[0x18:])) | uint32(le.Uint16(b[0x7a:]))<<16,
		Links:  le.Uint16(b[0x1a:]),
		flags:  le.Uint32(b[0x20:]),
		more:   uint64(le.Uint32(b[0x68:])) | uint64(le.Uint16(b[0x76:]))<<32,
	}
	size := uint64(le.Uint32(b[4:]))
	if t := i.Type(); t == TypeFile || t == TypeDir {
		size |= uint64(le.Uint32(b[0x6c:])) << 32
	}
	if size > math.MaxInt64/2 {
		return nil, fmt.Errorf("inode %d has a size of %d bytes", n, size)
	}
	i.Size = int64(size)
	copy(i.block[:], b[0x28:])
	var modified, changed uint32 // what a field of 32 bits has no room for
	if len(b) > 128 {
		end := 128 + int(le.Uint16(b[0x80:]))
		if end >= 0x8c && end <= len(b) {
			changed, modified = le.Uint32(b[0x84:]), le.Uint32(b[0x88:])
		}
		if end >= 128 && end <= len(b) {
			i.tail = b[end:]
		}
	}
	i.Changed, i.Modified = moment(le.Uint32(b[0xc:]), changed), moment(le.Uint32(b[0x10:]), modified)
	if t := i.Type(); t == TypeChar || t == TypeBlock {
		i.Device = device(le.Uint32(i.block[0:]), le.Uint32(i.block[4:]))
	}
	return i, nil
}

// moment is a time of seconds and of what the inode has besides: two more bits of
// them, and nanoseconds.
func moment(seconds, extra uint32) time.Time {
	return time.Unix(int64(int32(seconds))+int64(extra&3)<<32, int64(extra>>2))
}

// device decodes the two forms in which a device number is kept.
func device(old, wide uint32) uint64 {
	if old != 0 {
		return uint64(old>>8&0xff)<<32 | uint64(old&0xff)
	}
	return uint64(wide>>8&0xfff)<<32 | uint64(wide&0xff|wide>>12&0xfff00)
}

// InodeAt is where inode n is kept: the offset on the disk, and the block.
func (fs *FS) InodeAt(n uint32) (off int64, block uint64, err error) {
	if n == 0 || n > fs.inodes {
		return 0, 0, errors.New("there is no such inode")
	}
	in := int64((n-1)%fs.perGroup) * fs.inodeSize
	table := fs.tables[(n-1)/fs.perGroup]
	if table >= fs.blocks {
		return 0, 0, errors.New("its table lies outside of the file system")
	}
	block = table + uint64(in/fs.block)
	if block >= fs.blocks {
		return 0, 0, errors.New("its table lies outside of the file system")
	}
	return int64(block)*fs.block + in%fs.block, block, nil
}

// InodeSize is the size of an inode on the disk, in bytes.
func (fs *FS) InodeSize() int64 { return fs.inodeSize }

func (fs *FS) rawInode(n uint32) ([]byte, error) {
	off, block, err := fs.InodeAt(n)
	if err != nil {
		return nil, err
	}
	b := fs.cache[block]
	if b == nil {
		b = make([]byte, fs.block)
		if err := fs.readBlocks(b, block); err != nil {
			return nil, err
		}
		if int64(len(fs.cache)+1)*fs.block > cacheSize {
			clear(fs.cache)
		}
		fs.cache[block] = b
	}
	in := off % fs.block
	return b[in : in+fs.inodeSize], nil
}

// inline returns the data of a file that is kept in its inode: 60 bytes, and what the
// attribute system.data has.
func (i *Inode) inline() ([]byte, error) {
	data := append([]byte{}, i.block[:]...)
	if i.Size > int64(len(data)) {
		data = append(data, i.attr(7, "data")...)
	}
	if int64(len(data)) < i.Size {
		return nil, errors.New("its data in the inode is cut off")
	}
	return data[:i.Size], nil
}

// attr returns the value of an attribute that is kept in the inode.
func (i *Inode) attr(index byte, name string) []byte {
	found, _ := i.own()
	for _, e := range found {
		if e.index == index && e.name == name && e.inode == 0 {
			return e.value
		}
	}
	return nil
}
