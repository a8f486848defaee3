// SPDX-License-Identifier: Apache-2.0

package libvirt

import (
	"context"
	"path/filepath"
	"slices"
	"strings"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/providers/local"
)

// inPool are the overlays of a generation as volumes of a pool. They are called as the
// files of a directory would be.
type inPool struct {
	files  *pool
	prefix string
}

func (r *Remote) overlays(g lab.Generation, files *pool) inPool { return inPool{files, r.prefix(g)} }

func (o inPool) name(n int) string { return o.prefix + filepath.Base(local.OverlayPath("", n)) }

func (o inPool) path(n int) string { return o.files.path(o.name(n)) }

func (o inPool) number(path string) (int, bool) {
	name, ok := strings.CutPrefix(path, o.files.path(o.prefix))
	if !ok {
		return 0, false
	}
	return local.OverlayOf("/", "/"+name)
}

func (o inPool) list(ctx context.Context) ([]int, error) {
	there, err := o.files.list(ctx)
	if err != nil {
		return nil, err
	}
	var own []int
	for name := range there {
		if n, ok := o.number(o.files.path(name)); ok {
			own = append(own, n)
		}
	}
	if len(own) == 0 {
		return nil, &errMissing{o.path(0)}
	}
	slices.Sort(own)
	return own, nil
}

// errMissing says that a machine has no disk.
type errMissing struct{ path string }

func (e *errMissing) Error() string { return e.path + " is missing" }

func (o inPool) add(ctx context.Context, n int, size lab.Bytes) error {
	return o.files.make(ctx, overlayVolume(o.name(n), size))
}

func (o inPool) remove(ctx context.Context, n int) error { return o.files.remove(ctx, o.name(n)) }

// forget does nothing: what is fetched of an overlay forgets then.
func (o inPool) forget(int) error { return nil }
