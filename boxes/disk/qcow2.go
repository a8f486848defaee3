// SPDX-License-Identifier: Apache-2.0

package disk

import (
	"encoding/binary"
	"io"
	"math/bits"
	"strings"
)

// The qcow2 format is described in QEMU's docs/interop/qcow2.txt; names and
// numbers here are those of that document. Limits marked "QEMU" are the limits
// of QEMU's own implementation.
const (
	qcowMagic = "QFI\xfb"

	headerSizeV2 = 72
	headerSizeV3 = 104

	minClusterBits   = 9
	maxClusterBits   = 21 // QEMU
	minExtendedBits  = 14 // cluster bits, with extended L2 entries
	maxRefcountOrder = 6
	maxL1Bytes       = 32 << 20 // QEMU
	maxRefcountBytes = 8 << 20  // QEMU
	maxBackingName   = 1023

	incompatDirty       = 1 << 0
	incompatCorrupt     = 1 << 1
	incompatDataFile    = 1 << 2
	incompatCompression = 1 << 3
	incompatExtendedL2  = 1 << 4
	incompatKnown       = 1<<5 - 1

	autoclearRawData = 1 << 1

	extEnd           = 0x00000000
	extBackingFormat = 0xe2792aca
	extBitmaps       = 0x23852875
	extEncryption    = 0x0537be77
	extDataFile      = 0x44415441

	// Bits 9 to 55 of a table entry are the offset of what it points to.
	offsetMask      = 0x00fffffffffffe00
	l1Reserved      = 0x7f000000000001ff
	entryCopied     = 1 << 63
	entryCompressed = 1 << 62
	entryZero       = 1 << 0
	l2Reserved      = 0x3f000000000001fe

	refcountReserved = 0x1ff
)

func isQCOW(head []byte) bool { return hasAt(head, 0, qcowMagic) }

// header is the part of a qcow2 header that decides anything.
type header struct {
	version         uint32
	backingOffset   uint64
	backingSize     uint32
	clusterBits     uint32
	size            uint64
	cryptMethod     uint32
	l1Size          uint32 // entries
	l1Offset        uint64
	refcountOffset  uint64
	refcountCluster uint32
	snapshots       uint32
	incompatible    uint64
	autoclear       uint64
	refcountOrder   uint32
	length          uint32
	compression     byte
}

func inspectQCOW2(r io.ReaderAt, size int64, head []byte) (Info, error) {
	h, err := parseHeader(head)
	if err != nil {
		return Info{}, err
	}
	if err := h.checkFeatures(r, size); err != nil {
		return Info{}, err
	}
	if err := h.checkGeometry(size); err != nil {
		return Info{}, err
	}
	if err := h.checkExtensions(r, size); err != nil {
		return Info{}, err
	}
	if err := h.checkTables(r, size); err != nil {
		return Info{}, err
	}
	compression := "zlib"
	if h.compression == 1 {
		compression = "zstd"
	}
	return Info{
		Format:      QCOW2,
		VirtualSize: int64(h.size),
		Version:     int(h.version),
		ClusterSize: 1 << h.clusterBits,
		Compression: compression,
	}, nil
}

// parseHeader decodes the header; the fields of version 3 get the values that
// the format defines for version 2.
func parseHeader(head []byte) (header, error) {
	be := binary.BigEndian
	if len(head) < headerSizeV2 {
		return header{}, refuse("", "the qcow2 header is cut off")
	}
	h := header{
		version:         be.Uint32(head[4:]),
		backingOffset:   be.Uint64(head[8:]),
		backingSize:     be.Uint32(head[16:]),
		clusterBits:     be.Uint32(head[20:]),
		size:            be.Uint64(head[24:]),
		cryptMethod:     be.Uint32(head[32:]),
		l1Size:          be.Uint32(head[36:]),
		l1Offset:        be.Uint64(head[40:]),
		refcountOffset:  be.Uint64(head[48:]),
		refcountCluster: be.Uint32(head[56:]),
		snapshots:       be.Uint32(head[60:]),
		refcountOrder:   4,
		length:          headerSizeV2,
	}
	switch h.version {
	case 1:
		return header{}, refuse(convert("qcow"), "the file is a qcow disk of version 1, not qcow2")
	case 2:
		return h, nil
	case 3:
	default:
		return header{}, refuse("", "the qcow2 version is %d; lab knows 2 and 3", h.version)
	}
	if len(head) < headerSizeV3 {
		return header{}, refuse("", "the qcow2 header is cut off")
	}
	h.incompatible = be.Uint64(head[72:])
	h.autoclear = be.Uint64(head[88:])
	h.refcountOrder = be.Uint32(head[96:])
	h.length = be.Uint32(head[100:])
	if h.length > headerSizeV3 && len(head) > headerSizeV3 {
		h.compression = head[headerSizeV3]
	}
	return h, nil
}

// checkFeatures refuses what makes an image depend on other files or on a
// secret, and what is not known.
func (h *header) checkFeatures(r io.ReaderAt, size int64) error {
	if h.backingOffset != 0 {
		return h.refuseBacking(r, size)
	}
	if h.incompatible&incompatDataFile != 0 || h.autoclear&autoclearRawData != 0 {
		return refuse(flatten, "the image keeps its content in an external data file, which could be any file of this host")
	}
	if unknown := h.incompatible &^ incompatKnown; unknown != 0 {
		return refuse("", "the image uses an unknown incompatible feature (bit %d)", bits.TrailingZeros64(unknown))
	}
	if h.incompatible&incompatCorrupt != 0 {
		return refuse("fetch the image again, or repair it: qemu-img check -r all FILE", "the image is marked as corrupt")
	}
	if h.incompatible&incompatDirty != 0 {
		return refuse("close whatever uses the image, or repair it: qemu-img check -r all FILE", "the image is marked as dirty: it is in use, or was not closed properly")
	}
	if h.cryptMethod != 0 {
		return refuse(flatten, "the image is encrypted (method %d)", h.cryptMethod)
	}
	if h.snapshots != 0 {
		return refuse(flatten, "the image holds %d internal snapshot(s), of which a box has no use", h.snapshots)
	}
	switch {
	case h.compression > 1:
		return refuse("", "the image uses the unknown compression type %d", h.compression)
	case (h.compression != 0) != (h.incompatible&incompatCompression != 0):
		return refuse("", "the image's compression type %d contradicts its feature bits", h.compression)
	}
	return nil
}

