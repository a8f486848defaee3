// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/providers"
	"github.com/labfile/lab/providers/local"
)

// OpenLog opens a log of the present or last run. A reader that is kept open
// across a restart goes on with the new run's log.
func (p *Provider) OpenLog(ctx context.Context, g lab.Generation, l providers.Log) (io.ReadCloser, error) {
	fail := func(err error) (io.ReadCloser, error) {
		return nil, fmt.Errorf("opening the %s log of machine %q: %w", l, g, err)
	}
	if err := ctx.Err(); err != nil {
		return fail(err)
	}
	if err := local.CheckGeneration(g); err != nil {
		return fail(err)
	}
	name := ""
	switch l {
	case providers.LogConsole:
		name = local.FileConsole
	case providers.LogHypervisor:
		name = local.FileLog
	default:
		return fail(errors.New("there is no such log"))
	}
	dir := p.cfg.Dirs.Generation(g)
	r, err := local.OpenLog(dir, filepath.Join(dir, name))
	if err != nil {
		return fail(err)
	}
	return r, nil
}

// TrimLogs shortens each log that is longer than limit to its last half limit
// bytes. QEMU's logs grow without bound, and a guest decides how fast; whoever
// watches a machine calls this now and then. What a guest prints in the instant
// of trimming may be lost. ErrNotFound if there is no such generation.
func (p *Provider) TrimLogs(ctx context.Context, g lab.Generation, limit lab.Bytes) error {
	if err := p.trimLogs(ctx, g, int64(limit)); err != nil {
		return fmt.Errorf("trimming the logs of machine %q: %w", g, err)
	}
	return nil
}

func (p *Provider) trimLogs(ctx context.Context, g lab.Generation, limit int64) error {
	if err := local.CheckGeneration(g); err != nil {
		return err
	}
	dir := p.cfg.Dirs.Generation(g)
	return local.TrimLogs(ctx, dir, limit, filepath.Join(dir, local.FileConsole), filepath.Join(dir, local.FileLog))
}
