// SPDX-License-Identifier: Apache-2.0

package ledger

import (
	"encoding/json"
	"fmt"

	"github.com/labfile/lab/internal/lab"
)

// The types of records about volumes, all with VolumeAct as their data. They record
// what is done.
const (
	VolumeMade        Type = "volume.made"
	VolumeGrown       Type = "volume.grown"
	VolumeSnapshotted Type = "volume.snapshot"
	VolumeForgotten   Type = "volume.forgotten" // a snapshot was removed
	VolumeRestored    Type = "volume.restored"
	VolumeCloned      Type = "volume.cloned"
	VolumeRemoved     Type = "volume.removed"
	VolumeExported    Type = "volume.exported"
	VolumeImported    Type = "volume.imported"
)

// VolumeAct is what was done to a volume.
type VolumeAct struct {
	Volume   string    `json:"volume"`
	Snapshot int       `json:"snapshot,omitempty"` // that it is about; 0 if it is about the present state
	Kept     int       `json:"kept,omitempty"`     // restored: the snapshot of what it held before; 0 if that was none
	To       string    `json:"to,omitempty"`       // cloned: the new volume; exported: the file
	From     string    `json:"from,omitempty"`     // imported: the file
	Size     lab.Bytes `json:"size,omitempty"`     // made, grown: its virtual size
	Why      string    `json:"why,omitempty"`
}

// volumeSummary is Summary for records about volumes; empty for others.
func (r Record) volumeSummary() string {
	var d VolumeAct
	if json.Unmarshal(r.Data, &d) != nil || d.Volume == "" {
		return ""
	}
	name := "volume " + d.Volume
	at := name
	if d.Snapshot > 0 {
		at = fmt.Sprintf("%s@%d", name, d.Snapshot)
	}
	switch r.Type {
	case VolumeMade:
		return fmt.Sprintf("%s: made, %s", name, d.Size)
	case VolumeGrown:
		return fmt.Sprintf("%s: grown to %s", name, d.Size)
	case VolumeSnapshotted:
		if d.Why != "" {
			return fmt.Sprintf("%s: snapshot, %s", at, d.Why)
		}
		return at + ": snapshot"
	case VolumeForgotten:
		return at + ": snapshot removed"
	case VolumeRestored:
		return at + ": restored"
	case VolumeCloned:
		return fmt.Sprintf("%s: cloned as %s", at, d.To)
	case VolumeRemoved:
		return name + ": removed"
	case VolumeExported:
		return fmt.Sprintf("%s: exported to %s", at, d.To)
	case VolumeImported:
		return fmt.Sprintf("%s: imported from %s", name, d.From)
	}
	return ""
}
