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
	case ch.Path != proxy.File, !mayBeOnlyProxies(ch):
		return false
	case c.old == nil || c.now == nil: // of lists
		return c.o.Proxies
	}
	return onlyProxies(c.ctx, c.old, c.now, ch)
}

// mayBeOnlyProxies reports whether a change is one that lab makes: to the content, not to
// the file's kind, owner or mode.
func mayBeOnlyProxies(c Change) bool {
	others := func(what string) bool { return what != Content && what != MTime }
	return c.Op != Replaced && !slices.ContainsFunc(c.What, others)
}

func onlyProxies(ctx context.Context, old, now Side, c Change) bool {
	if !mayBeOnlyProxies(c) {
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
