// SPDX-License-Identifier: Apache-2.0

package libvirt

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	golibvirt "github.com/digitalocean/go-libvirt"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/providers"
	"github.com/labfile/lab/providers/local"
)

var (
	_ providers.VolumeChanger = (*Remote)(nil)
	_ providers.VolumePusher  = (*Remote)(nil)
	_ providers.VolumeKeeper  = (*Remote)(nil)
)

// SetVolumes gives the domain another definition. A QEMU that runs keeps what it has.
func (r *Remote) SetVolumes(ctx context.Context, g lab.Generation, volumes []providers.Volume) error {
	if err := r.setVolumes(ctx, g, volumes); err != nil {
		return fmt.Errorf("changing the volumes of machine %q: %w", g, err)
	}
	return nil
}

func (r *Remote) setVolumes(ctx context.Context, g lab.Generation, volumes []providers.Volume) error {
	if err := local.CheckVolumes(volumes, local.CheckAbsolute); err != nil {
		return err
	}
	held, d, err := r.p.hold(ctx, g)
	if err != nil {
		return err
	}
	defer held.Close()
	def, err := d.definition()
	if err != nil {
		return err
	}
	from, err := d.stored()
	if err != nil {
		return err
	}
	files, err := r.pool(ctx)
	if err != nil {
		return err
	}
	def.SetVolumes(volumes)
	_, err = r.define(ctx, files, d.Name, def, from)
	return err
}

// PushVolume does as the Provider's.
func (r *Remote) PushVolume(ctx context.Context, g lab.Generation, v providers.Volume) error {
	if err := r.pushVolume(ctx, g, v); err != nil {
		return fmt.Errorf("putting a file on top of volume %q of machine %q: %w", v.Name, g, err)
	}
	return nil
}

func (r *Remote) pushVolume(ctx context.Context, g lab.Generation, v providers.Volume) error {
	if err := local.CheckVolumes([]providers.Volume{v}, local.CheckAbsolute); err != nil {
		return err
	}
	d, err := r.openDirectory(ctx, g)
	if err != nil {
		return err
	}
	defer d.Close()
	return r.p.pushOnVolume(ctx, d, v, func(ctx context.Context, def local.Definition) error {
		from, err := d.dom.stored()
		if err != nil {
			return err
		}
		files, err := r.pool(ctx)
		if err != nil {
			return err
		}
		_, err = r.define(ctx, files, d.dom.Name, def, from)
		return err
	})
}

// VolumeFiles returns the pool's volumes that a lab's volumes lie on.
func (r *Remote) VolumeFiles(ctx context.Context, id lab.ID) (providers.VolumeFiles, error) {
	if err := r.Reach(ctx); err != nil {
		return nil, err
	}
	files, err := r.pool(ctx)
	if err != nil {
		return nil, err
	}
	u := uuidOf(r.p.client + r.p.cfg.Dirs.Volumes(id))
	return volumeFiles{r, files, fmt.Sprintf("lab-%s.%x.", id, u[:4])}, nil
}

// volumeFiles are those of the pool's volumes whose names begin with the prefix.
type volumeFiles struct {
	r      *Remote
	files  *pool
	prefix string
}

func (v volumeFiles) Path(name string) string { return v.files.path(v.prefix + name) }

func (v volumeFiles) List(ctx context.Context) ([]string, error) {
	there, err := v.files.list(ctx)
	if err != nil {
		return nil, err
	}
	var names []string
	for name := range there {
		if name, ok := strings.CutPrefix(name, v.prefix); ok {
			names = append(names, name)
		}
	}
	return names, nil
}

func (v volumeFiles) Make(ctx context.Context, name string, size lab.Bytes) error {
	return v.files.make(ctx, overlayVolume(v.prefix+name, size))
}

func (v volumeFiles) Put(ctx context.Context, name, from string) error {
	f, err := os.Open(from)
	if err != nil {
		return err
	}
	defer f.Close()
	return v.files.put(ctx, v.prefix+name, f)
}

