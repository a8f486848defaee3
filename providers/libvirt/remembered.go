// SPDX-License-Identifier: Apache-2.0

package libvirt

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/labfile/lab/providers/local"
)

// A daemon that has images or networks of this data home is remembered until nothing of
// them is left there, so that they can be found without any lab.

// remembered is the file that names this daemon, and holds its URI.
func (p *Provider) remembered() string {
	sum := sha256.Sum256([]byte(p.cfg.URI))
	return filepath.Join(p.cfg.Dirs.Remotes(), fmt.Sprintf("%x", sum[:8]))
}

func (p *Provider) remember() error {
	path := p.remembered()
	if exists(path) {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	return local.WriteJSON(path, p.cfg.URI)
}

func (p *Provider) forget() error { return local.IgnoreGone(os.Remove(p.remembered())) }

// eachRemembered does something with each daemon that is remembered, and joins the errors.
// r is nil for one of this host.
func (p *Provider) eachRemembered(do func(p *Provider, r *Remote) error) error {
	entries, err := os.ReadDir(p.cfg.Dirs.Remotes())
	if err != nil {
		return local.IgnoreGone(err)
	}
	var errs []error
	for _, e := range entries {
		var uri string
		if ok, err := local.ReadJSON(filepath.Join(p.cfg.Dirs.Remotes(), e.Name()), &uri); err != nil || !ok {
			errs = append(errs, err)
			continue
		}
		d, err := p.At(uri)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		switch d := d.(type) {
		case *Remote:
			errs = append(errs, do(d.p, d))
		case *Provider:
			errs = append(errs, do(d, nil))
		}
	}
	return errors.Join(errs...)
}
