// SPDX-License-Identifier: Apache-2.0

package ext4

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
)

// journaled says where the journal has a block's content.
type journaled struct {
	at      uint64 // block of the file system
	escaped bool   // it begins with the journal's magic number, which stands as zeros there
}

const (
	journalMagic = "\xc0\x3b\x39\x98"

	jbdDescriptor = 1
	jbdCommit     = 2
	jbdSuperV1    = 3
	jbdSuperV2    = 4
	jbdRevoke     = 5

	jbdIncompat64bit      = 0x2
	jbdIncompatCsum2      = 0x8
	jbdIncompatCsum3      = 0x10
	jbdIncompatFastCommit = 0x20
	jbdIncompatReadable   = 0x1 | jbdIncompat64bit | 0x4 | jbdIncompatCsum2 | jbdIncompatCsum3

	tagEscaped  = 1
	tagSameUUID = 2
	tagLast     = 8
)

// journal is the log of a file system (jbd2), as recovery would see it.
type journal struct {
	fs       *FS
	file     *File
	incompat uint32
	last     uint32 // blocks
	first    uint32 // block at which the log begins
	seed     uint32

	tags    []tag
	revoked map[uint64]uint32 // block to the last transaction that revoked it
}

// tag is a block in a committed transaction.
type tag struct {
	block   uint64
	seq     uint32
	at      uint64 // in the file system
	escaped bool
	torn    bool // the checksum does not fit
}

// replay finds what the log has to add to the file system, in fs.replayed.
func (fs *FS) replay() error {
	if fs.journal == 0 {
		return errors.New("it lies on another device, which is not supported")
	}
	inode, err := fs.Inode(fs.journal)
	if err != nil {
		return err
	}
	if inode.Type() != TypeFile {
		return errors.New("its inode is not a file")
	}
	j := &journal{fs: fs, revoked: map[uint64]uint32{}}
	if j.file, err = fs.File(inode); err != nil {
		return err
	}
	b := make([]byte, fs.block)
	if _, err := j.read(b, 0); err != nil {
		return err
	}
	be := binary.BigEndian
	kind := be.Uint32(b[4:])
	if string(b[:4]) != journalMagic || kind != jbdSuperV1 && kind != jbdSuperV2 {
		return errors.New("it has no superblock")
	}
	if int64(be.Uint32(b[12:])) != fs.block {
		return errors.New("its blocks have another size than the file system's")
	}
	j.last, j.first = be.Uint32(b[16:]), be.Uint32(b[20:])
	seq, start := be.Uint32(b[24:]), be.Uint32(b[28:])
	if kind == jbdSuperV2 {
		j.incompat = be.Uint32(b[0x28:])
		j.seed = crc(^uint32(0), b[0x30:0x40])
	}
	if start == 0 {
		return nil
	}
	if j.incompat&jbdIncompatFastCommit != 0 {
		return errors.New("fast commits are not supported")
	}
	if rest := j.incompat &^ jbdIncompatReadable; rest != 0 {
		return fmt.Errorf("features %#x are not supported", rest)
	}
	if int64(j.last) > j.file.Size()/fs.block || j.first == 0 || j.first >= j.last || start < j.first || start >= j.last {
		return errors.New("its superblock has impossible bounds")
	}
	if err := j.scan(b, start, seq); err != nil {
		return err
	}
	fs.replayed = map[uint64]journaled{}
	for _, t := range j.tags {
		if r, ok := j.revoked[t.block]; ok && int32(t.seq-r) <= 0 {
			continue
		}
		if t.torn {
			return fmt.Errorf("the checksum of block %d does not fit", t.block)
		}
		if t.block >= fs.blocks {
			return fmt.Errorf("it has a block %d, outside of the file system", t.block)
		}
		fs.replayed[t.block] = journaled{t.at, t.escaped}
	}
	return nil
}

// scan collects the tags and the revocations of all transactions that were committed.
func (j *journal) scan(b []byte, at, seq uint32) error {
	be := binary.BigEndian
	var open []tag
	var revoked []uint64
	for steps := uint32(0); steps < j.last; steps++ {
		if _, err := j.read(b, at); err != nil {
			return err
		}
		if string(b[:4]) != journalMagic || be.Uint32(b[8:]) != seq {
			return nil // the log ends
		}
		at = j.next(at)
		switch be.Uint32(b[4:]) {
		case jbdDescriptor:
			if !j.tailFits(b) {
				return nil
			}
			var more []tag
			var err error
			if more, at, err = j.descriptor(b, at, seq); err != nil {
				return err
			}
			steps += uint32(len(more))
			open = append(open, more...)
		case jbdRevoke:
			if !j.tailFits(b) {
				return nil
			}
			more, err := j.revocations(b)
			if err != nil {
				return err
			}
			revoked = append(revoked, more...)
		case jbdCommit:
			if !j.commitFits(b) {
				return nil
			}
			j.tags = append(j.tags, open...)
			for _, n := range revoked {
				j.revoked[n] = seq
			}
			open, revoked = nil, nil
			seq++
		default:
			return nil
		}
	}
	return nil
}

