// SPDX-License-Identifier: Apache-2.0

package drift

import (
	"context"
	"slices"

	"github.com/labfile/lab/internal/proxy"
)

// onlyProxies reports whether nothing but lab's own part of a file changed: the proxy
// settings of the host, which are no drift.
func (c *comparison) onlyProxies(ch Change) bool {
	switch {
	case ch.Path != proxy.File:
		return false
	case c.old == nil || c.now == nil: // of lists
		return c.o.Proxies
	}
	return onlyProxies(c.ctx, c.old, c.now, ch)
}

func onlyProxies(ctx context.Context, old, now Side, c Change) bool {
	if c.Op == Replaced {
		return false
	}
	others := func(what string) bool { return what != Content && what != MTime }
	if slices.ContainsFunc(c.What, others) {
		return false
	}
	var texts [2]string
	block := false
	for i, side := range []struct {
		Side
		m *Meta
	}{{old, c.Old}, {now, c.New}} {
		if side.m != nil && side.m.Kind != KindFile {
			return false
		}
		b, why, err := text(ctx, side.Side, c.Path, side.m)
		if why != "" || err != nil {
			return false
		}
		texts[i] = proxy.WithoutBlock(b)
		block = block || proxy.HasBlock(b)
	}
	return block && texts[0] == texts[1]
}
