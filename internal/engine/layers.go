// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"

	"github.com/labfile/lab/internal/bake"
	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/internal/ledger"
	"github.com/labfile/lab/providers"
)

func (h *Host) layers() *bake.Store { return bake.NewStore(h.Dirs.Layers()) }

// layered returns what each machine is to be born from, by machine, given the boxes
// by name: the box, and the layers on top of it as far as they are baked.
func (s *session) layered(want *lab.Lab, boxes map[string]Image) (map[lab.Name]Image, error) {
	images := map[lab.Name]Image{}
	keys := bake.NewKeys(filepath.Dir(want.File))
	// What is shared must fit on the smallest disk of those that share it.
	limits := map[string]lab.Bytes{}
	var errs []error
	for _, m := range want.Machines {
		img, ok := boxes[m.Box]
		if !ok {
			continue
		}
		if len(m.Provision) > 0 && img.Vagrant {
			errs = append(errs, fmt.Errorf("machine %q: provision steps cannot be baked into a Vagrant box: its images would let in the key of one lab; use a cloud image or a built-in box", m.Name))
			continue
		}
		if len(m.Provision) > 0 {
			if _, ok := s.provider.(providers.Freezer); !ok {
				return nil, fmt.Errorf("machine %q: %w: provision needs a provider that can freeze disks, which %q cannot", m.Name, providers.ErrIncapable, s.provider.Name())
			}
			layers, err := keys.Layers(img.Box, m.Provision)
			if err != nil {
				errs = append(errs, fmt.Errorf("machine %q: %w", m.Name, err))
				continue
			}
			img.Layers, img.Digest = layers, layers[len(layers)-1].Key
			limit := cmp.Or(m.Disk, img.Size)
			for _, l := range layers {
				if have, ok := limits[l.Key]; !ok || limit < have {
					limits[l.Key] = limit
				}
			}
		}
		images[m.Name] = img
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	store := s.host.layers()
	for name, img := range images {
		for _, l := range img.Layers {
			img.limits = append(img.limits, limits[l.Key])
		}
		images[name] = img.on(store.Chain(img.Box, img.Layers, img.limits))
	}
	return images, nil
}

// on returns the image with the layers that are stored.
func (img Image) on(c bake.Chain) Image {
	img.Missing = len(img.Layers) - c.Count
	img.Image.Digest, img.Image.Layers = img.Digest, c.Disks
	if c.Count > 0 {
		img.Size = c.Size
	}
	return img
}

// stored returns the image of a generation that was recorded.
func (h *Host) stored(img Image, layers []lab.Layer) (Image, error) {
	if len(layers) == 0 {
		return img, nil
	}
	img.Layers, img.Digest = layers, layers[len(layers)-1].Key
	img = img.on(h.layers().Chain(img.Box, layers, nil))
	if img.Missing > 0 {
		return img, fmt.Errorf("the layer of %q is not stored any more; \"lab up\" bakes what the Labfile says", layers[len(layers)-img.Missing].Text)
	}
	return img, nil
}

// PruneLayers removes the layers that no recorded generation of any lab, no machine,
// and no image in keep is made of. With dryRun it only says which.
func (h *Host) PruneLayers(ctx context.Context, keep []string, dryRun bool) ([]bake.Removed, error) {
	used, err := h.BoxesInUse(ctx)
	if err != nil {
		return nil, err
	}
	needed := map[string]bool{}
	for _, key := range slices.Concat(used, keep) {
		needed[key] = true
	}
	ids, err := h.ids(ctx)
	if err != nil {
		return nil, err
	}
	for _, id := range ids {
		records, err := h.Lab(id).book.Read()
		var damaged *ledger.CorruptError
		if err != nil && !errors.As(err, &damaged) {
			return nil, err
		}
		for _, r := range records {
			if r.Type != ledger.MachineCreate {
				continue
			}
			c, err := ledger.CreateOf(r)
			if err != nil {
				return nil, err
			}
			for _, l := range c.Layers {
				needed[l.Key] = true
			}
		}
	}
	return h.layers().Prune(func(key string) bool { return needed[key] }, dryRun)
}

// Images returns the digests of what the machines of a Labfile are to be born from,
// and of every layer below.
func (l *Lab) Images(ctx context.Context, want *lab.Lab, o UpOptions) ([]string, error) {
	s := &session{Lab: l, opt: o.Options}
	if err := s.look(ctx, want); err != nil {
		return nil, err
	}
	boxes, err := s.images(ctx, want, o)
	if err != nil {
		return nil, err
	}
	images, err := s.layered(want, boxes)
	if err != nil {
		return nil, err
	}
	var keys []string
	for _, img := range images {
		for _, layer := range img.Layers {
			keys = append(keys, layer.Key)
		}
	}
	return keys, nil
}