// descriptor reads the tags of a descriptor block, whose blocks begin at at, and
// returns the block behind them.
func (j *journal) descriptor(b []byte, at, seq uint32) ([]tag, uint32, error) {
	be := binary.BigEndian
	var tags []tag
	end := len(b)
	if j.checked() {
		end -= 4
	}
	size := j.tagSize()
	data := make([]byte, j.fs.block)
	for p := 12; p+size <= end; {
		t := tag{block: uint64(be.Uint32(b[p:])), seq: seq}
		var flags, sum uint32
		if j.incompat&jbdIncompatCsum3 != 0 {
			flags, sum = be.Uint32(b[p+4:]), be.Uint32(b[p+12:])
		} else {
			flags, sum = uint32(be.Uint16(b[p+6:])), uint32(be.Uint16(b[p+4:]))
		}
		if j.incompat&jbdIncompat64bit != 0 {
			t.block |= uint64(be.Uint32(b[p+8:])) << 32
		}
		p += size
		if flags&tagSameUUID == 0 {
			p += 16
		}
		t.escaped = flags&tagEscaped != 0
		block, err := j.read(data, at)
		if err != nil {
			return nil, 0, err
		}
		if j.checked() && !j.dataFits(data, seq, sum) {
			t.torn = true // which only matters if it was committed
		}
		t.at = block
		tags = append(tags, t)
		if len(tags) > int(j.last) {
			return nil, 0, errors.New("a transaction is longer than the log")
		}
		at = j.next(at)
		if flags&tagLast != 0 {
			break
		}
	}
	return tags, at, nil
}

func (j *journal) revocations(b []byte) ([]uint64, error) {
	be := binary.BigEndian
	end := int(be.Uint32(b[12:]))
	limit := len(b)
	if j.checked() {
		limit -= 4
	}
	if end < 16 || end > limit {
		return nil, errors.New("a revocation has an impossible length")
	}
	var blocks []uint64
	for p := 16; p < end; {
		if j.incompat&jbdIncompat64bit == 0 {
			if p+4 > end {
				break
			}
			blocks = append(blocks, uint64(be.Uint32(b[p:])))
			p += 4
			continue
		}
		if p+8 > end {
			break
		}
		blocks = append(blocks, be.Uint64(b[p:]))
		p += 8
	}
	return blocks, nil
}

// read reads a block of the log, and returns where it is in the file system.
func (j *journal) read(b []byte, n uint32) (uint64, error) {
	i := j.file.search(uint64(n))
	if i == len(j.file.extents) || j.file.extents[i].Logical > uint64(n) || j.file.extents[i].Zero {
		return 0, fmt.Errorf("its block %d is missing", n)
	}
	e := j.file.extents[i]
	at := e.Block + uint64(n) - e.Logical
	return at, j.fs.readBlocks(b, at)
}

func (j *journal) next(n uint32) uint32 {
	if n+1 >= j.last {
		return j.first
	}
	return n + 1
}

func (j *journal) tagSize() int {
	if j.incompat&jbdIncompatCsum3 != 0 {
		return 16
	}
	size := 8
	if j.incompat&jbdIncompat64bit != 0 {
		size += 4
	}
	if j.incompat&jbdIncompatCsum2 != 0 {
		size += 2
	}
	return size
}

func (j *journal) checked() bool { return j.incompat&(jbdIncompatCsum2|jbdIncompatCsum3) != 0 }

// tailFits checks the checksum at the end of a descriptor or a revocation.
func (j *journal) tailFits(b []byte) bool {
	return !j.checked() || j.blockFits(b, len(b)-4)
}

// commitFits checks the checksum in a commit block.
func (j *journal) commitFits(b []byte) bool {
	return !j.checked() || j.blockFits(b, 16)
}

// blockFits checks a block against the checksum that it has at offset p.
func (j *journal) blockFits(b []byte, p int) bool {
	sum := crc(j.seed, b[:p])
	sum = crc(sum, []byte{0, 0, 0, 0})
	sum = crc(sum, b[p+4:])
	return sum == binary.BigEndian.Uint32(b[p:])
}

func (j *journal) dataFits(b []byte, seq, want uint32) bool {
	var s [4]byte
	binary.BigEndian.PutUint32(s[:], seq)
	sum := crc(crc(j.seed, s[:]), b)
	if j.incompat&jbdIncompatCsum3 != 0 {
		return sum == want
	}
	return sum&0xffff == want
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// crc is crc32c as the kernel has it: without inverting at the beginning and the end.
func crc(sum uint32, b []byte) uint32 { return ^crc32.Update(^sum, castagnoli, b) }
