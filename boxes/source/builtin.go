// SPDX-License-Identifier: Apache-2.0

package source

import (
	"context"
	"errors"
	"fmt"

	"github.com/labfile/lab/boxes"
)

// builtin finds a built-in box in the store, or has it built.
func (r *Resolver) builtin(ctx context.Context, ref reference, req Request) (Result, error) {
	if req.Checksum != "" {
		return Result{}, withHint("remove the checksum", "a built-in box is built here: there is no file that could have a checksum")
	}
	if req.Pin == "" {
		box, err := r.Store.Get(ctx, builtinPrefix+ref.name)
		if err == nil {
			return Result{Box: box}, nil
		}
		if !errors.Is(err, boxes.ErrNotFound) && !errors.Is(err, boxes.ErrDigest) {
			return Result{}, err
		}
	}
	if req.Offline {
		return Result{}, withHint("run once without --offline", "%w: the box has not been built yet", ErrOffline)
	}
	if r.Builder == nil {
		return Result{}, fmt.Errorf("%w, and nothing here can build it", boxes.ErrNotFound)
	}
	box, err := r.Builder.Build(ctx, ref.name, req.Progress)
	if err != nil {
		return Result{}, err
	}
	if req.Pin != "" && box.Digest != req.Pin {
		return Result{}, &boxes.DigestError{What: "box", Got: box.Digest, Want: req.Pin}
	}
	return Result{Box: box, Fetched: true}, nil
}
