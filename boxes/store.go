// SPDX-License-Identifier: Apache-2.0

package boxes

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"oras.land/oras-go/v2/content"
	"oras.land/oras-go/v2/content/oci"

	"github.com/labfile/lab/boxes/disk"
)

// Store keeps boxes in an OCI image layout. Any number of processes may use one
// at a time: changes are made under a kernel lock, and readers, who take none,
// see each change whole or not at all.
//
// The directory holds, besides what image-spec prescribes: "lock", which is
// locked and never read, and "ingest", what is not yet part of the store.
type Store struct {
	dir     string
	storage *oci.Storage
}

// maxMetadata bounds manifests and config blobs, in bytes.
const maxMetadata = 4 << 20

// Open opens the store in dir and makes it if it doesn't exist.
func Open(dir string) (*Store, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("opening box store: %w", err)
	}
	s := &Store{dir: dir}
	if s.storage, err = oci.NewStorage(dir); err != nil {
		return nil, fmt.Errorf("opening box store %s: %w", dir, err)
	}
	layout, err := os.ReadFile(filepath.Join(dir, ocispec.ImageLayoutFile))
	if errors.Is(err, fs.ErrNotExist) {
		err = s.create()
	} else if err == nil {
		err = checkLayout(layout)
	}
	if err != nil {
		return nil, fmt.Errorf("opening box store %s: %w", dir, err)
	}
	return s, nil
}

// create makes an empty store; two processes may do so at once.
func (s *Store) create() error {
	for _, d := range []string{s.blobs(), s.ingestDir()} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return err
		}
	}
	return s.locked(context.Background(), func() error {
		if _, err := os.Stat(s.indexFile()); errors.Is(err, fs.ErrNotExist) {
			if err := s.writeIndex(nil); err != nil {
				return err
			}
		} else if err != nil {
			return err
		}
		layout, err := json.Marshal(ocispec.ImageLayout{Version: ocispec.ImageLayoutVersion})
		if err != nil {
			return err
		}
		// The layout file comes last: once it is there, all is there.
		return s.writeFile(filepath.Join(s.dir, ocispec.ImageLayoutFile), layout)
	})
}

func checkLayout(data []byte) error {
	var layout ocispec.ImageLayout
	if err := json.Unmarshal(data, &layout); err != nil {
		return fmt.Errorf("reading %s: %w", ocispec.ImageLayoutFile, err)
	}
	if layout.Version != ocispec.ImageLayoutVersion {
		return fmt.Errorf("the image layout has version %q; lab knows %q", layout.Version, ocispec.ImageLayoutVersion)
	}
	return nil
}

// Dir is the store's directory, an absolute path.
func (s *Store) Dir() string { return s.dir }

func (s *Store) blobs() string     { return filepath.Join(s.dir, ocispec.ImageBlobsDir, "sha256") }
func (s *Store) ingestDir() string { return filepath.Join(s.dir, "ingest") }
func (s *Store) indexFile() string { return filepath.Join(s.dir, ocispec.ImageIndexFile) }

func (s *Store) blob(d digest.Digest) string { return filepath.Join(s.blobs(), d.Encoded()) }

var (
	nameSyntax   = regexp.MustCompile(`^[a-z0-9]+([._-]+[a-z0-9]+)*(/[a-z0-9]+([._-]+[a-z0-9]+)*)*$`)
	digestSyntax = regexp.MustCompile(`^(sha256:)?([0-9a-f]{6,64})$`)
)

// maxName is the length of the longest name of a box, in bytes.
const maxName = 128

// ValidName returns an error that says what is wrong with name as the name of a
// box: "mybox" and "builtin/debian-12" are good ones.
func ValidName(name string) error {
	if len(name) > maxName || !nameSyntax.MatchString(name) {
		return fmt.Errorf("%.150q is no name for a box: use lower-case letters, digits, \"-\", \".\", \"_\" and \"/\", at most %d", name, maxName)
	}
	return nil
}

// Get returns the box called ref: a name, a digest, or the first six digits or
// more of one. It checks that the box's files are there and have their size, but
// doesn't hash them: Verify does. ErrNotFound if there is no such box; a
// *DamagedError if a file of it is missing.
func (s *Store) Get(ctx context.Context, ref string) (Box, error) {
	records, err := s.readIndex()
	if err != nil {
		return Box{}, err
	}
	r, err := find(records, ref)
	if err != nil {
		return Box{}, err
	}
	b, err := s.load(ctx, r.desc)
	if err != nil {
		return Box{}, fmt.Errorf("reading box %q: %w", ref, err)
	}
	return b, nil
}

