// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"os"
	"strings"

	"github.com/labfile/lab/boxes"
	"github.com/labfile/lab/boxes/build"
	"github.com/labfile/lab/boxes/source"
)

// builder puts the boxes that build makes into the store.
type builder struct {
	store *boxes.Store
	tool  *build.Builder
	dir   string // of what is under way; "lab gc" removes what a crash leaves there
}

var _ source.Builder = (*builder)(nil)

// Build implements source.Builder.
func (b *builder) Build(ctx context.Context, name string, progress source.Progress) (boxes.Box, error) {
	name = strings.TrimPrefix(name, "builtin/")
	if err := os.MkdirAll(b.dir, 0o700); err != nil {
		return boxes.Box{}, fmt.Errorf("building box %q: %w", name, err)
	}
	dir, err := os.MkdirTemp(b.dir, "build-"+name+"-*")
	if err != nil {
		return boxes.Box{}, fmt.Errorf("building box %q: %w", name, err)
	}
	defer os.RemoveAll(dir)
	a, err := b.tool.BuildFiles(ctx, name, dir, func(p build.Progress) {
		progress("building: "+p.Stage, int64(p.Done), int64(p.Total))
	})
	if err != nil {
		return boxes.Box{}, err
	}
	return b.store.Ingest(ctx, boxes.Ingredients{
		Config: a.Config, Disk: a.Disk, Kernel: a.Kernel, Initrd: a.Initrd, Move: true,
		Origin:   "builtin/" + name,
		Progress: func(done, total int64) { progress("storing", done, total) },
	}, "builtin/"+name)
}
