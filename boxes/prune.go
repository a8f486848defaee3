// SPDX-License-Identifier: Apache-2.0

package boxes

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"oras.land/oras-go/v2/content"
)

// Pruned is what Prune removed.
type Pruned struct {
	Boxes []digest.Digest
	Bytes int64
}

// Prune removes the boxes that have no name and that keep doesn't hold on to, and
// then every file that no remaining box needs. A box that a machine was born
// from is the backing file of that machine's disk: keep must return true for the
// digest of every such box. Keep may be nil if there are no machines. Nothing is
// removed if the manifest of a box that stays cannot be read.
func (s *Store) Prune(ctx context.Context, keep func(digest.Digest) bool) (Pruned, error) {
	var pruned Pruned
	err := s.locked(ctx, func() error {
		records, err := s.readIndex()
		if err != nil {
			return err
		}
		var kept []record
		needed := map[string]bool{}
		for _, r := range records {
			if len(r.names) == 0 && (keep == nil || !keep(r.desc.Digest)) {
				pruned.Boxes = append(pruned.Boxes, r.desc.Digest)
				continue
			}
			kept = append(kept, r)
			if err := s.mark(ctx, r.desc, needed); err != nil {
				return err
			}
		}
		// The index goes first: a file too many is harmless, one too few is not.
		if len(pruned.Boxes) > 0 {
			if err := s.writeIndex(kept); err != nil {
				return err
			}
		}
		pruned.Bytes += s.sweep()
		freed, err := s.removeExcept(ctx, needed)
		pruned.Bytes += freed
		return err
	})
	if err != nil {
		return pruned, fmt.Errorf("pruning boxes: %w", err)
	}
	return pruned, nil
}

// mark adds the blob and all that it refers to. If it cannot be read, nobody
// knows what it needs, and nothing must be removed.
func (s *Store) mark(ctx context.Context, desc ocispec.Descriptor, needed map[string]bool) error {
	needed[desc.Digest.Encoded()] = true
	next, err := content.Successors(ctx, s.storage, desc)
	if err != nil {
		return fmt.Errorf("reading what %s needs: %w", desc.Digest, err)
	}
	for _, d := range next {
		if needed[d.Digest.Encoded()] {
			continue
		}
		if err := s.mark(ctx, d, needed); err != nil {
			return err
		}
	}
	return nil
}

func (s *Store) removeExcept(ctx context.Context, needed map[string]bool) (freed int64, err error) {
	entries, err := os.ReadDir(s.blobs())
	if err != nil {
		return 0, err
	}
	for _, e := range entries {
		if needed[e.Name()] || !e.Type().IsRegular() {
			continue
		}
		if ctx.Err() != nil {
			return freed, ctx.Err()
		}
		fi, err := e.Info()
		if err != nil {
			return freed, err
		}
		if err := os.Remove(filepath.Join(s.blobs(), e.Name())); err != nil {
			return freed, err
		}
		freed += fi.Size()
	}
	return freed, nil
}

// Verify hashes every file of the boxes that refs name, or of all boxes, and
// returns all that is wrong with them, joined: a *DamagedError for each file
// that is missing or is not what its digest promises. Progress may be nil.
func (s *Store) Verify(ctx context.Context, progress func(done, total int64), refs ...string) error {
	entries, err := s.List(ctx)
	if err != nil {
		return err
	}
	if len(refs) > 0 {
		records, err := s.readIndex()
		if err != nil {
			return err
		}
		wanted := map[digest.Digest]bool{}
		for _, ref := range refs {
			r, err := find(records, ref)
			if err != nil {
				return err
			}
			wanted[r.desc.Digest] = true
		}
		var chosen []Entry
		for _, e := range entries {
			if wanted[e.Digest] {
				chosen = append(chosen, e)
			}
		}
		entries = chosen
	}
	var problems []error
	var files []File
	var total int64
	seen := map[digest.Digest]bool{}
	for _, e := range entries {
		if e.Damage != nil {
			problems = append(problems, fmt.Errorf("box %s: %w", e.title(), e.Damage))
			continue
		}
		// Listing has hashed the manifest and the config.
		for _, f := range []File{e.Disk, e.Kernel, e.Initrd} {
			if f != (File{}) && !seen[f.Digest] {
				seen[f.Digest] = true
				files = append(files, f)
				total += f.Size
			}
		}
	}
	broken := map[digest.Digest]error{}
	var done int64
	for _, f := range files {
		err := verifyFile(ctx, f, func(n int) {
			done += int64(n)
			if progress != nil {
				progress(done, total)
			}
		})
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil {
			broken[f.Digest] = err
		}
	}
	for _, e := range entries {
		for _, f := range []File{e.Disk, e.Kernel, e.Initrd} {
			if err := broken[f.Digest]; err != nil {
				problems = append(problems, fmt.Errorf("box %s: %w", e.title(), err))
			}
		}
	}
	return errors.Join(problems...)
}

// title is what a message calls the box.
func (e Entry) title() string {
	if len(e.Names) > 0 {
		return fmt.Sprintf("%q", e.Names[0])
	}
	return e.Digest.String()
}

func verifyFile(ctx context.Context, file File, progress func(n int)) error {
	f, err := os.Open(file.Path)
	if err != nil {
		return &DamagedError{Path: file.Path, Reason: err.Error()}
	}
	defer f.Close()
	sum := sha256.New()
	buf := make([]byte, hashChunk)
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		n, err := f.Read(buf)
		sum.Write(buf[:n]) // a hash never fails
		progress(n)
		if err == io.EOF {
			break
		}
		if err != nil {
			return &DamagedError{Path: file.Path, Reason: err.Error()}
		}
	}
	if digest.NewDigest(digest.SHA256, sum) != file.Digest {
		return &DamagedError{Path: file.Path, Reason: "the content does not match its digest"}
	}
	return nil
}
