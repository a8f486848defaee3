// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"maps"
	"slices"

	"github.com/labfile/lab/internal/ledger"
	"github.com/labfile/lab/providers"
)

// candidate is a provider that may have machines of a lab.
type candidate struct {
	providers.Provider
	own   bool // by the ledger it runs the lab
	known bool // so it is, or this host remembers that it had machines
}

// candidates returns all providers that may have machines of a lab: each at its
// default address but for the lab's own, and at those that it remembers.
func (l *Lab) candidates(o ledger.Opened) ([]candidate, error) {
	h := l.host
	var all []candidate
	for _, name := range slices.Sorted(maps.Keys(h.Providers)) {
		first := candidate{Provider: h.Providers[name]}
		if name == orDefault(o.Provider) {
			if own, err := h.Provider(o); err == nil {
				first.Provider = own
			}
			first.own, first.known = true, true
		}
		others, err := l.remembered(&first)
		if err != nil {
			return nil, err
		}
		all = append(append(all, first), others...)
	}
	return all, nil
}

// remembered returns the providers of the other daemons that this host remembers to have
// machines of the lab, and notes it of this one.
func (l *Lab) remembered(first *candidate) ([]candidate, error) {
	a, ok := first.Provider.(providers.Addressed)
	if !ok {
		return nil, nil
	}
	uris, err := a.Daemons(l.id)
	if err != nil {
		return nil, err
	}
	var others []candidate
	for _, uri := range uris {
		p, err := a.At(uri)
		switch {
		case err != nil: // it is no daemon's, so nobody has the machine
			l.host.Log.Warn("a machine's folder names a daemon that cannot be", "lab", l.id, "uri", uri, "err", err)
		case p == first.Provider:
			first.known = true
		default:
			others = append(others, candidate{Provider: p, known: true})
		}
	}
	return others, nil
}
