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
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/labfile/lab/boxes/disk"
	"github.com/labfile/lab/internal/fsutil"
)

// Ingredients are what a box is made of.
type Ingredients struct {
	Config Config // Format and Size are filled in from the disk
	Disk   string // path of a qcow2 or raw image
	Kernel string // path; empty to boot from the disk
	Initrd string // path; empty if there is none

	// Move allows the files to be moved into the store rather than copied, if
	// they are on the same file system. They are gone after a success, and as
	// they were after a failure. Nobody may write to them any more.
	Move bool

	Checksum digest.Digest // that the disk must have, sha256 or sha512; empty if any will do
	Expect   digest.Digest // that the box must have; empty if any will do
	Origin   string        // where the box came from, for people to read; no secrets

	// Progress is told how many bytes of all files are done; it may be nil. It
	// is called by one goroutine at a time, a thousand times for a gibibyte.
	Progress func(done, total int64)
}

// Ingest makes a box and gives it the names. The disk is inspected first, and
// refused with ErrUnsafe unless it stands on its own. A box whose digests are not
// those expected is refused with a *DigestError. After an error, the end of ctx
// included, the store is as it was before.
//
// Equal ingredients make equal boxes: their content is kept once. Ingesting a
// box again replaces its files, so that it heals a damaged one.
func (s *Store) Ingest(ctx context.Context, in Ingredients, names ...string) (Box, error) {
	for _, name := range names {
		if err := ValidName(name); err != nil {
			return Box{}, err
		}
	}
	st, err := s.stage(ctx)
	if err != nil {
		return Box{}, fmt.Errorf("adding box: %w", err)
	}
	defer st.close()
	desc, err := st.make(ctx, in)
	if err != nil {
		return Box{}, err
	}
	if in.Expect != "" && in.Expect != desc.Digest {
		return Box{}, fmt.Errorf("adding box: %w", &DigestError{What: "box", Got: desc.Digest, Want: in.Expect})
	}
	err = s.locked(ctx, func() error {
		records, err := s.readIndex()
		if err != nil {
			return err
		}
		r := recordOf(&records, desc)
		if in.Origin != "" {
			r.origin = in.Origin
		}
		for _, name := range names {
			setName(records, desc.Digest, name)
		}
		if err := st.publish(); err != nil {
			st.retract()
			return err
		}
		if err := s.writeIndex(records); err != nil {
			st.retract()
			return err
		}
		return nil
	})
	if err != nil {
		return Box{}, fmt.Errorf("adding box: %w", err)
	}
	if in.Move {
		for _, path := range []string{in.Disk, in.Kernel, in.Initrd} {
			if path != "" {
				os.Remove(path)
			}
		}
	}
	return s.load(ctx, desc)
}

// stage is where a box is put together before the store knows of it: a directory
// of its own, locked for as long as its process lives.
type stage struct {
	store *Store
	dir   string
	lock  *os.File
	files map[digest.Digest]string // what is to be published
	fresh []string                 // what was published and is new to the store
}

func (s *Store) stage(ctx context.Context) (*stage, error) {
	st := &stage{store: s, files: map[digest.Digest]string{}}
	err := s.locked(ctx, func() error {
		s.sweep()
		var err error
		if st.dir, err = os.MkdirTemp(s.ingestDir(), "box-*"); err != nil {
			return err
		}
		if st.lock, err = os.Open(st.dir); err != nil {
			return err
		}
		return flock(st.lock, unix.LOCK_EX)
	})
	if err != nil {
		return nil, err
	}
	return st, nil
}

func (st *stage) close() {
	os.RemoveAll(st.dir)
	st.lock.Close()
}

// sweep removes what killed processes left behind: stages that nobody holds a
// lock on, and single files, which are written under the store's lock only. The
// store must be locked. Best effort: what stays is swept another time.
func (s *Store) sweep() (freed int64) {
	entries, err := os.ReadDir(s.ingestDir())
	if err != nil {
		return 0
	}
	for _, e := range entries {
		path := filepath.Join(s.ingestDir(), e.Name())
		f, err := os.Open(path)
		if err != nil {
			continue
		}
		if flock(f, unix.LOCK_EX) == nil {
			freed += usage(path)
			os.RemoveAll(path)
		}
		f.Close()
	}
	return freed
}

// usage is the size of all files below path, in bytes.
func usage(path string) (n int64) {
	filepath.WalkDir(path, func(_ string, e fs.DirEntry, err error) error {
		if err == nil && e.Type().IsRegular() {
			if fi, err := e.Info(); err == nil {
				n += fi.Size()
			}
		}
		return nil
	})
	return n
}

