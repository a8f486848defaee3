// SPDX-License-Identifier: Apache-2.0

package boxes

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/labfile/lab/internal/fsutil"
)

// annotationOrigin tells, in the index, where a box came from. It is no part of
// the box: the same box may come from several places.
const annotationOrigin = "dev.labfile.box.origin"

// record is what the index says of one manifest.
type record struct {
	desc   ocispec.Descriptor // without annotations
	names  []string           // sorted
	origin string
}

// readIndex returns the records, those with names first, sorted by name.
func (s *Store) readIndex() ([]record, error) {
	data, err := os.ReadFile(s.indexFile())
	if err != nil {
		return nil, fmt.Errorf("reading the index of the box store: %w", err)
	}
	var index ocispec.Index
	if err := json.Unmarshal(data, &index); err != nil {
		return nil, fmt.Errorf("reading the index of the box store, %s: %w", s.indexFile(), err)
	}
	var records []record
	for _, d := range index.Manifests {
		if err := d.Digest.Validate(); err != nil {
			return nil, fmt.Errorf("reading the index of the box store, %s: digest %.100q: %w", s.indexFile(), d.Digest, err)
		}
		name, origin := d.Annotations[ocispec.AnnotationRefName], d.Annotations[annotationOrigin]
		r := recordOf(&records, d)
		if name != "" && !slices.Contains(r.names, name) {
			r.names = append(r.names, name)
		}
		if origin != "" {
			r.origin = origin
		}
	}
	sortRecords(records)
	return records, nil
}

// recordOf returns the record of desc, which it adds if there is none.
func recordOf(records *[]record, desc ocispec.Descriptor) *record {
	i := slices.IndexFunc(*records, func(r record) bool { return r.desc.Digest == desc.Digest })
	if i < 0 {
		desc.Annotations = nil
		i = len(*records)
		*records = append(*records, record{desc: desc})
	}
	return &(*records)[i]
}

func sortRecords(records []record) {
	for _, r := range records {
		slices.Sort(r.names)
	}
	slices.SortFunc(records, func(a, b record) int {
		switch {
		case len(a.names) == 0 && len(b.names) == 0:
			return strings.Compare(string(a.desc.Digest), string(b.desc.Digest))
		case len(a.names) == 0:
			return 1
		case len(b.names) == 0:
			return -1
		}
		return strings.Compare(a.names[0], b.names[0])
	})
}

// setName gives name to the box that is d; whoever had it loses it.
func setName(records []record, d digest.Digest, name string) {
	for i := range records {
		r := &records[i]
		r.names = slices.DeleteFunc(r.names, func(n string) bool { return n == name })
		if r.desc.Digest == d {
			r.names = append(r.names, name)
		}
	}
}

// writeIndex replaces the index: one descriptor for each name of a manifest, or
// one with no name. The store must be locked.
func (s *Store) writeIndex(records []record) error {
	sortRecords(records)
	index := ocispec.Index{
		Versioned: specs.Versioned{SchemaVersion: 2},
		MediaType: ocispec.MediaTypeImageIndex,
		Manifests: []ocispec.Descriptor{},
	}
	for _, r := range records {
		for _, name := range r.names {
			index.Manifests = append(index.Manifests, r.descriptor(name))
		}
		if len(r.names) == 0 {
			index.Manifests = append(index.Manifests, r.descriptor(""))
		}
	}
	data, err := json.Marshal(index)
	if err != nil {
		return err
	}
	if err := s.writeFile(s.indexFile(), data); err != nil {
		return fmt.Errorf("writing the index of the box store: %w", err)
	}
	return nil
}

func (r record) descriptor(name string) ocispec.Descriptor {
	d := r.desc
	annotations := map[string]string{}
	if name != "" {
		annotations[ocispec.AnnotationRefName] = name
	}
	if r.origin != "" {
		annotations[annotationOrigin] = r.origin
	}
	if len(annotations) > 0 {
		d.Annotations = annotations
	}
	return d
}

// Tag gives the box that ref names another name; a box that had the name loses
// it, but stays in the store.
func (s *Store) Tag(ctx context.Context, ref, name string) error {
	if err := ValidName(name); err != nil {
		return err
	}
	return s.change(ctx, func(records []record) error {
		r, err := find(records, ref)
		if err == nil {
			setName(records, r.desc.Digest, name)
		}
		return err
	})
}

// Remove takes a name away or, if ref is a digest, all names of that box. The
// box itself stays until Prune finds that nothing needs it. ErrNotFound if there
// is no such box.
func (s *Store) Remove(ctx context.Context, ref string) error {
	return s.change(ctx, func(records []record) error {
		found, err := find(records, ref)
		if err != nil {
			return err
		}
		r := recordOf(&records, found.desc)
		if slices.Contains(r.names, ref) {
			r.names = slices.DeleteFunc(r.names, func(n string) bool { return n == ref })
		} else {
			r.names = nil
		}
		return nil
	})
}

// change reads the index, lets f change it, and writes it, under the lock.
func (s *Store) change(ctx context.Context, f func([]record) error) error {
	return s.locked(ctx, func() error {
		records, err := s.readIndex()
		if err != nil {
			return err
		}
		if err := f(records); err != nil {
			return err
		}
		return s.writeIndex(records)
	})
}

// locked runs f while this process alone may change the store. Whoever holds the
// lock does so for a moment only: content is written outside of it.
func (s *Store) locked(ctx context.Context, f func() error) error {
	if err := os.MkdirAll(s.ingestDir(), 0o700); err != nil {
		return err
	}
	lock, err := os.OpenFile(filepath.Join(s.dir, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	defer lock.Close() // unlocks
	for wait := time.Millisecond; ; wait = min(2*wait, 50*time.Millisecond) {
		err := flock(lock, unix.LOCK_EX)
		if err == nil {
			return f()
		}
		if err != unix.EWOULDBLOCK {
			return fmt.Errorf("locking the box store: %w", err)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("waiting for the lock of the box store: %w", ctx.Err())
		case <-time.After(wait):
		}
	}
}

// flock locks an open file without waiting; EWOULDBLOCK if another has it.
func flock(f *os.File, how int) error {
	for {
		if err := unix.Flock(int(f.Fd()), how|unix.LOCK_NB); err != unix.EINTR {
			return err
		}
	}
}

// writeFile replaces path whole or not at all, and durably.
func (s *Store) writeFile(path string, data []byte) error {
	d, err := fsutil.NewDraftIn(s.ingestDir(), "file-", path, 0o600)
	if err != nil {
		return err
	}
	defer d.Drop()
	if _, err := d.Write(data); err != nil {
		return err
	}
	return d.Commit()
}
