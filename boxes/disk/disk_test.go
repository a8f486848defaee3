// SPDX-License-Identifier: Apache-2.0

package disk_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"strings"
	"testing"

	"github.com/labfile/lab/boxes/disk"
)

// The layout of the smallest valid image: header, L1 table, refcount table,
// refcount block, L2 table, one data cluster; 64 KiB each.
const (
	cluster     = 64 << 10
	l1At        = 1 * cluster
	refcountAt  = 2 * cluster
	blockAt     = 3 * cluster
	l2At        = 4 * cluster
	dataAt      = 5 * cluster
	imageSize   = 6 * cluster
	virtualSize = 1 << 30
)

// image returns a valid qcow2 image of version 3 with one allocated cluster.
func image() []byte {
	b := make([]byte, imageSize)
	be := binary.BigEndian
	copy(b, "QFI\xfb")
	be.PutUint32(b[4:], 3)
	be.PutUint32(b[20:], 16)
	be.PutUint64(b[24:], virtualSize)
	be.PutUint32(b[36:], 2)
	be.PutUint64(b[40:], l1At)
	be.PutUint64(b[48:], refcountAt)
	be.PutUint32(b[56:], 1)
	be.PutUint32(b[96:], 4)
	be.PutUint32(b[100:], 112)
	be.PutUint64(b[refcountAt:], blockAt)
	be.PutUint64(b[l1At:], 1<<63|l2At)
	be.PutUint64(b[l2At:], 1<<63|dataAt)
	return b
}

func put32(off int, v uint32) func([]byte) []byte {
	return func(b []byte) []byte { binary.BigEndian.PutUint32(b[off:], v); return b }
}

func put64(off int, v uint64) func([]byte) []byte {
	return func(b []byte) []byte { binary.BigEndian.PutUint64(b[off:], v); return b }
}

func both(fs ...func([]byte) []byte) func([]byte) []byte {
	return func(b []byte) []byte {
		for _, f := range fs {
			b = f(b)
		}
		return b
	}
}

func text(off int, s string) func([]byte) []byte {
	return func(b []byte) []byte { copy(b[off:], s); return b }
}

func raw(size, off int, magic string) func([]byte) []byte {
	return func([]byte) []byte { b := make([]byte, size); copy(b[off:], magic); return b }
}

// extension writes a header extension behind the header.
func extension(kind uint32, data string) func([]byte) []byte {
	return both(put32(112, kind), put32(116, uint32(len(data))), text(120, data))
}

func inspect(b []byte) (disk.Info, error) {
	return disk.Inspect(bytes.NewReader(b), int64(len(b)))
}

func TestInspectAccepts(t *testing.T) {
	v3 := disk.Info{Format: disk.QCOW2, Version: 3, VirtualSize: virtualSize, ClusterSize: cluster, Compression: "zlib"}
	v2, zstd := v3, v3
	v2.Version = 2
	zstd.Compression = "zstd"
	tests := []struct {
		name   string
		change func([]byte) []byte
		want   disk.Info
	}{
		{"version 3", both(), v3},
		{"version 2", put32(4, 2), v2},
		{"zstd", both(put64(72, 1<<3), text(104, "\x01")), zstd},
		{"extended L2 entries", both(put64(72, 1<<4), put32(36, 4)), v3},
		{"lazy refcounts", put64(80, 1), v3},
		{"unknown compatible feature", put64(80, 1<<40), v3},
		{"unknown autoclear feature", put64(88, 1<<40), v3},
		{"feature name table", extension(0x6803f857, "\x00\x00dirty bit"), v3},
		{"unknown extension", extension(0x12345678, "whatever"), v3},
		{"compressed cluster", put64(l2At+8, 1<<62|dataAt+100), v3},
		{"zero cluster that points nowhere", put64(l2At+8, 1<<40|1), v3},
		{"short last cluster", func(b []byte) []byte { return b[:dataAt+1] }, v3},
		{"empty raw", raw(512, 0, ""), disk.Info{Format: disk.Raw, VirtualSize: 512}},
		{"raw with a boot sector", raw(1<<20, 510, "\x55\xaa"), disk.Info{Format: disk.Raw, VirtualSize: 1 << 20}},
		{"hybrid ISO", func(b []byte) []byte { return both(raw(1<<20, 510, "\x55\xaa"), text(0x8001, "CD001"))(b) }, disk.Info{Format: disk.Raw, VirtualSize: 1 << 20}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := inspect(tt.change(image()))
			if err != nil {
				t.Fatal(err)
			}
			if got != tt.want {
				t.Errorf("Inspect = %+v, want %+v", got, tt.want)
			}
		})
	}
}

