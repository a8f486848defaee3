// SPDX-License-Identifier: Apache-2.0

// Package boxes says what a box is and keeps boxes: immutable machine images,
// each an OCI artifact named by the digest of its manifest.
package boxes

import (
	"errors"
	"time"

	"github.com/opencontainers/go-digest"
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
	ErrUnsafe = errors.New("unsafe disk image")
)

// Config is a box's metadata: the config blob of the artifact.
type Config struct {
	Name         string    `json:"name"`                // "builtin/tiny", or what it was added as
	Architecture string    `json:"architecture"`        // Go's name: "amd64"
	Created      time.Time `json:"created,omitzero"`    // of the content; zero if unknown
	Format       string    `json:"format"`              // of the disk: "qcow2" or "raw"
	Size         int64     `json:"size"`                // virtual size of the disk in bytes
	Append       string    `json:"append,omitempty"`    // kernel command line, with a kernel
	User         string    `json:"user,omitempty"`      // whom to log in as
	Agent        bool      `json:"agent,omitempty"`     // carries lab-agent
	CloudInit    bool      `json:"cloudInit,omitempty"` // reads a NoCloud seed
	MinMemory    int64     `json:"minMemory,omitempty"` // bytes below which it does not boot
	Packages     []string  `json:"packages,omitempty"`  // "name=version", sorted; builtin boxes
}

// Box is a box in the store. Its files are read-only and never change.
type Box struct {
	Digest digest.Digest // of the manifest
	Config Config
	Disk   File
	Kernel File // zero if the box boots from its disk
	Initrd File // zero if there is none
	Bytes  int64
}

// File is one blob of a box.
type File struct {
	Path   string // absolute, in the store
	Digest digest.Digest
	Size   int64
}
