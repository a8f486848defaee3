// SPDX-License-Identifier: Apache-2.0

// Package ext4 reads ext4 file systems that somebody else wrote, perhaps to
// mislead: it is bounded in time and memory by the size of the disk, writes nothing,
// and replays the journal in memory, so that the file system of a running machine
// can be read as it would be found after a crash.
//
// The layout is that of Linux, Documentation/filesystems/ext4.
package ext4

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// ErrNotExt4 says that there is no ext2, ext3 or ext4 file system.
var ErrNotExt4 = errors.New("not an ext4 file system")

// ErrFeature says that an ext4 file system has features that are not known here.
var ErrFeature = errors.New("features that are not supported")

var le = binary.LittleEndian

const (
	compatJournal      = 0x4
	compatSparseSuper2 = 0x200

	incompatRecover  = 0x4
	incompatMetaBG   = 0x10
	incompat64bit    = 0x80
	incompatReadable = 0x2 | incompatRecover | incompatMetaBG | 0x40 /* extents */ | incompat64bit |
		0x100 /* mmp */ | 0x200 /* flex_bg */ | 0x400 /* ea_inode */ | 0x2000 /* csum_seed */ |
		0x4000 /* largedir */ | 0x8000 /* inline_data */ | 0x20000 /* casefold */

	roCompatSparseSuper = 0x1

	maxGroups = 1 << 21 // 256 TiB of groups of 128 MiB
	cacheSize = 64 << 20
)

// RootInode is the number of the root directory.
const RootInode = 2

// FS is an open file system. It must not be used by two goroutines at once.
type FS struct {
	r         io.ReaderAt
	block     int64  // bytes
	blocks    uint64 // in the file system
	inodes    uint32
	perGroup  uint32 // inodes
	inodeSize int64
	compat    uint32
	incompat  uint32
	journal   uint32   // inode
	tables    []uint64 // first block of each group's inode table

	replayed map[uint64]journaled
	cache    map[uint64][]byte // blocks of inode tables
	spent    uint64            // blocks of metadata that were read
}

// BlockSize is the size of a block in bytes.
func (fs *FS) BlockSize() int64 { return fs.block }

// Blocks is the number of blocks that the file system has.
func (fs *FS) Blocks() uint64 { return fs.blocks }

// Open opens the file system on a disk of size bytes, and reads what its journal has
// to add. An error that wraps ErrNotExt4 says that there is none.
func Open(r io.ReaderAt, size int64) (*FS, error) {
	fs := &FS{r: r, cache: map[uint64][]byte{}}
	if err := fs.super(size); err != nil {
		return nil, err
	}
	if fs.compat&compatJournal == 0 || fs.incompat&incompatRecover == 0 {
		return fs, nil
	}
	if err := fs.replay(); err != nil {
		return nil, fmt.Errorf("ext4 journal: %w", err)
	}
	clear(fs.cache)
	if len(fs.replayed) == 0 {
		return fs, nil
	}
	// The journal may have a newer superblock and newer group descriptors.
	block := fs.block
	if err := fs.super(size); err != nil {
		return nil, fmt.Errorf("after the journal: %w", err)
	}
	if fs.block != block {
		return nil, errors.New("the ext4 journal changes the block size")
	}
	return fs, nil
}

// super reads the superblock and the group descriptors.
func (fs *FS) super(size int64) error {
	var sb [1024]byte
	if size < 2048 {
		return ErrNotExt4
	}
	if err := fs.readSuper(sb[:]); err != nil {
		return fmt.Errorf("ext4 superblock: %w", err)
	}
	if le.Uint16(sb[0x38:]) != 0xef53 {
		return ErrNotExt4
	}
	fs.compat, fs.incompat = le.Uint32(sb[0x5c:]), le.Uint32(sb[0x60:])
	if rest := fs.incompat &^ incompatReadable; rest != 0 {
		return fmt.Errorf("ext4 with %w: %#x", ErrFeature, rest)
	}
	log := le.Uint32(sb[0x18:])
	if log > 6 {
		return fmt.Errorf("ext4 block size of 2^%d bytes", uint64(log)+10)
	}
	fs.block = 1024 << log
	fs.inodes = le.Uint32(sb[0x0:])
	fs.blocks = uint64(le.Uint32(sb[0x4:]))
	if fs.incompat&incompat64bit != 0 {
		fs.blocks |= uint64(le.Uint32(sb[0x150:])) << 32
	}
	if fs.blocks == 0 || fs.blocks > uint64(size/fs.block) {
		return fmt.Errorf("an ext4 file system of %d blocks of %d bytes on a disk of %d bytes", fs.blocks, fs.block, size)
	}
	first, blocksPerGroup := uint64(le.Uint32(sb[0x14:])), uint64(le.Uint32(sb[0x20:]))
	fs.perGroup = le.Uint32(sb[0x28:])
	fs.inodeSize = 128
	if le.Uint32(sb[0x4c:]) > 0 {
		fs.inodeSize = int64(le.Uint16(sb[0x58:]))
	}
	fs.journal = le.Uint32(sb[0xe0:])
	if fs.inodeSize < 128 || fs.inodeSize > fs.block || fs.inodeSize&(fs.inodeSize-1) != 0 {
		return fmt.Errorf("ext4 inodes of %d bytes", fs.inodeSize)
	}
	if first > 1 || first >= fs.blocks || blocksPerGroup < 8 || fs.perGroup == 0 || int64(fs.perGroup) > 8*fs.block {
		return errors.New("the ext4 superblock has impossible groups")
	}
	groups := (fs.blocks - first + blocksPerGroup - 1) / blocksPerGroup
	if groups > maxGroups || uint64(fs.inodes) > groups*uint64(fs.perGroup) {
		return fmt.Errorf("an ext4 file system of %d groups and %d inodes", groups, fs.inodes)
	}
	return fs.descriptors(sb[:], first, blocksPerGroup, int(groups))
}

