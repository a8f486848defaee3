// SPDX-License-Identifier: Apache-2.0

// Package disk inspects disk images from strangers before any other tool opens
// them: it says what an image is, or why it must not be used.
package disk

import (
	"errors"
	"fmt"
	"io"
)

// ErrUnsafe says that a disk image was refused. It is wrapped by every error
// of Inspect that is about the image rather than about reading it.
var ErrUnsafe = errors.New("unsafe disk image")

// Format is the format of a disk image, in the words of QEMU.
type Format string

// The formats that are accepted.
const (
	QCOW2 Format = "qcow2"
	Raw   Format = "raw"
)

// MaxVirtualSize is the largest disk that is accepted, in bytes.
const MaxVirtualSize int64 = 16 << 40

// SectorSize is the unit of virtual disk sizes, in bytes.
const SectorSize = 512

// Info is what Inspect found out about an image.
type Info struct {
	Format      Format
	VirtualSize int64  // of the disk as a guest sees it, in bytes
	Version     int    // of the qcow2 format: 2 or 3; 0 for raw
	ClusterSize int64  // in bytes; 0 for raw
	Compression string // of qcow2's compressed clusters, if there are any: "zlib" or "zstd"; empty for raw
}

// UnsafeError says why an image was refused and what its owner can do about it.
type UnsafeError struct {
	Reason string // what is wrong, fit to follow "unsafe disk image: "
	Cure   string // the next step, usually a command; empty if there is none
}

func (e *UnsafeError) Error() string { return ErrUnsafe.Error() + ": " + e.Reason }

// Unwrap makes errors.Is(err, ErrUnsafe) hold.
func (e *UnsafeError) Unwrap() error { return ErrUnsafe }

// Hint is the next step for the user; empty if there is none.
func (e *UnsafeError) Hint() string { return e.Cure }

func refuse(cure, format string, args ...any) error {
	return &UnsafeError{Reason: fmt.Sprintf(format, args...), Cure: cure}
}

// flatten is the cure for whatever qemu-img leaves behind when it copies an
// image. The owner of the image runs it; lab never lets qemu-img open an image
// that it refused.
const flatten = "if you trust the image, copy it into a plain one: qemu-img convert -O qcow2 IN OUT"

// Inspect reads the headers and tables of the image that r holds, size bytes
// long, and decides whether it may be used. It accepts qcow2 (versions 2 and 3)
// and raw images that stand on their own: no backing file, no data file, no
// encryption, nothing that it doesn't know. It never opens another file, and
// reads no more than the image's own size and 40 MiB.
//
// An error wraps ErrUnsafe if the image was refused, or comes from r.
func Inspect(r io.ReaderAt, size int64) (Info, error) {
	if size <= 0 {
		return Info{}, refuse("", "the file is empty")
	}
	head := make([]byte, min(size, headSize))
	if err := readFull(r, head, 0); err != nil {
		return Info{}, err
	}
	if isQCOW(head) {
		return inspectQCOW2(r, size, head)
	}
	return inspectRaw(r, size, head)
}

// readFull fills b from offset off. A file that is shorter than it was said to
// be is an error like any other.
func readFull(r io.ReaderAt, b []byte, off int64) error {
	n, err := r.ReadAt(b, off)
	if n == len(b) {
		return nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return fmt.Errorf("reading %d bytes at offset %d of the disk image: %w", len(b), off, err)
}
