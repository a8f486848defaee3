// SPDX-License-Identifier: Apache-2.0

package labfile

import (
	"slices"

	"gopkg.in/yaml.v3"
)

// maxNodes bounds how many values a file may have once its aliases are written out:
// with them a small file can be an enormous one.
const maxNodes = 1 << 17

// aliases writes out what YAML has for sharing values: aliases of anchors, and merges.
// Each value keeps the place at which it stands in the file.
type aliases struct {
	*report
	left int          // nodes that may still be made
	open []*yaml.Node // the anchors that are being written out
}

// writeOut returns the document n without aliases and merges, or nil if that is too
// much; problems are noted.
func writeOut(r *report, n *yaml.Node) *yaml.Node {
	a := &aliases{report: r, left: maxNodes}
	out := a.copy(n)
	if a.left < 0 {
		r.add(place{line: n.Line, column: n.Column}, "more than %d values, once its YAML aliases are written out", maxNodes)
		return nil
	}
	return out
}

func (a *aliases) copy(n *yaml.Node) *yaml.Node {
	if a.left--; a.left < 0 {
		return n
	}
	if n.Kind == yaml.AliasNode {
		if slices.Contains(a.open, n.Alias) {
			a.add(place{line: n.Line, column: n.Column}, "the YAML alias *%s stands within its own anchor", shorten(n.Value))
			return &yaml.Node{Kind: yaml.ScalarNode, Tag: "!!null", Line: n.Line, Column: n.Column}
		}
		return a.copy(n.Alias)
	}
	if n.Anchor != "" {
		a.open = append(a.open, n)
		defer func() { a.open = a.open[:len(a.open)-1] }()
	}
	out := *n
	out.Anchor, out.Content = "", nil
	for _, c := range n.Content {
		if a.left < 0 {
			return n
		}
		out.Content = append(out.Content, a.copy(c))
	}
	if n.Kind == yaml.MappingNode {
		a.merge(&out)
	}
	return &out
}

// isMerge reports whether a key is that of a merge: << without quotes.
func isMerge(key *yaml.Node) bool {
	return key.Kind == yaml.ScalarNode && key.Value == "<<" && key.Style&(yaml.SingleQuotedStyle|yaml.DoubleQuotedStyle|yaml.TaggedStyle) == 0
}

// merge puts what "<<" names into a mapping. The mapping's own keys come first, and then
// those of the first that is named.
func (a *aliases) merge(m *yaml.Node) {
	var own, merged []*yaml.Node
	for i := 0; i+1 < len(m.Content); i += 2 {
		key, value := m.Content[i], m.Content[i+1]
		switch {
		case !isMerge(key):
			own = append(own, key, value)
		case value.Kind == yaml.MappingNode:
			merged = append(merged, value)
		case value.Kind == yaml.SequenceNode && !slices.ContainsFunc(value.Content, func(n *yaml.Node) bool { return n.Kind != yaml.MappingNode }):
			merged = append(merged, value.Content...)
		default:
			a.add(place{line: key.Line, column: key.Column}, "the YAML merge << wants a mapping, or a list of mappings")
		}
	}
	if len(own) == len(m.Content) {
		return
	}
	have := map[string]bool{}
	for i := 0; i < len(own); i += 2 {
		have[own[i].Value] = true
	}
	for _, from := range merged {
		for i := 0; i+1 < len(from.Content); i += 2 {
			if key := from.Content[i]; !have[key.Value] {
				have[key.Value] = true
				own = append(own, key, from.Content[i+1])
			}
		}
	}
	m.Content = own
}