// make brings all files of a box into the stage and returns the descriptor of
// its manifest. The manifest depends on nothing but the ingredients.
func (st *stage) make(ctx context.Context, in Ingredients) (ocispec.Descriptor, error) {
	parts := []struct{ kind, path, mediaType string }{
		{"disk", in.Disk, ""},
		{"kernel", in.Kernel, MediaTypeKernel},
		{"initrd", in.Initrd, MediaTypeInitrd},
	}
	var c copier
	c.progress, c.move = in.Progress, in.Move
	var sources []*os.File
	defer func() {
		for _, f := range sources {
			f.Close()
		}
	}()
	for _, p := range parts {
		if p.path == "" && p.kind != "disk" {
			sources = append(sources, nil)
			continue
		}
		f, size, err := openRegular(p.path)
		if err != nil {
			return ocispec.Descriptor{}, fmt.Errorf("adding %s: %w", p.kind, err)
		}
		sources = append(sources, f)
		c.total += size
	}
	// A look at the original saves copying what will be refused.
	if _, err := inspect(sources[0]); err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("adding disk %s: %w", in.Disk, err)
	}

	m := ocispec.Manifest{
		Versioned:    specs.Versioned{SchemaVersion: 2},
		MediaType:    ocispec.MediaTypeImageManifest,
		ArtifactType: ArtifactType,
		Layers:       []ocispec.Descriptor{},
	}
	config := in.Config
	config.Created = config.Created.UTC().Truncate(time.Second)
	for i, p := range parts {
		if sources[i] == nil {
			continue
		}
		dst := filepath.Join(st.dir, p.kind)
		var checksum digest.Digest
		if p.kind == "disk" {
			checksum = in.Checksum
		}
		d, size, err := c.copy(ctx, dst, sources[i], checksum)
		if err != nil {
			return ocispec.Descriptor{}, fmt.Errorf("adding %s %s: %w", p.kind, p.path, err)
		}
		if p.kind == "disk" {
			// The copy is what machines will use, and nobody else writes to it:
			// what was found out about the original may no longer hold.
			info, err := inspectPath(dst)
			if err != nil {
				return ocispec.Descriptor{}, fmt.Errorf("adding disk %s: %w", p.path, err)
			}
			config.Format, config.Size = string(info.Format), info.VirtualSize
			p.mediaType = MediaTypeDisk + "+" + config.Format
		}
		st.files[d] = dst
		m.Layers = append(m.Layers, ocispec.Descriptor{MediaType: p.mediaType, Digest: d, Size: size})
	}
	var err error
	if m.Config, err = st.metadata("config", MediaTypeConfig, config); err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("adding config: %w", err)
	}
	desc, err := st.metadata("manifest", m.MediaType, m)
	if err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("adding manifest: %w", err)
	}
	desc.ArtifactType = ArtifactType
	return desc, nil
}

// metadata writes v as a small blob into the stage.
func (st *stage) metadata(name, mediaType string, v any) (ocispec.Descriptor, error) {
	data, err := json.Marshal(v)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	if len(data) > maxMetadata {
		return ocispec.Descriptor{}, fmt.Errorf("%d bytes are more than the %d allowed", len(data), maxMetadata)
	}
	desc := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(data), Size: int64(len(data))}
	path := filepath.Join(st.dir, name)
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	defer f.Close()
	if _, err := f.Write(data); err != nil {
		return ocispec.Descriptor{}, err
	}
	if err := f.Sync(); err != nil {
		return ocispec.Descriptor{}, err
	}
	st.files[desc.Digest] = path
	return desc, f.Close()
}

// publish moves the staged files to where the store keeps them. They are on the
// disk already, so that the index never names what a power cut can take away.
// The store must be locked.
func (st *stage) publish() error {
	for d, path := range st.files {
		if err := os.Chmod(path, 0o444); err != nil {
			return err
		}
		blob := st.store.blob(d)
		_, err := os.Lstat(blob)
		if err := os.Rename(path, blob); err != nil {
			return err
		}
		if errors.Is(err, fs.ErrNotExist) {
			st.fresh = append(st.fresh, blob)
		}
	}
	return fsutil.SyncDir(st.store.blobs())
}

// retract undoes publish as far as it came: after it, no file is in the store
// that no index names. Files that were there before have equal content.
func (st *stage) retract() {
	for _, blob := range st.fresh {
		os.Remove(blob)
	}
}

func inspect(f *os.File) (disk.Info, error) {
	fi, err := f.Stat()
	if err != nil {
		return disk.Info{}, err
	}
	return disk.Inspect(f, fi.Size())
}

func inspectPath(path string) (disk.Info, error) {
	f, err := os.Open(path)
	if err != nil {
		return disk.Info{}, err
	}
	defer f.Close()
	return inspect(f)
}

// openRegular opens a file that an ingredient names, and returns its size in bytes.
func openRegular(path string) (*os.File, int64, error) {
	if path == "" {
		return nil, 0, errors.New("no file was named")
	}
	f, err := fsutil.OpenRegular(path)
	if err != nil {
		return nil, 0, err
	}
	fi, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, 0, err
	}
	return f, fi.Size(), nil
}
