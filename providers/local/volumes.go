// SPDX-License-Identifier: Apache-2.0

package local

import (
	"context"
	"fmt"
	"slices"

	"github.com/labfile/lab/providers"
)

// PushVolume makes a machine write to another file of a volume, as
// providers.VolumePusher says. The caller has checked v. running tells whether the machine runs; push puts the
// file on top of what it has of the i-th volume, whatever the definition says of that;
// save keeps the definition, from which on the next start goes by it.
func (d *Directory) PushVolume(
	ctx context.Context, v providers.Volume,
	running func(context.Context) (bool, error), push func(ctx context.Context, i int) error, save func(context.Context, Definition) error,
) error {
	held, err := d.Lock(ctx)
	if err != nil {
		return err
	}
	defer held.Close()
	i := slices.IndexFunc(d.Def.Volumes, func(w Volume) bool { return w.Name == v.Name && !w.ReadOnly })
	if i < 0 {
		return fmt.Errorf("%w: it writes to no volume of that name", providers.ErrNotFound)
	}
	runs, err := running(ctx)
	if err != nil {
		return err
	}
	if !runs {
		return providers.ErrNotRunning
	}
	if err := push(ctx, i); err != nil {
		return err
	}
	d.Def.Volumes[i] = Volume(v)
	return save(ctx, d.Def)
}