// List returns all boxes, those with names first, sorted by name.
func (s *Store) List(ctx context.Context) ([]Entry, error) {
	records, err := s.readIndex()
	if err != nil {
		return nil, err
	}
	entries := make([]Entry, 0, len(records))
	for _, r := range records {
		b, err := s.load(ctx, r.desc)
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		b.Digest = r.desc.Digest
		entries = append(entries, Entry{Box: b, Names: r.names, Origin: r.origin, Damage: err})
	}
	return entries, nil
}

// find picks the record that ref names.
func find(records []record, ref string) (record, error) {
	for _, r := range records {
		if slices.Contains(r.names, ref) {
			return r, nil
		}
	}
	var found []record
	if m := digestSyntax.FindStringSubmatch(ref); m != nil {
		for _, r := range records {
			if strings.HasPrefix(r.desc.Digest.Encoded(), m[2]) {
				found = append(found, r)
			}
		}
	}
	switch len(found) {
	case 0:
		return record{}, fmt.Errorf("box %q: %w", ref, ErrNotFound)
	case 1:
		return found[0], nil
	}
	return record{}, fmt.Errorf("box %q: %d boxes have a digest that begins so; give more of it", ref, len(found))
}

// load reads the manifest and the config of a box and finds its files.
func (s *Store) load(ctx context.Context, desc ocispec.Descriptor) (Box, error) {
	var m ocispec.Manifest
	if err := s.fetch(ctx, desc, &m); err != nil {
		return Box{}, err
	}
	if m.ArtifactType != ArtifactType || m.Config.MediaType != MediaTypeConfig {
		return Box{}, fmt.Errorf("manifest %s is not that of a box but of a %q", desc.Digest, m.ArtifactType)
	}
	b := Box{Digest: desc.Digest, Bytes: desc.Size + m.Config.Size}
	if err := s.fetch(ctx, m.Config, &b.Config); err != nil {
		return Box{}, err
	}
	switch disk.Format(b.Config.Format) {
	case disk.QCOW2, disk.Raw:
	default:
		return Box{}, fmt.Errorf("manifest %s: disk format %q is not known", desc.Digest, b.Config.Format)
	}
	for _, l := range m.Layers {
		f, err := s.stat(l)
		if err != nil {
			return Box{}, err
		}
		b.Bytes += f.Size
		switch l.MediaType {
		case MediaTypeDisk + "+" + b.Config.Format:
			b.Disk = f
		case MediaTypeKernel:
			b.Kernel = f
		case MediaTypeInitrd:
			b.Initrd = f
		default:
			return Box{}, fmt.Errorf("manifest %s: layer of type %q is not known", desc.Digest, l.MediaType)
		}
	}
	if b.Disk == (File{}) {
		return Box{}, fmt.Errorf("manifest %s has no disk", desc.Digest)
	}
	return b, nil
}

// fetch reads a small blob, checks it against its digest, and decodes it.
func (s *Store) fetch(ctx context.Context, desc ocispec.Descriptor, into any) error {
	if _, err := s.stat(desc); err != nil {
		return err
	}
	if desc.Size > maxMetadata {
		return fmt.Errorf("blob %s of %d bytes is too large for metadata", desc.Digest, desc.Size)
	}
	data, err := content.FetchAll(ctx, s.storage, desc)
	if errors.Is(err, content.ErrMismatchedDigest) {
		return &DamagedError{Path: s.blob(desc.Digest), Reason: "the content does not match its digest"}
	}
	if err != nil {
		return fmt.Errorf("reading blob %s: %w", desc.Digest, err)
	}
	if err := json.Unmarshal(data, into); err != nil {
		return fmt.Errorf("reading blob %s: %w", desc.Digest, err)
	}
	return nil
}

// stat finds a blob and checks its size.
func (s *Store) stat(desc ocispec.Descriptor) (File, error) {
	if err := desc.Digest.Validate(); err != nil || desc.Digest.Algorithm() != digest.SHA256 {
		return File{}, fmt.Errorf("blob %.100q: only sha256 digests are known", desc.Digest)
	}
	f := File{Path: s.blob(desc.Digest), Digest: desc.Digest, Size: desc.Size}
	fi, err := os.Stat(f.Path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return File{}, &DamagedError{Path: f.Path, Reason: "the file is missing"}
	case err != nil:
		return File{}, err
	case fi.Size() != desc.Size:
		return File{}, &DamagedError{Path: f.Path, Reason: fmt.Sprintf("the file has %d bytes instead of %d", fi.Size(), desc.Size)}
	}
	return f, nil
}
