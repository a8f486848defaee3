// SPDX-License-Identifier: Apache-2.0

package libvirt

import (
	"encoding/json"
	"encoding/xml"
	"fmt"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/providers/local"
)

// owner is what a domain's metadata says.
type owner struct {
	Lab        lab.ID   `xml:"lab,attr"`
	Machine    lab.Name `xml:"name,attr"`
	Number     int      `xml:"generation,attr"`
	Directory  string   `xml:"directory,attr"`
	Definition string   `xml:"definition"`
	Stored     string   `xml:"stored"`
}

func parseOwner(text string) (owner, error) {
	var o owner
	if err := xml.Unmarshal([]byte(text), &o); err != nil {
		return o, fmt.Errorf("reading a domain's metadata: %w", err)
	}
	return o, nil
}

func (o owner) generation() lab.Generation {
	return lab.Generation{Lab: o.Lab, Machine: o.Machine, Number: o.Number}
}

// definition decodes what the generation is.
func (o owner) definition() (local.Definition, error) {
	var d local.Definition
	if err := json.Unmarshal([]byte(o.Definition), &d); err != nil {
		return d, fmt.Errorf("reading a domain's metadata: %w", err)
	}
	if err := d.Check(o.generation()); err != nil {
		return d, fmt.Errorf("the metadata of the domain of %s %w", o.generation(), err)
	}
	return d, nil
}

// seen is what is read of a live domain's document: the files that its disks are.
type seen struct {
	Disks []seenDisk `xml:"devices>disk"`
}

type seenDisk struct {
	Source struct {
		File string `xml:"file,attr"`
	} `xml:"source"`
	Backing backing `xml:"backingStore"`
	Target  target  `xml:"target"`
	Mirror  struct {
		Ready string `xml:"ready,attr"`
	} `xml:"mirror"`
}

// files are those of a disk, from the one that is written to downwards.
func (d seenDisk) files() []string {
	files := []string{d.Source.File}
	for b := &d.Backing; b != nil && b.Source != nil; b = b.Below {
		files = append(files, b.Source.File)
	}
	return files
}

// diskOf finds the machine's own disk in its document.
func diskOf(document string) (seenDisk, error) {
	var s seen
	if err := xml.Unmarshal([]byte(document), &s); err != nil {
		return seenDisk{}, fmt.Errorf("reading a domain's document: %w", err)
	}
	for _, d := range s.Disks {
		if d.Target.Dev == mainDisk {
			return d, nil
		}
	}
	return seenDisk{}, fmt.Errorf("the machine has no disk %s", mainDisk)
}

// chainOf returns the files of the machine's own disk, from the one that it writes
// to downwards.
func chainOf(document string) ([]string, error) {
	d, err := diskOf(document)
	if err != nil {
		return nil, err
	}
	return d.files(), nil
}
