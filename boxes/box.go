// SPDX-License-Identifier: Apache-2.0

// Package boxes says what a box is and keeps boxes: immutable machine images,
// each an OCI artifact named by the digest of its manifest.
package boxes

import (
	"errors"
	"fmt"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/labfile/lab/boxes/disk"
)

// Media types of a box as an OCI artifact (image-spec v1.1, "Guidelines for
// Artifact Usage").
const (
	ArtifactType    = "application/vnd.labfile.box.v1"
	MediaTypeConfig = "application/vnd.labfile.box.config.v1+json"
	MediaTypeDisk   = "application/vnd.labfile.box.disk.v1" // + "+qcow2" or "+raw"
	MediaTypeKernel = "application/vnd.labfile.box.kernel.v1"
	MediaTypeInitrd = "application/vnd.labfile.box.initrd.v1"
)

// Sentinel errors.
var (
	// ErrNotFound says that the store has no such box.
	ErrNotFound = errors.New("no such box")
	// ErrDigest says that content is not what its digest or checksum promises.
	ErrDigest = errors.New("digest does not match")
	// ErrUnsafe says that a disk was refused before anything opened it.
	ErrUnsafe = disk.ErrUnsafe
)

// Config is a box's metadata: the config blob of the artifact. What a box is
// called is no part of it, so that equal content has an equal digest.
type Config struct {
	Architecture string    `json:"architecture"`        // Go's name: "amd64"
	Created      time.Time `json:"created,omitzero"`    // of the content; zero if unknown
	Format       string    `json:"format"`              // of the disk: "qcow2" or "raw"
	Size         int64     `json:"size"`                // virtual size of the disk in bytes
	Append       string    `json:"append,omitempty"`    // kernel command line, with a kernel
	User         string    `json:"user,omitempty"`      // whom to log in as
	Agent        bool      `json:"agent,omitempty"`     // carries lab-agent
	CloudInit    bool      `json:"cloudInit,omitempty"` // reads a NoCloud seed
	MinMemory    int64     `json:"minMemory,omitempty"` // bytes below which it does not boot
	Has          []string  `json:"has,omitempty"`       // what is in it, for people; built-in boxes
	Packages     []string  `json:"packages,omitempty"`  // "name=version", sorted; built-in boxes

	Vagrant bool          `json:"vagrant,omitempty"` // lets in the published keys, until it is told others
	Source  digest.Digest `json:"source,omitempty"`  // of the archive that the disk was in; empty if it was in none
}

// Box is a box in the store. Its files are read-only and never change. They
// last as long as the box is not pruned: see Store.Prune.
type Box struct {
	Digest digest.Digest // of the manifest
	Config Config
	Disk   File
	Kernel File  // zero if the box boots from its disk
	Initrd File  // zero if there is none
	Bytes  int64 // that its files take together, metadata included
}

// File is one blob of a box.
type File struct {
	Path   string // absolute, in the store
	Digest digest.Digest
	Size   int64
}

// Entry is a box as the store lists it.
type Entry struct {
	Box
	Names  []string // sorted; empty for a box that is kept for its digest alone
	Origin string   // where it came from, fit to be shown; may be empty
	// Damage says what is wrong with the box; nil if it can be used. If it is
	// not nil, only Digest, Names and Origin are set.
	Damage error
}

// DigestError says that content is another than was promised. It wraps ErrDigest.
type DigestError struct {
	What      string // "checksum", of a disk as a file, or "box"
	Got, Want digest.Digest
}

func (e *DigestError) Error() string {
	return fmt.Sprintf("%v: the %s is %s, expected %s", ErrDigest, e.What, e.Got, e.Want)
}

// Unwrap makes errors.Is(err, ErrDigest) hold.
func (e *DigestError) Unwrap() error { return ErrDigest }

// DamagedError says that a file of the store is not what it should be. It wraps
// ErrDigest.
type DamagedError struct {
	Path   string
	Reason string
}

func (e *DamagedError) Error() string { return e.Path + ": " + e.Reason }

// Unwrap makes errors.Is(err, ErrDigest) hold.
func (e *DamagedError) Unwrap() error { return ErrDigest }

// Hint is the next step for the user.
func (e *DamagedError) Hint() string {
	return "add or build the box again: that replaces the damaged file"
}
