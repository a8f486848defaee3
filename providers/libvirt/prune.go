// SPDX-License-Identifier: Apache-2.0

package libvirt

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	golibvirt "github.com/digitalocean/go-libvirt"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/providers"
	"github.com/labfile/lab/providers/local"
)

// Where images were sent to is remembered until nothing of ours is left there.

// remembered is the file that names this daemon, and holds its URI.
func (r *Remote) remembered() string {
	sum := sha256.Sum256([]byte(r.URI()))
	return filepath.Join(r.p.cfg.Dirs.Remotes(), fmt.Sprintf("%x", sum[:8]))
}

func (r *Remote) remember() error {
	path := r.remembered()
	if exists(path) {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	return local.WriteJSON(path, r.URI())
}

// suffix ends the names of the images that this data home sent.
func (r *Remote) suffix() string { return strings.TrimSuffix(r.p.client, ":") }

// Prune removes images that this data home sent to daemons of other hosts.
func (p *Provider) Prune(ctx context.Context, dryRun bool) ([]providers.Copy, error) {
	entries, err := os.ReadDir(p.cfg.Dirs.Remotes())
	if err != nil {
		return nil, local.IgnoreGone(err)
	}
	var (
		found []providers.Copy
		errs  []error
	)
	for _, e := range entries {
		var uri string
		if ok, err := local.ReadJSON(filepath.Join(p.cfg.Dirs.Remotes(), e.Name()), &uri); err != nil || !ok {
			errs = append(errs, err)
			continue
		}
		d, err := p.At(uri)
		r, ok := d.(*Remote)
		if err != nil || !ok {
			errs = append(errs, err)
			continue
		}
		copies, err := r.prune(ctx, dryRun)
		found = append(found, copies...)
		if err != nil {
			errs = append(errs, fmt.Errorf("looking for images at %s: %w (remove %s if that host is gone for good)", uri, err, r.remembered()))
		}
	}
	return found, errors.Join(errs...)
}

// Prune does as the Provider's.
func (r *Remote) Prune(ctx context.Context, dryRun bool) ([]providers.Copy, error) {
	return r.p.Prune(ctx, dryRun)
}

func (r *Remote) prune(ctx context.Context, dryRun bool) ([]providers.Copy, error) {
	held, err := r.lockImages(ctx) // nobody of this user sends any meanwhile
	if err != nil {
		return nil, err
	}
	defer held.Close()
	files, err := r.pool(ctx)
	if err != nil {
		return nil, err
	}
	there, err := files.list(ctx)
	if err != nil {
		return nil, err
	}
	used, err := r.documents(ctx)
	if err != nil {
		return nil, err
	}
	var found []providers.Copy
	left := false
	for name := range there {
		if !strings.HasPrefix(name, imagePrefix) || !strings.HasSuffix(name, "-"+r.suffix()) {
			continue
		}
		if strings.Contains(used, name) { // the path may be written otherwise
			left = true
			continue
		}
		_, takes, err := files.size(ctx, name)
		if err != nil && !isNotFound(err) {
			return found, err
		}
		found = append(found, providers.Copy{Name: r.URI() + " " + files.path(name), Size: lab.Bytes(takes)})
		if dryRun {
			continue
		}
		// Without what says that it is whole, nobody is born from it.
		for _, v := range []string{name + imageWhole, name} {
			if err := files.remove(ctx, v); err != nil {
				return found, err
			}
		}
	}
	slices.SortFunc(found, func(a, b providers.Copy) int { return strings.Compare(a.Name, b.Name) })
	if left || dryRun {
		return found, nil
	}
	return found, local.IgnoreGone(os.Remove(r.remembered()))
}

// documents returns the documents of all of the daemon's domains, whoever's they are.
func (r *Remote) documents(ctx context.Context) (string, error) {
	return answer(ctx, r.p.link, func(l *golibvirt.Libvirt) (string, error) {
		all, _, err := l.ConnectListAllDomains(1, 0)
		if err != nil {
			return "", err
		}
		var b strings.Builder
		for _, d := range all {
			for _, flags := range []golibvirt.DomainXMLFlags{0, golibvirt.DomainXMLInactive} {
				text, err := l.DomainGetXMLDesc(d, flags)
				if isNotFound(err) {
					continue // gone
				}
				if err != nil {
					return "", err
				}
				b.WriteString(text)
			}
		}
		return b.String(), nil
	})
}