func TestInspectRefuses(t *testing.T) {
	const (
		convert  = "qemu-img convert"
		backing  = "/etc/shadow"
		pastEnd  = 100 * cluster
		dataFile = "the image keeps its content in an external data file, which could be any file of this host"
	)
	tests := []struct {
		name   string
		change func([]byte) []byte
		reason string // the whole of it
		hint   string // a part of it
	}{
		{"empty file", func([]byte) []byte { return nil }, "the file is empty", ""},
		{"only the magic", func(b []byte) []byte { return b[:8] }, "the qcow2 header is cut off", ""},
		{"short version 3 header", func(b []byte) []byte { return b[:80] }, "the qcow2 header is cut off", ""},
		{"version 1", put32(4, 1), "the file is a qcow disk of version 1, not qcow2", "-f qcow"},
		{"version 4", put32(4, 4), "the qcow2 version is 4; lab knows 2 and 3", ""},
		{
			"backing file", both(put64(8, 1024), put32(16, uint32(len(backing))), text(1024, backing)),
			`the image has a backing file, "/etc/shadow", which could be any file of this host`, convert,
		},
		{
			"backing file of version 2", both(put32(4, 2), put64(8, 1024), put32(16, uint32(len(backing))), text(1024, backing)),
			`the image has a backing file, "/etc/shadow", which could be any file of this host`, convert,
		},
		{
			"json backing file", both(put64(8, 1024), put32(16, 9), text(1024, "json:{\"\x1b\"")),
			`the image has a backing file, described by the pseudo-protocol "json:{\"\x1b\""`, convert,
		},
		{"backing file past the end", both(put64(8, 1<<62), put32(16, 9)), "the image has a backing file, a file with no readable name", convert},
		{"backing file of absurd length", both(put64(8, 1024), put32(16, 1<<31)), "the image has a backing file, a file with no readable name", convert},
		{"data file bit", put64(72, 1<<2), dataFile, convert},
		{"raw data file bit", put64(88, 1<<1), dataFile, convert},
		{"unknown incompatible bit", put64(72, 1<<37), "the image uses an unknown incompatible feature (bit 37)", ""},
		{"dirty", put64(72, 1<<0), "the image is marked as dirty: it is in use, or was not closed properly", "qemu-img check -r all"},
		{"corrupt", put64(72, 1<<1), "the image is marked as corrupt", "qemu-img check -r all"},
		{"AES", put32(32, 1), "the image is encrypted (method 1)", convert},
		{"LUKS", put32(32, 2), "the image is encrypted (method 2)", convert},
		{"snapshots", put32(60, 3), "the image holds 3 internal snapshot(s), of which a box has no use", convert},
		{"unknown compression", both(put64(72, 1<<3), text(104, "\x02")), "the image uses the unknown compression type 2", ""},
		{"compression without its bit", text(104, "\x01"), "the image's compression type 1 contradicts its feature bits", ""},
		{"compression bit without a type", put64(72, 1<<3), "the image's compression type 0 contradicts its feature bits", ""},
		{"tiny clusters", put32(20, 8), "the image's cluster size of 2^8 bytes is out of range", ""},
		{"huge clusters", put32(20, 63), "the image's cluster size of 2^63 bytes is out of range", ""},
		{"small clusters with extended entries", both(put64(72, 1<<4), put32(20, 13)), "the image's cluster size of 2^13 bytes is too small for extended L2 entries", ""},
		{"refcount width", put32(96, 7), "the image's refcount width of 2^7 bits is out of range", ""},
		{"header length not aligned", put32(100, 109), "the image's header length of 109 bytes is out of range", ""},
		{"header longer than its cluster", put32(100, 1<<31), "the image's header length of 2147483648 bytes is out of range", ""},
		{"2^60 bytes", put64(24, 1<<60), "the disk claims 1048576 TiB; lab uses disks of at most 16 TiB", ""},
		{"2^64-1 bytes", put64(24, 1<<64-1), "the disk claims 18446744073709551615 bytes; lab uses disks of at most 16 TiB", ""},
		{"no size", put64(24, 0), "the disk has a size of 0", ""},
		{"odd size", put64(24, 513), "the disk's size of 513 bytes is not a whole number of 512-byte sectors; the file may be cut off", "truncate"},
		{"absurd L1 table", put32(36, 1<<32-1), "the image's L1 table of 4294967295 entries is absurdly large", ""},
		{"L1 table too small", put32(36, 1), "the image's L1 table has 1 entries where the disk's size needs 2", ""},
		{"L1 table past the end", put64(40, pastEnd), "the image's L1 table at offset 0x640000 reaches beyond the end of the file (393216 bytes)", "fetch it again"},
		{"L1 table far past the end", put64(40, 1<<64-cluster), "the image's L1 table at offset 0xffffffffffff0000 reaches beyond the end of the file (393216 bytes)", ""},
		{"L1 table not aligned", put64(40, l1At+8), "the image's L1 table is at the impossible offset 0x10008", ""},
		{"L1 table in the header", put64(40, 0), "the image's L1 table is at the impossible offset 0x0", ""},
		{"absurd refcount table", put32(56, 1<<32-1), "the image's refcount table of 4294967295 clusters is absurdly large", ""},
		{"no refcount table", put32(56, 0), "the image has no refcount table", ""},
		{"refcount table past the end", put64(48, pastEnd), "the image's refcount table at offset 0x640000 reaches beyond the end of the file (393216 bytes)", ""},
		{"backing format", extension(0xe2792aca, "raw"), "the image names the format of a backing file", convert},
		{"data file name", extension(0x44415441, "/etc/shadow"), "the image names an external data file, which could be any file of this host", convert},
		{"encryption header", extension(0x0537be77, "0123456789abcdef"), "the image has an encryption header", convert},
		{"bitmaps", extension(0x23852875, "012345678901234567890123"), "the image holds dirty bitmaps, of which a box has no use", convert},
		{"second extension", both(extension(0x12345678, "x"), put32(128, 0x44415441)), "the image names an external data file, which could be any file of this host", convert},
		{"version 2 extension", both(put32(4, 2), put32(72, 0xe2792aca), put32(76, 3)), "the image names the format of a backing file", convert},
		{"endless extension", both(put32(112, 0x12345678), put32(116, 1<<32-1)), "the image's header extension 0x12345678 is longer than its cluster", ""},
		{"L1 reserved bits", put64(l1At, 1<<63|l2At|1), "the image's L1 table has reserved bits set in entry 0", ""},
		{"L2 table past the end", put64(l1At, 1<<63|pastEnd), "the image's L2 table at offset 0x640000 reaches beyond the end of the file (393216 bytes)", "fetch it again"},
		{"refcount block past the end", put64(refcountAt+8, pastEnd), "the image's refcount block at offset 0x640000 lies beyond the end of the file (393216 bytes)", "fetch it again"},
		{"refcount block far past the end", put64(refcountAt, 1<<63), "the image's refcount block at offset 0x8000000000000000 lies beyond the end of the file (393216 bytes)", "fetch it again"},
		{"refcount block not aligned", put64(refcountAt, blockAt+512), "the image has a refcount block at the unaligned offset 0x30200", ""},
		{"refcount reserved bits", put64(refcountAt, blockAt|1), "the image's refcount table has reserved bits set in entry 0", ""},
		{"refcount block is in two entries", put64(refcountAt+8, blockAt), "the image's refcount block at offset 0x30000 overlaps its refcount block", ""},
		{"refcount block is the L1 table", put64(refcountAt, l1At), "the image's refcount block at offset 0x10000 overlaps its L1 table", ""},
		{"refcount table is the L1 table", put64(48, l1At), "the image's refcount table at offset 0x10000 overlaps its L1 table", ""},
		{"L1 table reaches into the refcount table", put32(36, 2*cluster/8), "the image's refcount table at offset 0x20000 overlaps its L1 table", ""},
		{"L2 table is the refcount block", put64(l1At, 1<<63|blockAt), "the image's L2 table at offset 0x30000 overlaps its refcount block", ""},
		{"L2 table is the L1 table", put64(l1At, 1<<63|l1At), "the image's L2 table at offset 0x10000 overlaps its L1 table", ""},
		{"data in the L2 table", put64(l2At, 1<<63|l2At), "the image has data at offset 0x40000, where its L2 table is", ""},
		{"data in the L2 table of a later entry", both(put64(l1At+8, 1<<63|dataAt)), "the image has data at offset 0x50000, where its L2 table is", ""},
		{"compressed data in the refcount table", put64(l2At+8, 1<<62|refcountAt+512), "the image has data at offset 0x20200, where its refcount table is", ""},
		{"compressed data in the header", put64(l2At+8, 1<<62|512), "the image has data at offset 0x200, where its header is", ""},
		{"shared L2 table", put64(l1At+8, 1<<63|l2At), "the image's L1 table refers twice to the L2 table at offset 0x40000", ""},
		{"L2 reserved bits", put64(l2At, 1<<63|dataAt|2), "the image has reserved bits set in an L2 table (0x8000000000050002)", ""},
		{"cluster not aligned", put64(l2At, 1<<63|(dataAt+512)), "the image has a cluster at the unaligned offset 0x50200", ""},
		{"compressed and copied", put64(l2At, 3<<62|dataAt), "the image has an impossible compressed cluster (0xc000000000050000)", ""},
		{"cluster past the end", put64(l2At+8, 1<<63|pastEnd), "the image refers to a cluster at offset 0x640000 beyond the end of the file (393216 bytes)", "fetch it again"},
		{"compressed cluster past the end", put64(l2At+8, 1<<62|pastEnd), "the image refers to a cluster at offset 0x640000 beyond the end of the file (393216 bytes)", ""},
		{"cut off", func(b []byte) []byte { return b[:dataAt] }, "the image refers to a cluster at offset 0x50000 beyond the end of the file (327680 bytes)", "fetch it again"},

		{"raw of odd size", raw(1000, 0, ""), "the disk's size of 1000 bytes is not a whole number of 512-byte sectors; the file may be cut off", "truncate"},
		{"VMDK", raw(512, 0, "KDMV"), "the file is a VMware disk (VMDK), not a qcow2 or raw disk", "-f vmdk"},
		{"VMDK descriptor", raw(512, 0, "# Disk DescriptorFile\n"), "the file is a VMware disk descriptor (VMDK), not a qcow2 or raw disk", "-f vmdk"},
		{"VDI", raw(512, 0x40, "\x7f\x10\xda\xbe"), "the file is a VirtualBox disk (VDI), not a qcow2 or raw disk", "-f vdi"},
		{"VHDX", raw(512, 0, "vhdxfile"), "the file is a Hyper-V disk (VHDX), not a qcow2 or raw disk", "-f vhdx"},
		{"dynamic VHD", raw(512, 0, "conectix"), "the file is a Virtual PC disk (VHD), not a qcow2 or raw disk", "-f vpc"},
		{"fixed VHD", raw(1536, 1024, "conectix"), "the file is a Virtual PC disk (VHD), not a qcow2 or raw disk", "-f vpc"},
		{"DMG", raw(1536, 1024, "koly\x00\x00\x00\x04"), "the file is an Apple disk image (DMG), not a qcow2 or raw disk", "-f dmg"},
		{"QED", raw(512, 0, "QED\x00"), "the file is a QED disk, not a qcow2 or raw disk", "-f qed"},
		{"LUKS volume", raw(512, 0, "LUKS\xba\xbe"), "the file is a LUKS-encrypted volume, not a qcow2 or raw disk", "decrypt"},
		{"gzip", raw(512, 0, "\x1f\x8b\x08"), "the file is gzip-compressed, not a qcow2 or raw disk", "gunzip"},
		{"xz", raw(512, 0, "\xfd7zXZ\x00"), "the file is xz-compressed, not a qcow2 or raw disk", "unxz"},
		{"zstd", raw(512, 0, "\x28\xb5\x2f\xfd"), "the file is zstd-compressed, not a qcow2 or raw disk", "unzstd"},
		{"ZIP", raw(512, 0, "PK\x03\x04"), "the file is a ZIP archive, not a qcow2 or raw disk", "unzip"},
		{"tar", raw(1024, 257, "ustar\x00"), "the file is a tar archive, not a qcow2 or raw disk", "tar -xf"},
		{"ISO", raw(1<<20, 0x8001, "CD001"), "the file is a CD image (ISO 9660), not a qcow2 or raw disk", "disk image"},
		{"web page", raw(512, 0, "\n <!DOCTYPE html><html>"), "the file is a web page (HTML), not a qcow2 or raw disk", "address"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := inspect(tt.change(image()))
			if !errors.Is(err, disk.ErrUnsafe) {
				t.Fatalf("error %v does not wrap ErrUnsafe", err)
			}
			if got, want := err.Error(), "unsafe disk image: "+tt.reason; got != want {
				t.Errorf("error\n got %s\nwant %s", got, want)
			}
			var unsafe *disk.UnsafeError
			if !errors.As(err, &unsafe) {
				t.Fatalf("error is a %T, want *UnsafeError", err)
			}
			if !strings.Contains(unsafe.Hint(), tt.hint) {
				t.Errorf("hint %q lacks %q", unsafe.Hint(), tt.hint)
			}
		})
	}
}

