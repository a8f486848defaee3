// SPDX-License-Identifier: Apache-2.0

package source

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/labfile/lab/boxes"
)

// local copies a disk from this host's file system into the store.
func (r *Resolver) local(ctx context.Context, ref reference, req Request) (Result, error) {
	sum, err := r.checksum(ctx, req, ref.path)
	if err != nil {
		return Result{}, err
	}
	box, err := r.ingest(ctx, req, boxes.Ingredients{Disk: ref.path, Checksum: sum, Origin: ref.path})
	if err != nil {
		return Result{}, err
	}
	if sum == "" {
		sum = sourceOf(box)
	}
	return Result{Box: box, Checksum: sum.String(), Fetched: true}, nil
}

// ingest adds a disk that comes without metadata.
func (r *Resolver) ingest(ctx context.Context, req Request, in boxes.Ingredients) (boxes.Box, error) {
	in.Config, in.Expect = req.config(), req.Pin
	in.Progress = func(done, total int64) { req.Progress("adding to the store", done, total) }
	done, err := r.vagrant(ctx, req, &in)
	if err != nil {
		return boxes.Box{}, err
	}
	defer done()
	return r.Store.Ingest(ctx, in)
}

func (req Request) config() boxes.Config {
	if req.Config != nil {
		return *req.Config
	}
	return DefaultConfig()
}

// absolute resolves a path as a Labfile or a user writes it.
func absolute(path, baseDir string) (string, error) {
	if rest, ok := strings.CutPrefix(path, "~/"); ok {
		home, err := os.UserHomeDir()
		if err != nil {
			return "", fmt.Errorf("resolving %q: %w", path, err)
		}
		return filepath.Join(home, rest), nil
	}
	if filepath.IsAbs(path) {
		return filepath.Clean(path), nil
	}
	if !filepath.IsAbs(baseDir) {
		return "", errors.New("a relative path was given, but nothing that it is relative to")
	}
	return filepath.Join(baseDir, path), nil
}
