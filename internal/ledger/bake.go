// SPDX-License-Identifier: Apache-2.0

package ledger

import (
	"encoding/json"
	"fmt"
	"time"

	"github.com/labfile/lab/internal/lab"
)

// The records about images. They name no machine of their own: an image is shared.
const (
	ImageBake   Type = "image.bake"   // Bake: intent, one per layer
	ImageBaked  Type = "image.baked"  // Baked
	ImageFailed Type = "image.failed" // BakeFailed
)

// Bake is the data of ImageBake: a layer is to be made of a provision step.
type Bake struct {
	Key      string     `json:"key"`
	Parent   string     `json:"parent"` // key of the layer below, or the box's digest
	Text     string     `json:"text"`   // the step
	Machines []lab.Name `json:"machines"`
}

// Baked is the data of ImageBaked.
type Baked struct {
	Key    string        `json:"key"`
	Parent string        `json:"parent"`
	Text   string        `json:"text"`
	Took   time.Duration `json:"took"` // nanoseconds
}

// BakeFailed is the data of ImageFailed.
type BakeFailed struct {
	Key   string `json:"key"`
	Text  string `json:"text"`
	Place string `json:"place,omitempty"` // in the Labfile
	Code  int    `json:"code,omitempty"`  // exit code of the step
	Error string `json:"error"`
}

// CreateOf returns the data of a MachineCreate record.
func CreateOf(r Record) (Create, error) {
	var c Create
	if err := json.Unmarshal(r.Data, &c); err != nil {
		return c, fmt.Errorf("record %d: %w", r.Seq, err)
	}
	return c, nil
}

// bakeSummary is Summary for the records about images; empty for others.
func (r Record) bakeSummary() string {
	get := func(v any) bool { return json.Unmarshal(r.Data, v) == nil }
	switch r.Type {
	case ImageBake:
		var d Bake
		if get(&d) {
			return fmt.Sprintf("image %s: baking %q", Short(d.Key), d.Text)
		}
	case ImageBaked:
		var d Baked
		if get(&d) {
			return fmt.Sprintf("image %s: baked %q in %s", Short(d.Key), d.Text, d.Took.Round(10*time.Millisecond))
		}
	case ImageFailed:
		var d BakeFailed
		if get(&d) {
			return fmt.Sprintf("image %s: %q failed: %s", Short(d.Key), d.Text, d.Error)
		}
	}
	return ""
}