func (h *header) refuseBacking(r io.ReaderAt, size int64) error {
	name := "a file with no readable name"
	if n := uint64(h.backingSize); n > 0 && n <= maxBackingName && h.backingOffset < uint64(size) && n <= uint64(size)-h.backingOffset {
		b := make([]byte, n)
		if err := readFull(r, b, int64(h.backingOffset)); err != nil {
			return err
		}
		if strings.HasPrefix(string(b), "json:") {
			return refuse(flatten, "the image has a backing file, described by the pseudo-protocol %.200q", b)
		}
		return refuse(flatten, "the image has a backing file, %.200q, which could be any file of this host", b)
	}
	return refuse(flatten, "the image has a backing file, %s", name)
}

// checkGeometry refuses sizes and offsets that are absurd or point outside the
// file. After it, arithmetic on them cannot overflow.
func (h *header) checkGeometry(size int64) error {
	if h.clusterBits < minClusterBits || h.clusterBits > maxClusterBits {
		return refuse("", "the image's cluster size of 2^%d bytes is out of range", h.clusterBits)
	}
	if h.extended() && h.clusterBits < minExtendedBits {
		return refuse("", "the image's cluster size of 2^%d bytes is too small for extended L2 entries", h.clusterBits)
	}
	if h.refcountOrder > maxRefcountOrder {
		return refuse("", "the image's refcount width of 2^%d bits is out of range", h.refcountOrder)
	}
	cluster := uint64(1) << h.clusterBits
	if h.version >= 3 && (h.length < headerSizeV3 || h.length%8 != 0 || uint64(h.length) > cluster) {
		return refuse("", "the image's header length of %d bytes is out of range", h.length)
	}
	if err := checkVirtualSize(h.size); err != nil {
		return err
	}
	l1Bytes := uint64(h.l1Size) * 8
	if l1Bytes > maxL1Bytes {
		return refuse("", "the image's L1 table of %d entries is absurdly large", h.l1Size)
	}
	covered := cluster * h.l2Entries() // by one L1 entry, in bytes
	if need := (h.size + covered - 1) / covered; uint64(h.l1Size) < need {
		return refuse("", "the image's L1 table has %d entries where the disk's size needs %d", h.l1Size, need)
	}
	refcountBytes := uint64(h.refcountCluster) * cluster
	if refcountBytes > maxRefcountBytes {
		return refuse("", "the image's refcount table of %d clusters is absurdly large", h.refcountCluster)
	}
	if refcountBytes == 0 {
		return refuse("", "the image has no refcount table")
	}
	if err := h.checkSpan("L1 table", h.l1Offset, l1Bytes, size); err != nil {
		return err
	}
	return h.checkSpan("refcount table", h.refcountOffset, refcountBytes, size)
}

func (h *header) extended() bool { return h.incompatible&incompatExtendedL2 != 0 }

// l2Entries is the number of entries of an L2 table, which fills one cluster.
func (h *header) l2Entries() uint64 {
	if h.extended() {
		return 1 << (h.clusterBits - 4)
	}
	return 1 << (h.clusterBits - 3)
}

// checkSpan refuses a table that is not aligned to a cluster, lies in the
// header's cluster, or reaches beyond the end of the file.
func (h *header) checkSpan(what string, offset, length uint64, size int64) error {
	cluster := uint64(1) << h.clusterBits
	if offset%cluster != 0 || offset < cluster {
		return refuse("", "the image's %s is at the impossible offset %#x", what, offset)
	}
	if offset > uint64(size) || length > uint64(size)-offset {
		return refuse(truncated, "the image's %s at offset %#x reaches beyond the end of the file (%d bytes)", what, offset, size)
	}
	return nil
}

const truncated = "the file may be cut off: fetch it again"

// checkExtensions walks the header extensions, which fill the rest of the first
// cluster at most. Those that are not known can be ignored safely, says the
// format; those that name other files cannot.
func (h *header) checkExtensions(r io.ReaderAt, size int64) error {
	area := make([]byte, max(0, min(int64(1)<<h.clusterBits, size)-int64(h.length)))
	if err := readFull(r, area, int64(h.length)); err != nil {
		return err
	}
	for len(area) >= 8 {
		kind, length := binary.BigEndian.Uint32(area), uint64(binary.BigEndian.Uint32(area[4:]))
		area = area[8:]
		switch kind {
		case extEnd:
			return nil
		case extBackingFormat:
			return refuse(flatten, "the image names the format of a backing file")
		case extDataFile:
			return refuse(flatten, "the image names an external data file, which could be any file of this host")
		case extEncryption:
			return refuse(flatten, "the image has an encryption header")
		case extBitmaps:
			return refuse(flatten, "the image holds dirty bitmaps, of which a box has no use")
		}
		length = (length + 7) &^ 7
		if length > uint64(len(area)) {
			return refuse("", "the image's header extension %#08x is longer than its cluster", kind)
		}
		area = area[length:]
	}
	return nil
}