// A file that cannot be read is not an unsafe one.
func TestInspectReadError(t *testing.T) {
	for _, b := range [][]byte{image()[:l2At+100], {'Q', 'F', 'I', 0xfb}} {
		_, err := disk.Inspect(bytes.NewReader(b), imageSize)
		if !errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, disk.ErrUnsafe) {
			t.Errorf("Inspect of a file shorter than it was said to be = %v, want io.ErrUnexpectedEOF", err)
		}
	}
}

// FuzzInspect looks for panics, and for accepted images that break what callers
// rely on.
func FuzzInspect(f *testing.F) {
	// Clusters of 512 bytes make an image small enough to be changed all over.
	small := func(changes ...func([]byte) []byte) []byte {
		b := make([]byte, 3584)
		copy(b, image()[:112])
		geometry := both(put32(20, 9), put64(24, 32<<10), put32(36, 1), put64(40, 512), put64(48, 1024))
		tables := both(put64(512, 1<<63|2048), put64(2048, 1<<63|2560))
		return both(append([]func([]byte) []byte{geometry, tables}, changes...)...)(b)
	}
	f.Add(small())
	f.Add(small()[:2048])
	f.Add(small(put32(4, 2)))
	f.Add(small(extension(0x6803f857, "\x00\x00dirty bit")))
	f.Add(small(put64(8, 448), put32(16, 16)))
	f.Add(small(put64(2048, 1<<62|2570)))
	f.Add(make([]byte, 1024))
	f.Add([]byte("KDMV"))
	f.Add(small(put64(1024, 1536)))
	f.Add(small(put64(1024, 2048)))
	f.Add(small(put64(1024, 4096)))
	f.Add([]byte("{\"a\": 1}\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		info, err := inspect(b)
		if err != nil {
			if !errors.Is(err, disk.ErrUnsafe) {
				t.Fatalf("error %v of a file in memory does not wrap ErrUnsafe", err)
			}
			return
		}
		if info.VirtualSize <= 0 || info.VirtualSize > disk.MaxVirtualSize || info.VirtualSize%disk.SectorSize != 0 {
			t.Errorf("accepted a virtual size of %d", info.VirtualSize)
		}
		if isQCOW2 := bytes.HasPrefix(b, []byte("QFI\xfb")); isQCOW2 != (info.Format == disk.QCOW2) {
			t.Errorf("format %s of a file that begins with %.4q", info.Format, b)
		}
	})
}
