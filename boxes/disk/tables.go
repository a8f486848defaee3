// SPDX-License-Identifier: Apache-2.0

package disk

import (
	"encoding/binary"
	"io"
)

// checkTables follows the L1 table to every L2 table and every cluster and
// refuses what lies outside the file. QEMU reads zeros beyond the end of a file,
// so an image that was cut off would boot into a damaged file system otherwise.
//
// Every L2 table is read at most once, and two entries must not share one, so
// the work is bounded by the size of the file.
func (h *header) checkTables(r io.ReaderAt, size int64) error {
	l1 := make([]byte, uint64(h.l1Size)*8)
	if err := readFull(r, l1, int64(h.l1Offset)); err != nil {
		return err
	}
	cluster := int64(1) << h.clusterBits
	seen := make(map[uint64]struct{})
	table := make([]byte, cluster)
	for i := 0; i < len(l1); i += 8 {
		entry := binary.BigEndian.Uint64(l1[i:])
		if entry&l1Reserved != 0 {
			return refuse("", "the image's L1 table has reserved bits set in entry %d", i/8)
		}
		offset := entry & offsetMask
		if offset == 0 {
			continue
		}
		if err := h.checkSpan("L2 table", offset, uint64(cluster), size); err != nil {
			return err
		}
		if _, ok := seen[offset]; ok {
			return refuse("", "the image's L1 table refers twice to the L2 table at offset %#x", offset)
		}
		seen[offset] = struct{}{}
		if err := readFull(r, table, int64(offset)); err != nil {
			return err
		}
		if err := h.checkL2(table, size); err != nil {
			return err
		}
	}
	return nil
}

func (h *header) checkL2(table []byte, size int64) error {
	step := 8
	if h.extended() {
		step = 16
	}
	// The length of a compressed cluster stands above its offset.
	compressedMask := uint64(1)<<(62-(h.clusterBits-8)) - 1
	for i := 0; i < len(table); i += step {
		entry := binary.BigEndian.Uint64(table[i:])
		var offset uint64
		switch {
		case entry == 0:
			continue
		case entry&entryCompressed != 0:
			if offset = entry & compressedMask; entry&entryCopied != 0 || offset == 0 {
				return refuse("", "the image has an impossible compressed cluster (%#x)", entry)
			}
		default:
			if entry&l2Reserved != 0 {
				return refuse("", "the image has reserved bits set in an L2 table (%#x)", entry)
			}
			if offset = entry & offsetMask; offset == 0 {
				continue
			}
			if offset&(1<<h.clusterBits-1) != 0 {
				return refuse("", "the image has a cluster at the unaligned offset %#x", offset)
			}
			if entry&entryZero != 0 && !h.extended() {
				continue // reads as zeros; what it points to is never read
			}
		}
		// Only the beginning must be there: the last cluster of a file may be
		// short.
		if offset >= uint64(size) {
			return refuse(truncated, "the image refers to a cluster at offset %#x beyond the end of the file (%d bytes)", offset, size)
		}
	}
	return nil
}
