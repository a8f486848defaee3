// SPDX-License-Identifier: Apache-2.0

package source

import (
	"context"
	"errors"
	"os"
	"path/filepath"

	"github.com/labfile/lab/boxes"
)

// stored finds a box that the store has already, by name or digest.
func (r *Resolver) stored(ctx context.Context, ref reference, req Request) (Result, error) {
	if req.Checksum != "" {
		return Result{}, withHint("remove the checksum: a box in the store is checked by its digest", "%q names a box, not a file that could have a checksum", ref.name)
	}
	box, err := r.Store.Get(ctx, ref.name)
	if errors.Is(err, boxes.ErrNotFound) {
		hint := "see which boxes there are: lab box list"
		if _, statErr := os.Stat(filepath.Join(req.BaseDir, ref.name)); statErr == nil {
			hint = "if the file is meant, write ./" + ref.name
		}
		return Result{}, hinted{err, hint}
	}
	if err != nil {
		return Result{}, err
	}
	if req.Pin != "" && box.Digest != req.Pin {
		return Result{}, &boxes.DigestError{What: "box", Got: box.Digest, Want: req.Pin}
	}
	return Result{Box: box}, nil
}
