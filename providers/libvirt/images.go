// SPDX-License-Identifier: Apache-2.0

package libvirt

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	golibvirt "github.com/digitalocean/go-libvirt"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/providers"
	"github.com/labfile/lab/providers/local"
)

// Images are kept in the pool once, whoever's machines are born of them. A volume that
// was sent in full has a second one beside it, empty, that says so: libvirt cannot
// rename volumes.
const (
	imagePrefix = "lab-image-"
	imageWhole  = ".whole"
)

// image returns the name of the volume that holds what the file at path does, sending it
// if it is not there yet. Whatever was sent is fetched again to see whether it arrived
// as it was. there are the pool's volumes; the caller sees to it that nobody else of this
// user does the same.
func (p *pool) image(ctx context.Context, there map[string]bool, file, client string) (string, error) {
	f, err := os.Open(file)
	if err != nil {
		return "", fmt.Errorf("opening the image: %w", err)
	}
	defer f.Close()
	digest, err := digestOf(f)
	if err != nil {
		return "", fmt.Errorf("reading the image: %w", err)
	}
	prefix := imagePrefix + digest + "-"
	for name := range there {
		if !strings.HasPrefix(name, prefix) || !there[name+imageWhole] {
			continue
		}
		if shared, err := p.shared(ctx, name); err != nil || shared {
			return name, err
		}
	}
	name := prefix + client
	if there[name+imageWhole] {
		name = prefix + "shared-" + client // machines may stand on the one that others cannot read
	}
	if err := p.put(ctx, name, f, imageVolume); err != nil {
		return "", err
	}
	arrived := sha256.New()
	if err := p.get(ctx, name, arrived); err != nil {
		return "", err
	}
	if got := hex.EncodeToString(arrived.Sum(nil)); got != digest {
		return "", fmt.Errorf("%s has the digest %s after it was sent, and should have %s", p.path(name), got, digest)
	}
	return name, p.make(ctx, rawVolume(name+imageWhole, 0))
}

// digestOf returns the SHA-256 digest of a file: what it is called by in a store that is
// addressed by content, or else it is read.
func digestOf(f *os.File) (string, error) {
	dir, name := filepath.Split(f.Name())
	if b, err := hex.DecodeString(name); err == nil && len(b) == sha256.Size && filepath.Base(dir) == "sha256" {
		return name, nil
	}
	sum := sha256.New()
	if _, err := io.Copy(sum, f); err != nil {
		return "", err
	}
	return hex.EncodeToString(sum.Sum(nil)), nil
}

// lockImages is held by whoever of this user sends images or removes them.
func (r *Remote) lockImages(ctx context.Context) (*os.File, error) {
	if err := os.MkdirAll(r.p.cfg.Dirs.Cache, 0o700); err != nil {
		return nil, err
	}
	return local.Lock(ctx, filepath.Join(r.p.cfg.Dirs.Cache, "libvirt-images.lock"))
}

// images sees to it that the pool has all that a machine is born from. The caller holds
// the images' lock.
func (r *Remote) images(ctx context.Context, files *pool, i local.Image) (s stored, err error) {
	if err := r.p.remember(); err != nil {
		return s, err
	}
	there, err := files.list(ctx)
	if err != nil {
		return s, err
	}
	place := func(path string) string {
		if path == "" || err != nil {
			return ""
		}
		var name string
		name, err = files.image(ctx, there, path, r.suffix())
		return name
	}
	s = stored{Disk: place(i.Disk), Kernel: place(i.Kernel), Initrd: place(i.Initrd)}
	for _, path := range i.Layers {
		s.Layers = append(s.Layers, place(path))
	}
	return s, err
}

// resend sends again what is gone of what a machine is born from: another host's lab gc, or
// somebody else, may have removed it. Until the caller gives up the lock that it returns,
// this user removes none.
func (r *Remote) resend(ctx context.Context, files *pool, def local.Definition, from stored) (stored, *os.File, error) {
	held, err := r.lockImages(ctx)
	if err != nil {
		return from, nil, err
	}
	there, err := files.list(ctx)
	if err == nil && slices.ContainsFunc(from.names(), func(name string) bool { return !there[name] }) {
		from, err = r.images(ctx, files, def.Image)
	}
	if err != nil {
		held.Close()
		return from, nil, err
	}
	return from, held, nil
}

// suffix ends the names of the images that this data home sent.
func (r *Remote) suffix() string { return strings.TrimSuffix(r.p.client, ":") }

// Prune removes images that this data home sent to daemons of other hosts.
func (p *Provider) Prune(ctx context.Context, dryRun bool) ([]providers.Copy, error) {
	var found []providers.Copy
	err := p.eachRemembered(func(_ *Provider, r *Remote) error {
		if r == nil {
			return nil
		}
		copies, err := r.prune(ctx, dryRun)
		found = append(found, copies...)
		if err != nil {
			return fmt.Errorf("looking for images at %s: %w (remove %s if that host is gone for good)", r.URI(), err, r.p.remembered())
		}
		return nil
	})
	return found, err
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
	if networks, err := r.p.networked(ctx); left || dryRun || err != nil || len(networks) > 0 {
		return found, nil //nolint:nilerr // it is remembered then
	}
	return found, r.p.forget()
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
