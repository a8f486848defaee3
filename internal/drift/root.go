// SPDX-License-Identifier: Apache-2.0

package drift

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	iofs "io/fs"
	"strings"

	"github.com/labfile/lab/internal/drift/ext4"
)

// UnreadableError says that a disk has no root file system that can be read from
// outside.
type UnreadableError struct {
	Why string
}

func (e *UnreadableError) Error() string {
	return "its root file system can't be read from outside: " + e.Why
}

// Root is the root file system of a disk.
type Root struct {
	view *View
	at   int64 // offset on the disk, in bytes
	fs   *ext4.FS
}

// OpenRoot finds the root file system: ext4 on the whole disk, or on the first
// partition that has /etc. *UnreadableError if there is none.
func OpenRoot(v *View) (*Root, error) {
	r, err := openAt(v, 0, v.Size())
	if errors.Is(err, ext4.ErrFeature) {
		return nil, &UnreadableError{err.Error()}
	}
	if err == nil || !errors.Is(err, ext4.ErrNotExt4) {
		return r, err
	}
	others := foreign(v, 0)
	parts, err := partitions(v)
	if err != nil {
		return nil, err
	}
	for _, p := range parts {
		r, err := openAt(v, p.at, p.size)
		if errors.Is(err, ext4.ErrNotExt4) {
			others = append(others, foreign(v, p.at)...)
			continue
		}
		if errors.Is(err, ext4.ErrFeature) {
			others = append(others, err.Error())
			continue
		}
		if err != nil {
			return nil, err
		}
		if _, err := r.fs.Lookup("etc"); err == nil {
			return r, nil
		} else if !errors.Is(err, iofs.ErrNotExist) {
			return nil, err
		}
	}
	if len(others) == 0 {
		return nil, &UnreadableError{"no ext4 was found on the disk"}
	}
	return nil, &UnreadableError{"it may be on " + strings.Join(others, " or ")}
}

// foreign names what lies at an offset of the disk, if it is one of those that
// distributions put their root on.
func foreign(v *View, at int64) []string {
	for _, f := range []struct {
		name, magic string
		at          int64
	}{
		{"xfs", "XFSB", 0},
		{"btrfs", "_BHRfS_M", 0x10040},
		{"LVM", "LABELONE", 512},
		{"LUKS", "LUKS\xba\xbe", 0},
		{"f2fs", "\x10\x20\xf5\xf2", 1024},
	} {
		b := make([]byte, len(f.magic))
		if _, err := v.ReadAt(b, at+f.at); err == nil && string(b) == f.magic {
			return []string{f.name}
		}
	}
	return nil
}

func openAt(v *View, at, size int64) (*Root, error) {
	fs, err := ext4.Open(io.NewSectionReader(v, at, size), size)
	if err != nil {
		return nil, err
	}
	return &Root{view: v, at: at, fs: fs}, nil
}

type partition struct{ at, size int64 }

// partitions reads a GPT, or the four entries of an MBR, with sectors of 512 bytes.
func partitions(v *View) ([]partition, error) {
	var b [1024]byte
	if _, err := v.ReadAt(b[:], 0); err != nil {
		if errors.Is(err, io.EOF) {
			return nil, nil
		}
		return nil, fmt.Errorf("partition table: %w", err)
	}
	le := binary.LittleEndian
	var parts []partition
	add := func(first, count uint64) {
		disk := uint64(v.Size() / 512)
		if first > 0 && first < disk && count > 0 && count <= disk-first {
			parts = append(parts, partition{int64(first) * 512, int64(count) * 512})
		}
	}
	if string(b[512:520]) != "EFI PART" {
		if b[510] == 0x55 && b[511] == 0xaa {
			for e := 446; e < 510; e += 16 {
				add(uint64(le.Uint32(b[e+8:])), uint64(le.Uint32(b[e+12:])))
			}
		}
		return parts, nil
	}
	table, n, size := le.Uint64(b[512+72:]), le.Uint32(b[512+80:]), le.Uint32(b[512+84:])
	if n > 1024 || size < 128 || size > 4096 || table > uint64(v.Size()/512) {
		return nil, errors.New("the disk's GPT is not to be believed")
	}
	entry := make([]byte, size)
	for i := range int64(n) {
		if _, err := v.ReadAt(entry, int64(table)*512+i*int64(size)); err != nil {
			return nil, fmt.Errorf("partition table: %w", err)
		}
		if first, last := le.Uint64(entry[32:]), le.Uint64(entry[40:]); last >= first {
			add(first, last-first+1)
		}
	}
	return parts, nil
}
