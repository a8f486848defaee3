// SPDX-License-Identifier: Apache-2.0

package libvirt

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	golibvirt "github.com/digitalocean/go-libvirt"

	"github.com/labfile/lab/internal/lab"
)

// Commit has a QEMU there do it: the upper file is the disk of a domain whose guest never
// runs, and the domain goes on in the lower one. Unlike a commit further down a chain, that
// keeps areas that were discarded, and is on the disk before it is done.
func (v volumeFiles) Commit(ctx context.Context, chain []string) error {
	last := len(chain) - 1
	err := v.bench(ctx, chain[last], chain[:last], func(w workbench) error {
		err := w.DomainBlockCommit(w.domain, mainDisk, golibvirt.OptString{v.Path(chain[last-1])}, nil, 0, golibvirt.DomainBlockCommitActive)
		if err != nil {
			return err
		}
		return w.finish(ctx, golibvirt.DomainBlockJobAbortPivot)
	})
	if err != nil {
		return fmt.Errorf("joining %s and %s: %w", v.Path(chain[last-1]), v.Path(chain[last]), err)
	}
	return nil
}

// Flatten has a QEMU there do it. The chain may be in use, so that an empty file is put on
// top for the domain to have as its own.
func (v volumeFiles) Flatten(ctx context.Context, chain []string, size lab.Bytes, name string) (err error) {
	last := chain[len(chain)-1]
	defer func() {
		if err != nil {
			err = fmt.Errorf("copying %s: %w", v.Path(last), err)
		}
	}()
	if err := v.Make(ctx, name, size); err != nil {
		return err
	}
	to, err := encode(copyXML{Type: "file", Driver: driver{Type: "qcow2"}, Source: source{File: v.Path(name)}})
	if err != nil {
		return err
	}
	top := volumeOf(last) + "@top.qcow2"
	defer func() {
		cleanup, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupTime)
		defer cancel()
		err = errors.Join(err, v.Remove(cleanup, top))
	}()
	if err := v.Make(ctx, top, size); err != nil {
		return err
	}
	return v.bench(ctx, top, chain, func(w workbench) error {
		err := w.DomainBlockCopy(w.domain, mainDisk, to, nil, golibvirt.DomainBlockCopyReuseExt|golibvirt.DomainBlockCopyTransientJob)
		if err != nil {
			return err
		}
		// Given up when it is in step, the copy is what the disk is.
		return w.finish(ctx, 0)
	})
}

// volumeOf is the volume that a file is of.
func volumeOf(file string) string {
	name, _, _ := strings.Cut(file, "@")
	return name
}

// workbench is a domain whose guest never runs, on the connection with which it ends:
// libvirt has no other way to have QEMU work on files that no machine has.
type workbench struct {
	*golibvirt.Libvirt
	domain golibvirt.Domain
}

// bench has work done in a domain with the file called top as its disk, above a chain. There
// is one for a volume at a time, as the caller sees to: what is there of an earlier one,
// because the daemon was restarted meanwhile, holds files that nobody else could write to
// and is ended.
func (v volumeFiles) bench(ctx context.Context, top string, chain []string, work func(workbench) error) error {
	var paths []string
	for _, name := range chain {
		paths = append(paths, v.Path(name))
	}
	kind, err := v.r.emulated(ctx)
	if err != nil {
		return err
	}
	it := v.helper(top)
	if err := v.r.p.kill(ctx, domain{Domain: it}); err != nil {
		return err
	}
	doc := helperXML(kind, it.Name)
	doc.UUID = formatUUID(it.UUID)
	doc.Devices.Disks = []diskXML{joined(v.Path(top), paths)}
	text, err := encode(doc)
	if err != nil {
		return err
	}
	err = v.r.p.link.apart(ctx, func(l *golibvirt.Libvirt) error {
		err := toldWhy(ctx, func() error {
			_, err := l.DomainCreateXML(text, golibvirt.DomainStartPaused|golibvirt.DomainStartAutodestroy)
			return err
		})
		if err != nil {
			return err
		}
		return work(workbench{l, it})
	})
	// It would end with the connection, some time; others want the files now.
	cleanup, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupTime)
	defer cancel()
	if e := v.r.p.kill(cleanup, domain{Domain: it}); err == nil {
		err = e
	}
	return err
}

// helper is the domain that works on a volume, by the name of one of its files.
func (v volumeFiles) helper(file string) golibvirt.Domain {
	name := v.prefix + volumeOf(file)
	return golibvirt.Domain{Name: name, UUID: uuidOf(v.r.p.client + name)}
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

// workTick is how often work is looked at.
const workTick = 100 * time.Millisecond

// finish waits until the disk's job has caught up with it, and ends the job in that way. Of
// a job that failed libvirt tells no more than that it is gone.
func (w workbench) finish(ctx context.Context, how golibvirt.DomainBlockJobAbortFlags) error {
	for {
		job, _, _, _, _, err := w.DomainGetBlockJobInfo(w.domain, mainDisk, 0)
		if err != nil {
			return err
		}
		document, err := w.DomainGetXMLDesc(w.domain, 0)
		if err != nil {
			return err
		}
		disk, err := diskOf(document)
		switch {
		case err != nil:
			return err
		case disk.Mirror.Ready == "yes":
			return w.DomainBlockJobAbort(w.domain, mainDisk, how)
		case job == 0:
			return errors.New("it failed; libvirt's log there says why")
		}
		if err := pause(ctx, workTick); err != nil {
			return err
		}
	}
}

// emulated is the type of a domain that runs no code.
func (r *Remote) emulated(ctx context.Context) (string, error) {
	err := r.p.offers(ctx, "qemu")
	if _, said := code(err); said {
		return "kvm", nil // all that some distributions have
	}
	return "qemu", err
}
