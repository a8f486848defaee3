// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io/fs"
	"os"
	"slices"

	"github.com/diskfs/go-diskfs/backend"
	"github.com/diskfs/go-diskfs/filesystem/fat12"
)

// SeedConfig is what a NoCloud seed is made of.
type SeedConfig struct {
	Identity   Identity
	InstanceID string // a new one makes cloud-init run anew
	User       string // whom lab logs in as; empty means the box's default user
	UserData   string // the Labfile's; empty if none
	AgentRuns  bool   // the agent gives name, address and keys: cloud-init must not

	Proxy []string // proxy settings, NAME=VALUE: see RootClient.SetProxy
}

// CloudInitEnds is a program for sh that waits until cloud-init has ended, well or not,
// at most ten minutes. "cloud-init status --wait" takes seconds to begin under emulation,
// and ends too early if any module failed.
const CloudInitEnds = `if [ -e /run/cloud-init/enabled ] || [ -e /run/cloud-init/status.json ]; then
	n=0
	until [ -e /run/cloud-init/result.json ] || [ $n -ge 600 ] || systemctl is-failed --quiet cloud-final 2>/dev/null; do
		sleep 1
		n=$((n + 1))
	done
fi
`

// MaxUserData is how long user data may be, in bytes.
const MaxUserData = 1 << 20

// seedSize holds MaxUserData and the rest with room to spare, and is the largest
// FAT12 volume with clusters of one sector.
const seedSize = 2 << 20

// Seed returns a volume for cloud-init's NoCloud data source: a FAT file system with
// the label that it looks for. The same SeedConfig gives the same bytes.
func Seed(c SeedConfig) ([]byte, error) {
	files, err := c.files()
	if err != nil {
		return nil, err
	}
	d := &memoryDisk{data: make([]byte, seedSize)}
	vol, err := fat12.Create(d, seedSize, 0, 512, "CIDATA", true)
	if err != nil {
		return nil, fmt.Errorf("making a seed volume: %w", err)
	}
	for _, f := range files {
		out, err := vol.OpenFile("/"+f.name, os.O_CREATE|os.O_RDWR)
		if err != nil {
			return nil, fmt.Errorf("writing %s to a seed volume: %w", f.name, err)
		}
		if _, err = out.Write(f.data); err == nil {
			err = out.Close()
		}
		if err != nil {
			return nil, fmt.Errorf("writing %s to a seed volume: %w", f.name, err)
		}
	}
	fixTimes(d.data)
	return d.data, nil
}

// fixTimes sets the times of all entries of the volume's root directory to the first
// moment that FAT knows, 1980-01-01. The writer stamps them with the present.
func fixTimes(vol []byte) {
	le := binary.LittleEndian
	// The layout is that of Microsoft's FAT specification, section 3.1.
	start := 512 * (int(le.Uint16(vol[14:])) + int(vol[16])*int(le.Uint16(vol[22:])))
	const entry, longName = 32, 0x0f
	for e := range slices.Chunk(vol[start:start+entry*int(le.Uint16(vol[17:]))], entry) {
		if e[0] == 0 {
			return
		}
		if e[11] == longName {
			continue
		}
		const firstDay = 1<<5 | 1
		clear(e[13:16])
		le.PutUint16(e[16:], firstDay)
		le.PutUint16(e[18:], firstDay)
		le.PutUint16(e[22:], 0)
		le.PutUint16(e[24:], firstDay)
	}
}

type seedFile struct {
	name string
	data []byte
}

// memoryDisk is a disk for the FAT writer.
type memoryDisk struct{ data []byte }

var _ backend.Storage = (*memoryDisk)(nil)

func (d *memoryDisk) ReadAt(p []byte, off int64) (int, error) {
	return bytes.NewReader(d.data).ReadAt(p, off)
}

func (d *memoryDisk) WriteAt(p []byte, off int64) (int, error) {
	if off < 0 || off+int64(len(p)) > int64(len(d.data)) {
		return 0, fs.ErrInvalid
	}
	return copy(d.data[off:], p), nil
}

func (d *memoryDisk) Read([]byte) (int, error)                { return 0, fs.ErrInvalid }
func (d *memoryDisk) Seek(int64, int) (int64, error)          { return 0, fs.ErrInvalid }
func (d *memoryDisk) Stat() (fs.FileInfo, error)              { return nil, fs.ErrInvalid }
func (d *memoryDisk) Close() error                            { return nil }
func (d *memoryDisk) Sys() (*os.File, error)                  { return nil, backend.ErrNotSuitable }
func (d *memoryDisk) Writable() (backend.WritableFile, error) { return d, nil }
func (d *memoryDisk) Path() string                            { return "" }
