// SPDX-License-Identifier: Apache-2.0

// Package qcow2 reads where a qcow2 image keeps each cluster, which is what tells
// the disks of two moments apart without reading them. It trusts nothing in the
// image and follows no name that stands in it: backing files are the caller's.
//
// The format is QEMU's docs/interop/qcow2.rst.
package qcow2

import (
	"bytes"
	"compress/flate"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// Kind says what an image has at an offset.
type Kind uint8

// The kinds of extents.
const (
	Hole       Kind = iota // nothing: what lies below shows through
	Zero                   // zeros, whatever lies below
	Data                   // bytes of the image's file
	Compressed             // a compressed cluster of the image's file
)

// Extent is what an image has from an offset on.
type Extent struct {
	Kind Kind
	At   int64 // where in the image's file; for Compressed the raw descriptor
	Len  int64 // bytes to which this applies, at least 1
}

// Image is an open qcow2 image. It must not be used by two goroutines at once.
type Image struct {
	r       io.ReaderAt
	file    int64 // length of the image's file
	size    int64 // of the disk
	bits    uint  // a cluster is 1<<bits bytes
	l1      []uint64
	l2      map[uint64][]byte // by offset in the file
	zAt     int64             // descriptor of the cluster in zData
	zData   []byte
	deflate bool
}

const (
	magic   = 0x514649fb
	maxL1   = 32 << 20 // bytes, QEMU's own limit
	cacheL2 = 32 << 20 // bytes of L2 tables held

	incompatDirty       = 1 << 0 // only the reference counts, which are not read here
	incompatCompression = 1 << 3

	offsetMask = 0x00fffffffffffe00
)

// Open reads the header and the first table of an image whose file is length bytes long.
func Open(r io.ReaderAt, length int64) (*Image, error) {
	var h [112]byte
	n, err := r.ReadAt(h[:], 0)
	if n < 72 {
		if err == nil || errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return nil, fmt.Errorf("qcow2 header: %w", err)
	}
	be := binary.BigEndian
	if be.Uint32(h[0:]) != magic {
		return nil, errors.New("not a qcow2 image")
	}
	version := be.Uint32(h[4:])
	if version != 2 && version != 3 {
		return nil, fmt.Errorf("qcow2 version %d is not supported", version)
	}
	if be.Uint32(h[32:]) != 0 {
		return nil, errors.New("an encrypted qcow2 image can't be read")
	}
	i := &Image{r: r, file: length, bits: uint(be.Uint32(h[20:])), l2: map[uint64][]byte{}, deflate: true}
	if i.bits < 9 || i.bits > 21 {
		return nil, fmt.Errorf("qcow2 cluster size of 2^%d bytes", i.bits)
	}
	if version == 3 && n >= 104 {
		incompat := be.Uint64(h[72:])
		if rest := incompat &^ (incompatDirty | incompatCompression); rest != 0 {
			return nil, fmt.Errorf("qcow2 features %#x are not supported", rest)
		}
		if incompat&incompatCompression != 0 && be.Uint32(h[100:]) > 104 && h[104] != 0 {
			i.deflate = false
		}
	}
	size := be.Uint64(h[24:])
	if size > 1<<56 {
		return nil, fmt.Errorf("qcow2 disk size of %d bytes", size)
	}
	i.size = int64(size)
	perL1 := uint64(1) << (2*i.bits - 3) // bytes of the disk that one L1 entry covers
	want := (size + perL1 - 1) / perL1
	entries := uint64(be.Uint32(h[36:]))
	at := be.Uint64(h[40:])
	if entries < want || want*8 > maxL1 {
		return nil, fmt.Errorf("qcow2 L1 table of %d entries for a disk of %d bytes", entries, size)
	}
	if at > uint64(length) || want*8 > uint64(length)-at {
		return nil, errors.New("the qcow2 L1 table lies outside of the file")
	}
	table := make([]byte, want*8)
	if err := readFull(r, table, int64(at)); err != nil {
		return nil, fmt.Errorf("qcow2 L1 table: %w", err)
	}
	i.l1 = make([]uint64, want)
	for n := range i.l1 {
		i.l1[n] = be.Uint64(table[n*8:])
	}
	return i, nil
}

// Size is the size of the disk in bytes.
func (i *Image) Size() int64 { return i.size }

// Map returns what the image has at offset off of the disk. Len ends at the latest
// at the end of the disk, and an absent table is one extent.
func (i *Image) Map(off int64) (Extent, error) {
	if off < 0 || off >= i.size {
		return Extent{}, fmt.Errorf("offset %d of a disk of %d bytes", off, i.size)
	}
	cluster := int64(1) << i.bits
	in := off & (cluster - 1)
	l2bits := i.bits - 3
	index := off >> (i.bits + l2bits)
	l2at := i.l1[index] & offsetMask
	if l2at == 0 {
		end := min((index+1)<<(i.bits+l2bits), i.size)
		return Extent{Kind: Hole, Len: end - off}, nil
	}
	table, err := i.table(l2at)
	if err != nil {
		return Extent{}, err
	}
	entry := binary.BigEndian.Uint64(table[(off>>i.bits&(1<<l2bits-1))*8:])
	e := Extent{Len: min(cluster-in, i.size-off)}
	switch at := int64(entry & offsetMask); {
	case entry&(1<<62) != 0:
		e.Kind, e.At = Compressed, int64(entry&(1<<62-1))
	case entry&1 != 0:
		e.Kind = Zero
	case at == 0:
		e.Kind = Hole
	case at&(cluster-1) != 0 || at >= i.file:
		return Extent{}, fmt.Errorf("the qcow2 cluster of offset %d lies at %d, outside of the file", off, at)
	default:
		e.Kind, e.At = Data, at+in
	}
	return e, nil
}

func (i *Image) table(at uint64) ([]byte, error) {
	if t := i.l2[at]; t != nil {
		return t, nil
	}
	size := int64(1) << i.bits
	if int64(at)&(size-1) != 0 || int64(at) > i.file-size {
		return nil, fmt.Errorf("a qcow2 L2 table lies at %d, outside of the file", at)
	}
	t := make([]byte, size)
	if err := readFull(i.r, t, int64(at)); err != nil {
		return nil, fmt.Errorf("qcow2 L2 table: %w", err)
	}
	if int64(len(i.l2)+1)*size > cacheL2 {
		clear(i.l2)
	}
	i.l2[at] = t
	return t, nil
}

// ReadAt reads bytes of an extent that Map returned for offset off: it fills p,
// which must not be longer than the extent.
func (i *Image) ReadAt(p []byte, off int64, e Extent) error {
	switch e.Kind {
	case Data:
		n, err := i.r.ReadAt(p, e.At)
		if n < len(p) && errors.Is(err, io.EOF) {
			clear(p[n:]) // the file ends within its last cluster
			return nil
		}
		if n == len(p) {
			return nil
		}
		return err
	case Compressed:
		data, err := i.inflate(e.At)
		if err != nil {
			return fmt.Errorf("compressed qcow2 cluster of offset %d: %w", off, err)
		}
		copy(p, data[off&(1<<i.bits-1):])
	default:
		clear(p)
	}
	return nil
}

// inflate returns the cluster that a descriptor describes.
func (i *Image) inflate(desc int64) ([]byte, error) {
	if !i.deflate {
		return nil, errors.New("only deflate is supported, this image uses zstd: convert it with qemu-img convert -O qcow2 OLD NEW")
	}
	if i.zData != nil && i.zAt == desc {
		return i.zData, nil
	}
	shift := 62 - (i.bits - 8)
	at := desc & (1<<shift - 1)
	sectors := desc>>shift&(1<<(i.bits-8)-1) + 1
	length := min(sectors*512-at&511, i.file-at)
	if length <= 0 {
		return nil, errors.New("it lies outside of the file")
	}
	packed := make([]byte, length)
	if err := readFull(i.r, packed, at); err != nil {
		return nil, err
	}
	data := make([]byte, 1<<i.bits)
	if _, err := io.ReadFull(flate.NewReader(bytes.NewReader(packed)), data); err != nil {
		return nil, err
	}
	i.zAt, i.zData = desc, data
	return data, nil
}

// Allocated is how many bytes of the disk the image has anything of its own for.
func (i *Image) Allocated() (int64, error) {
	var sum int64
	for off := int64(0); off < i.size; {
		e, err := i.Map(off)
		if err != nil {
			return 0, err
		}
		if e.Kind != Hole {
			sum += e.Len
		}
		off += e.Len
	}
	return sum, nil
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