func (v volumeFiles) Open(ctx context.Context, names []string, dir string) ([]string, error) {
	var paths []string
	for _, name := range names {
		f, err := os.OpenFile(filepath.Join(dir, name), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if err != nil {
			return nil, err
		}
		err = v.files.get(ctx, v.prefix+name, f)
		if e := f.Close(); err == nil {
			err = e
		}
		if err != nil {
			return nil, err
		}
		paths = append(paths, f.Name())
	}
	return paths, nil
}

func (v volumeFiles) Usage(ctx context.Context, name string) (length, takes lab.Bytes, err error) {
	n, on, err := v.files.size(ctx, v.prefix+name)
	if isNotFound(err) {
		err = fs.ErrNotExist
	}
	if err != nil {
		return 0, 0, fmt.Errorf("%s: %w", v.Path(name), err)
	}
	return lab.Bytes(n), lab.Bytes(on), nil
}

func (v volumeFiles) Remove(ctx context.Context, name string) error {
	return v.files.remove(ctx, v.prefix+name)
}

// Commit has a QEMU there do it.
func (v volumeFiles) Commit(ctx context.Context, chain []string) error {
	lower, upper := v.Path(chain[len(chain)-2]), v.Path(chain[len(chain)-1])
	// The size of what is on top is nobody's business: nothing reads it.
	err := v.bench(ctx, chain, lab.MiB, func(w workbench) error {
		err := v.r.p.link.do(ctx, func(l *golibvirt.Libvirt) error {
			return l.DomainBlockCommit(w.domain, mainDisk, golibvirt.OptString{lower}, golibvirt.OptString{upper}, 0, 0)
		})
		if err != nil {
			return err
		}
		return w.await(ctx, "joining", func(s seenDisk) bool { return !s.has(upper) })
	})
	if err != nil {
		return fmt.Errorf("joining %s and %s: %w", lower, upper, err)
	}
	return nil
}

// Flatten has a QEMU there do it.
func (v volumeFiles) Flatten(ctx context.Context, chain []string, size lab.Bytes, name string) error {
	if err := v.Make(ctx, name, size); err != nil {
		return err
	}
	to, err := encode(copyXML{Type: "file", Driver: driver{Type: "qcow2"}, Source: source{File: v.Path(name)}})
	if err != nil {
		return err
	}
	err = v.bench(ctx, chain, size, func(w workbench) error {
		err := v.r.p.link.do(ctx, func(l *golibvirt.Libvirt) error {
			return l.DomainBlockCopy(w.domain, mainDisk, to, nil, golibvirt.DomainBlockCopyReuseExt|golibvirt.DomainBlockCopyTransientJob)
		})
		if err != nil {
			return err
		}
		if err := w.await(ctx, "copying", func(s seenDisk) bool { return s.Mirror.Ready == "yes" }); err != nil {
			return err
		}
		// Given up when it is in step, the copy is what the disk is.
		return v.r.p.link.do(ctx, func(l *golibvirt.Libvirt) error { return l.DomainBlockJobAbort(w.domain, mainDisk, 0) })
	})
	if err != nil {
		return fmt.Errorf("copying %s: %w", v.Path(chain[len(chain)-1]), err)
	}
	return nil
}

// workbench is a domain whose guest never runs: libvirt has no other way to have QEMU work
// on files that nobody has open.
type workbench struct {
	link   *link
	domain golibvirt.Domain
}

// bench has work done in a domain with a chain as its disk, under an empty file of the given
// size on top. The domain ends with this process.
func (v volumeFiles) bench(ctx context.Context, chain []string, size lab.Bytes, work func(workbench) error) (err error) {
	helper := v.r.helper("files")
	// Whatever removes what is left of the volume removes this, too.
	volume, _, _ := strings.Cut(chain[0], "@")
	top := volume + "@" + helper + ".qcow2"
	defer func() {
		cleanup, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupTime)
		defer cancel()
		if e := v.Remove(cleanup, top); err == nil {
			err = e
		}
	}()
	if err := v.Make(ctx, top, size); err != nil {
		return err
	}
	var paths []string
	for _, name := range chain {
		paths = append(paths, v.Path(name))
	}
	doc := helperXML(v.r.emulated(ctx), helper)
	doc.Devices.Disks = []diskXML{joined(v.Path(top), paths)}
	text, err := encode(doc)
	if err != nil {
		return err
	}
	link := v.r.p.link
	return link.apart(ctx, func(l *golibvirt.Libvirt) error {
		var dom golibvirt.Domain
		err := toldWhy(func() (err error) {
			dom, err = l.DomainCreateXML(text, golibvirt.DomainStartPaused|golibvirt.DomainStartAutodestroy)
			return err
		})
		if err != nil {
			return err
		}
		err = work(workbench{link, dom})
		// QEMU writes what it holds before it ends.
		if e := l.DomainDestroyFlags(dom, golibvirt.DomainDestroyGraceful); err == nil {
			err = e
		}
		return err
	})
}

// joined is a chain as a disk that is written to in the file on top.
func joined(top string, chain []string) diskXML {
	below := end()
	for _, path := range chain {
		below = below.under("qcow2", path)
	}
	return diskXML{
		Type: "file", Device: "disk", Driver: driver{Name: "qemu", Type: "qcow2", Discard: "unmap"},
		Source: source{File: top}, Backing: below, Target: target{Dev: mainDisk, Bus: "virtio"}, Address: at(slotDisk),
	}
}

// await waits until the disk is as it should be after some work, of which libvirt says
// no more when it failed.
func (w workbench) await(ctx context.Context, what string, done func(seenDisk) bool) error {
	for {
		type state struct {
			job      int32
			document string
		}
		is, err := answer(ctx, w.link, func(l *golibvirt.Libvirt) (s state, err error) {
			if s.job, _, _, _, _, err = l.DomainGetBlockJobInfo(w.domain, mainDisk, 0); err == nil {
				s.document, err = l.DomainGetXMLDesc(w.domain, 0)
			}
			return s, err
		})
		if err != nil {
			return err
		}
		disk, err := diskOf(is.document)
		if err != nil {
			return err
		}
		if done(disk) {
			return nil
		}
		if is.job == 0 {
			return fmt.Errorf("%s failed; libvirt's log there says why", what)
		}
		if err := pause(ctx, mergeTick); err != nil {
			return err
		}
	}
}

// emulated is the type of a domain that runs no code.
func (r *Remote) emulated(ctx context.Context) string {
	if r.p.offers(ctx, "qemu") != nil {
		return "kvm" // all that some distributions have
	}
	return "qemu"
}
