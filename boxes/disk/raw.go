// SPDX-License-Identifier: Apache-2.0

package disk

import (
	"fmt"
	"io"
)

// headSize is how much of the beginning of a file is looked at to tell its
// format: as far as the first volume descriptor of an ISO 9660 image (ECMA-119:
// sector 16 of 2048 bytes).
const headSize = 34 << 10

// signature marks a format that is not a raw disk, though a raw disk may begin
// with any bytes. Refusing them by name keeps a user from booting a ZIP file,
// and a tool that probes formats from finding another one than we did.
type signature struct {
	name   string
	offset int
	magic  string
	cure   string
}

func convert(format string) string {
	return "convert it first: qemu-img convert -f " + format + " -O qcow2 IN OUT"
}

const (
	unpack  = "unpack it first"
	isoCure = "lab boots disks, not installation media: use a disk image (qcow2 or raw) of the system"
)

var signatures = []signature{
	{"a VMware disk (VMDK)", 0, "KDMV", convert("vmdk")},
	{"a VMware disk (VMDK)", 0, "COWD", convert("vmdk")},
	{"a VMware disk descriptor (VMDK)", 0, "# Disk DescriptorFile", convert("vmdk")},
	{"a VirtualBox disk (VDI)", 0x40, "\x7f\x10\xda\xbe", convert("vdi")},
	{"a Hyper-V disk (VHDX)", 0, "vhdxfile", convert("vhdx")},
	{"a Virtual PC disk (VHD)", 0, "conectix", convert("vpc")},
	{"a QED disk", 0, "QED\x00", convert("qed")},
	{"a Parallels disk", 0, "WithoutFreeSpace", convert("parallels")},
	{"a Parallels disk", 0, "WithouFreSpacExt", convert("parallels")},
	{"a Bochs disk", 0, "Bochs Virtual HD Image", convert("bochs")},
	{"a LUKS-encrypted volume", 0, "LUKS\xba\xbe", "decrypt it first: lab has no place for its passphrase"},
	{"gzip-compressed", 0, "\x1f\x8b", unpack + ": gunzip FILE"},
	{"xz-compressed", 0, "\xfd7zXZ\x00", unpack + ": unxz FILE"},
	{"zstd-compressed", 0, "\x28\xb5\x2f\xfd", unpack + ": unzstd FILE"},
	{"bzip2-compressed", 0, "BZh", unpack + ": bunzip2 FILE"},
	{"lz4-compressed", 0, "\x04\x22\x4d\x18", unpack + ": unlz4 FILE"},
	{"a ZIP archive", 0, "PK\x03\x04", unpack + ": unzip FILE"},
	{"a 7-Zip archive", 0, "7z\xbc\xaf\x27\x1c", unpack + ": 7z x FILE"},
	{"a tar archive", 257, "ustar", unpack + ": tar -xf FILE"},
	{"a program (ELF)", 0, "\x7fELF", ""},
}

// inspectRaw accepts what no signature claims.
func inspectRaw(r io.ReaderAt, size int64, head []byte) (Info, error) {
	for _, s := range signatures {
		if hasAt(head, s.offset, s.magic) {
			return Info{}, refuse(s.cure, "the file is %s, not a qcow2 or raw disk", s.name)
		}
	}
	if name, cure := textKind(head); name != "" {
		return Info{}, refuse(cure, "the file is %s, not a qcow2 or raw disk", name)
	}
	// A hybrid image carries a boot sector too: it is a valid raw disk.
	if hasAt(head, 0x8001, "CD001") && !hasAt(head, 510, "\x55\xaa") {
		return Info{}, refuse(isoCure, "the file is a CD image (ISO 9660), not a qcow2 or raw disk")
	}
	// A fixed VHD, and an Apple disk image, are told by their last sector.
	if size >= SectorSize {
		var tail [SectorSize]byte
		if err := readFull(r, tail[:], size-SectorSize); err != nil {
			return Info{}, err
		}
		if hasAt(tail[:], 0, "conectix") {
			return Info{}, refuse(convert("vpc"), "the file is a Virtual PC disk (VHD), not a qcow2 or raw disk")
		}
		if hasAt(tail[:], 0, "koly\x00\x00\x00\x04") {
			return Info{}, refuse(convert("dmg"), "the file is an Apple disk image (DMG), not a qcow2 or raw disk")
		}
	}
	if err := checkVirtualSize(uint64(size)); err != nil {
		return Info{}, err
	}
	return Info{Format: Raw, VirtualSize: size}, nil
}

func checkVirtualSize(size uint64) error {
	switch {
	case size == 0:
		return refuse("", "the disk has a size of 0")
	case size > uint64(MaxVirtualSize):
		return refuse("", "the disk claims %s; lab uses disks of at most %d TiB", inTiB(size), MaxVirtualSize>>40)
	case size%SectorSize != 0:
		return refuse("if the file is whole, pad it: truncate -s %512 FILE",
			"the disk's size of %d bytes is not a whole number of %d-byte sectors; the file may be cut off", size, SectorSize)
	}
	return nil
}

func inTiB(size uint64) string {
	if size%(1<<40) == 0 {
		return fmt.Sprintf("%d TiB", size>>40)
	}
	return fmt.Sprintf("%d bytes", size)
}

func hasAt(b []byte, offset int, magic string) bool {
	return len(b) >= offset+len(magic) && string(b[offset:offset+len(magic)]) == magic
}
