// SPDX-License-Identifier: Apache-2.0

package disk

import (
	"encoding/binary"
	"io"
)

// owners say which table a cluster of the file belongs to, by its number.
type owners map[uint64]string

// claim notes the clusters of a table that no other one has.
func (h *header) claim(o owners, what string, offset, length uint64) error {
	for c := offset >> h.clusterBits; c<<h.clusterBits < offset+length; c++ {
		if other := o[c]; other != "" {
			return refuse("", "the image's %s at offset %#x overlaps its %s", what, offset, other)
		}
		o[c] = what
	}
	return nil
}

// checkRefcounts follows the refcount table to every block of counts, and refuses
// those that lie outside the file or in another table.
func (h *header) checkRefcounts(r io.ReaderAt, size int64, o owners) error {
	table := make([]byte, uint64(h.refcountCluster)<<h.clusterBits)
	if err := readFull(r, table, int64(h.refcountOffset)); err != nil {
		return err
	}
	for i := 0; i < len(table); i += 8 {
		entry := binary.BigEndian.Uint64(table[i:])
		if entry&refcountReserved != 0 {
			return refuse("", "the image's refcount table has reserved bits set in entry %d", i/8)
		}
		switch {
		case entry == 0:
			continue
		case entry&(1<<h.clusterBits-1) != 0:
			return refuse("", "the image has a refcount block at the unaligned offset %#x", entry)
		case entry >= uint64(size): // its end may be missing, as that of a data cluster
			return refuse(truncated, "the image's refcount block at offset %#x lies beyond the end of the file (%d bytes)", entry, size)
		}
		if err := h.claim(o, "refcount block", entry, 1); err != nil {
			return err
		}
	}
	return nil
}

// checkTables follows the L1 table to every L2 table and every cluster and
// refuses what lies outside the file, or where another table is. QEMU reads zeros
// beyond the end of a file, so an image that was cut off would boot into a damaged file
// system otherwise; and what is two things at once changes when one of them is written.
//
// Every L2 table is read at most once, and two entries must not share one, so
// the work is bounded by the size of the file.
func (h *header) checkTables(r io.ReaderAt, size int64) error {
	tables := owners{0: "header"}
	if err := h.claim(tables, "L1 table", h.l1Offset, uint64(h.l1Size)*8); err != nil {
		return err
	}
	if err := h.claim(tables, "refcount table", h.refcountOffset, uint64(h.refcountCluster)<<h.clusterBits); err != nil {
		return err
	}
	if err := h.checkRefcounts(r, size, tables); err != nil {
		return err
	}
	l1 := make([]byte, uint64(h.l1Size)*8)
	if err := readFull(r, l1, int64(h.l1Offset)); err != nil {
		return err
	}
	cluster := int64(1) << h.clusterBits
	seen := make(map[uint64]struct{})
	var order []uint64
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
		order = append(order, offset)
		if err := h.claim(tables, "L2 table", offset, uint64(cluster)); err != nil {
			return err
		}
	}
	// Only now is it known where all tables are.
	table := make([]byte, cluster)
	for _, offset := range order {
		if err := readFull(r, table, int64(offset)); err != nil {
			return err
		}
		if err := h.checkL2(table, size, tables); err != nil {
			return err
		}
	}
	return nil
}

func (h *header) checkL2(table []byte, size int64, tables owners) error {
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
		if other := tables[offset>>h.clusterBits]; other != "" {
			return refuse("", "the image has data at offset %#x, where its %s is", offset, other)
		}
	}
	return nil
}