// readSuper reads the superblock, which lies 1024 bytes from the beginning.
func (fs *FS) readSuper(sb []byte) error {
	if fs.replayed == nil {
		return readFull(fs.r, sb, 1024)
	}
	n, in := uint64(1024/fs.block), int64(1024%fs.block)
	b := make([]byte, fs.block)
	if err := fs.readBlocks(b, n); err != nil {
		return err
	}
	copy(sb, b[in:])
	return nil
}

// descriptors reads where the groups have their inode tables.
func (fs *FS) descriptors(sb []byte, first, blocksPerGroup uint64, groups int) error {
	size := 32
	if fs.incompat&incompat64bit != 0 {
		size = int(le.Uint16(sb[0xfe:]))
		if size < 64 || int64(size) > fs.block || size&(size-1) != 0 {
			return fmt.Errorf("ext4 group descriptors of %d bytes", size)
		}
	}
	perBlock := int(fs.block) / size
	metaFrom := 1 << 62
	if fs.incompat&incompatMetaBG != 0 {
		if fs.compat&compatSparseSuper2 != 0 {
			return fmt.Errorf("ext4 with %w: meta_bg and sparse_super2", ErrFeature)
		}
		metaFrom = int(le.Uint32(sb[0x104:]))
	}
	sparse := le.Uint32(sb[0x64:])&roCompatSparseSuper != 0
	fs.tables = make([]uint64, groups)
	b := make([]byte, fs.block)
	for g := range fs.tables {
		if g%perBlock == 0 {
			n := uint64(g / perBlock)
			at := first + 1 + n
			if int(n) >= metaFrom {
				at = first + uint64(g)*blocksPerGroup
				if hasSuper(g, sparse) {
					at++
				}
			}
			if err := fs.readBlocks(b, at); err != nil {
				return fmt.Errorf("ext4 group descriptors: %w", err)
			}
		}
		d := b[g%perBlock*size:]
		fs.tables[g] = uint64(le.Uint32(d[8:]))
		if size >= 64 {
			fs.tables[g] |= uint64(le.Uint32(d[0x28:])) << 32
		}
	}
	return nil
}

// hasSuper reports whether a group begins with a copy of the superblock.
func hasSuper(g int, sparse bool) bool {
	if !sparse || g <= 1 {
		return true
	}
	for _, p := range []int{3, 5, 7} {
		n := p
		for n < g {
			n *= p
		}
		if n == g {
			return true
		}
	}
	return false
}

// readBlocks fills p, whole blocks, from block n on, as the journal left them.
func (fs *FS) readBlocks(p []byte, n uint64) error {
	count := uint64(len(p)) / uint64(fs.block)
	if n >= fs.blocks || count > fs.blocks-n {
		return fmt.Errorf("block %d lies outside of the file system", n)
	}
	if err := readFull(fs.r, p, int64(n)*fs.block); err != nil {
		return err
	}
	if len(fs.replayed) == 0 {
		return nil
	}
	for i := range count {
		j, ok := fs.replayed[n+i]
		if !ok {
			continue
		}
		b := p[int64(i)*fs.block:][:fs.block]
		if err := readFull(fs.r, b, int64(j.at)*fs.block); err != nil {
			return err
		}
		if j.escaped {
			copy(b, journalMagic)
		}
	}
	return nil
}

// InJournal reports whether any of n blocks from block b on comes from the journal,
// which means that the disk has older content in their place.
func (fs *FS) InJournal(b, n uint64) bool {
	if len(fs.replayed) == 0 {
		return false
	}
	if n > uint64(len(fs.replayed)) {
		for at := range fs.replayed {
			if at >= b && at-b < n {
				return true
			}
		}
		return false
	}
	for i := range n {
		if _, ok := fs.replayed[b+i]; ok {
			return true
		}
	}
	return false
}

// spend counts a block of metadata that is about to be read. No honest file system
// makes one read many more than it has.
func (fs *FS) spend(n uint64) error {
	fs.spent += n
	if fs.spent > 8*fs.blocks+1<<16 {
		return errors.New("the file system is a maze: more metadata is named than there are blocks")
	}
	return nil
}

func readFull(r io.ReaderAt, p []byte, off int64) error {
	n, err := r.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}
