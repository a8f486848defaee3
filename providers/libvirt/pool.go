// SPDX-License-Identifier: Apache-2.0

package libvirt

import (
	"bytes"
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"slices"
	"strconv"

	golibvirt "github.com/digitalocean/go-libvirt"
	"golang.org/x/sys/unix"

	"github.com/labfile/lab/internal/lab"
	"github.com/labfile/lab/providers"
)

// DefaultPool is the storage pool that machines of another host are kept in if the URI
// names none: distributions make one of that name.
const DefaultPool = "default"

// pool is a storage pool: a directory of the daemon's host whose files go by the name
// of volumes (https://libvirt.org/storage.html).
type pool struct {
	link *link
	it   golibvirt.StoragePool
	dir  string // on the daemon's host
}

// poolXML is what is read of a pool's document.
type poolXML struct {
	Type string `xml:"type,attr"`
	Path string `xml:"target>path"`
}

// openPool finds the pool called name, which must be one of files.
func (k *link) openPool(ctx context.Context, name string) (*pool, error) {
	type found struct {
		it       golibvirt.StoragePool
		active   bool
		document string
	}
	is, err := answer(ctx, k, func(l *golibvirt.Libvirt) (f found, err error) {
		if f.it, err = l.StoragePoolLookupByName(name); err != nil {
			return f, err
		}
		n, err := l.StoragePoolIsActive(f.it)
		if err != nil {
			return f, err
		}
		f.active = n == 1
		f.document, err = l.StoragePoolGetXMLDesc(f.it, 0)
		return f, err
	})
	if isNotFound(err) {
		return nil, &errPool{name, k.addr.uri, "does not exist", k.addr.makePool(name)}
	}
	if err != nil {
		return nil, fmt.Errorf("looking for the storage pool %q: %w", name, err)
	}
	if !is.active {
		return nil, &errPool{name, k.addr.uri, "is not active", k.addr.virsh("pool-start " + name)}
	}
	var doc poolXML
	if err := xml.Unmarshal([]byte(is.document), &doc); err != nil {
		return nil, fmt.Errorf("reading the document of the storage pool %q: %w", name, err)
	}
	if !slices.Contains([]string{"dir", "fs", "netfs"}, doc.Type) || !path.IsAbs(doc.Path) {
		return nil, &errPool{
			name, k.addr.uri, fmt.Sprintf("is of the type %q, and lab keeps machines in directories", doc.Type),
			"name a pool of the type dir, fs or netfs in the URI: pool=NAME",
		}
	}
	return &pool{k, is.it, doc.Path}, nil
}

// errPool says what is wrong with a storage pool.
type errPool struct{ name, uri, what, cure string }

func (e *errPool) Error() string {
	return fmt.Sprintf("the storage pool %q at %s %s", e.name, e.uri, e.what)
}

// Hint is the next step.
func (e *errPool) Hint() string { return e.cure }

// Unwrap says that a host lacks something.
func (e *errPool) Unwrap() error { return providers.ErrIncapable }

// virsh is a command line for the daemon at a.
func (a address) virsh(command string) string {
	return fmt.Sprintf("virsh -c %s %s", quote(a.plain()), command)
}

// makePool is the command line that makes a pool where distributions have it.
func (a address) makePool(name string) string {
	dir := "/var/lib/libvirt/images"
	if a.session {
		dir = "~/.local/share/libvirt/images"
	}
	return fmt.Sprintf("%s && %s, or name another pool in the URI: pool=NAME",
		a.virsh(fmt.Sprintf("pool-define-as %s dir --target %s", name, dir)),
		a.virsh(fmt.Sprintf("'pool-build %s; pool-start %s; pool-autostart %s'", name, name, name)))
}

// path is the file of a volume.
func (p *pool) path(name string) string { return path.Join(p.dir, name) }

// volume names a volume for the daemon, which looks at nothing but the names.
func (p *pool) volume(name string) golibvirt.StorageVol {
	return golibvirt.StorageVol{Pool: p.it.Name, Name: name, Key: p.path(name)}
}

// list returns the names of the pool's volumes.
func (p *pool) list(ctx context.Context) (map[string]bool, error) {
	return answer(ctx, p.link, func(l *golibvirt.Libvirt) (map[string]bool, error) {
		all, _, err := l.StoragePoolListAllVolumes(p.it, 1, 0)
		if err != nil {
			return nil, err
		}
		names := map[string]bool{}
		for _, v := range all {
			names[v.Name] = true
		}
		return names, nil
	})
}

// refresh has the daemon look at the directory: files may have come and gone there
// without it.
func (p *pool) refresh(ctx context.Context) error {
	return p.link.do(ctx, func(l *golibvirt.Libvirt) error { return l.StoragePoolRefresh(p.it, 0) })
}

// free returns what may still be written to the pool.
func (p *pool) free(ctx context.Context) (lab.Bytes, error) {
	if err := p.refresh(ctx); err != nil { // libvirt remembers what was free when it looked
		return 0, fmt.Errorf("looking for room in %s: %w", p.dir, err)
	}
	return answer(ctx, p.link, func(l *golibvirt.Libvirt) (lab.Bytes, error) {
		_, _, _, available, err := l.StoragePoolGetInfo(p.it)
		return lab.Bytes(available), err
	})
}

// remove removes a volume. Removing what is absent succeeds.
func (p *pool) remove(ctx context.Context, name string) error {
	err := p.link.do(ctx, func(l *golibvirt.Libvirt) error { return l.StorageVolDelete(p.volume(name), 0) })
	if err != nil && !isNotFound(err) {
		return fmt.Errorf("removing %s: %w", p.path(name), err)
	}
	return nil
}

// volumeXML is what a volume is asked for by.
type volumeXML struct {
	XMLName     xml.Name     `xml:"volume"`
	Name        string       `xml:"name"`
	Capacity    bytesXML     `xml:"capacity"`
	Allocation  bytesXML     `xml:"allocation"`
	Format      formatIs     `xml:"target>format"`
	Compat      string       `xml:"target>compat,omitempty"` // the version of qcow2, as QEMU counts
	Permissions *permissions `xml:"target>permissions"`
}

type permissions struct {
	Mode string `xml:"mode"`
}

type bytesXML struct {
	Unit string `xml:"unit,attr"`
	Size int64  `xml:",chardata"`
}

// rawVolume is a file of zeros that takes no space.
func rawVolume(name string, size int64) volumeXML {
	return volumeXML{Name: name, Capacity: bytesXML{"bytes", size}, Allocation: bytesXML{"bytes", 0}, Format: formatIs{"raw"}}
}

// sharedMode lets every account of the daemon's host read a volume that several machines
// open. When one of them stops, libvirt gives the kernel back to its former owner, and
// where it does not remember owners (remember_owner off, a file system without extended
// attributes) it does so under a machine that is about to open it.
const sharedMode = "0644"

// imageVolume is a rawVolume that machines share.
func imageVolume(name string, size int64) volumeXML {
	v := rawVolume(name, size)
	v.Permissions = &permissions{sharedMode}
	return v
}

// shared reports whether every account can read a volume. Not every file system keeps the
// mode of an imageVolume as it was asked for.
func (p *pool) shared(ctx context.Context, name string) (bool, error) {
	text, err := answer(ctx, p.link, func(l *golibvirt.Libvirt) (string, error) {
		return l.StorageVolGetXMLDesc(p.volume(name), 0)
	})
	if err != nil {
		return false, fmt.Errorf("looking at %s: %w", p.path(name), err)
	}
	var v volumeXML
	if err := xml.Unmarshal([]byte(text), &v); err != nil {
		return false, fmt.Errorf("reading the document of %s: %w", p.path(name), err)
	}
	if v.Permissions == nil {
		return false, nil
	}
	mode, err := strconv.ParseUint(v.Permissions.Mode, 8, 32)
	if err != nil {
		return false, fmt.Errorf("reading the mode of %s: %w", p.path(name), err)
	}
	return mode&0o004 != 0, nil
}

// overlayVolume is an empty qcow2 image that names nothing below it; size is that of the
// disk.
func overlayVolume(name string, size lab.Bytes) volumeXML {
	v := rawVolume(name, int64(size))
	v.Format, v.Compat = formatIs{"qcow2"}, "1.1"
	return v
}

// make makes a volume, in the place of one that is there. It comes into being whole.
func (p *pool) make(ctx context.Context, v volumeXML) error {
	name := v.Name
	text, err := encode(v)
	if err != nil {
		return err
	}
	create := func(l *golibvirt.Libvirt) error {
		_, err := l.StorageVolCreateXML(p.it, text, 0)
		return err
	}
	err = p.link.do(ctx, create)
	if c, ok := code(err); ok && c == golibvirt.ErrStorageVolExist {
		if err := p.remove(ctx, name); err != nil {
			return err
		}
		err = p.link.do(ctx, create)
	}
	if err != nil {
		return fmt.Errorf("making %s: %w", p.path(name), err)
	}
	return nil
}

// put makes a volume, of the kind that of returns, which holds what the file does.
func (p *pool) put(ctx context.Context, name string, f *os.File, of func(name string, size int64) volumeXML) error {
	fi, err := f.Stat()
	if err != nil {
		return err
	}
	if err := p.make(ctx, of(name, fi.Size())); err != nil {
		return err
	}
	parts, err := extents(f, fi.Size())
	if err != nil {
		return fmt.Errorf("reading %s: %w", f.Name(), err)
	}
	err = p.link.apart(ctx, func(l *golibvirt.Libvirt) error {
		for _, e := range parts {
			if err := l.StorageVolUpload(p.volume(name), io.NewSectionReader(f, e.at, e.size), uint64(e.at), uint64(e.size), 0); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("sending %s to %s: %w", f.Name(), p.path(name), err)
	}
	return nil
}

// extent is a part of a file that holds data.
type extent struct{ at, size int64 }

// maxHole is how long a hole must be for it to be left out: each part costs a question.
const maxHole = 1 << 20

// extents lists the parts of a file that hold data.
func extents(f *os.File, size int64) ([]extent, error) {
	var found []extent
	for at := int64(0); at < size; {
		data, err := unix.Seek(int(f.Fd()), at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			break // nothing but a hole is left
		}
		if errors.Is(err, unix.EINVAL) {
			return []extent{{0, size}}, nil // this file system knows no holes
		}
		if err != nil {
			return nil, err
		}
		hole, err := unix.Seek(int(f.Fd()), data, unix.SEEK_HOLE)
		if err != nil {
			return nil, err
		}
		at = hole
		if n := len(found) - 1; n >= 0 && data-found[n].at-found[n].size < maxHole {
			found[n].size = hole - found[n].at
			continue
		}
		found = append(found, extent{data, hole - data})
	}
	return found, nil
}

// get writes what a volume holds to w, on a connection of its own.
func (p *pool) get(ctx context.Context, name string, w io.Writer) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	// go-libvirt may hang for ever when what it writes to fails.
	to := &sink{w: w, failed: cancel}
	err := p.link.apart(ctx, func(l *golibvirt.Libvirt) error {
		return l.StorageVolDownload(p.volume(name), to, 0, 0, 0)
	})
	if to.err != nil {
		err = to.err
	}
	if err != nil {
		return fmt.Errorf("fetching %s: %w", p.path(name), err)
	}
	return nil
}

// sink writes to w until that fails, and then drops the rest.
type sink struct {
	w      io.Writer
	err    error
	failed func()
}

func (s *sink) Write(b []byte) (int, error) {
	if s.err == nil {
		if _, s.err = s.w.Write(b); s.err != nil {
			s.failed()
		}
	}
	return len(b), nil
}

// tail returns what a volume holds from at on.
func (p *pool) tail(ctx context.Context, name string, at int64) ([]byte, error) {
	return answer(ctx, p.link, func(l *golibvirt.Libvirt) ([]byte, error) {
		var b bytes.Buffer
		err := l.StorageVolDownload(p.volume(name), &b, uint64(at), 0, 0)
		return b.Bytes(), err
	})
}

// size returns how long a volume's file is and what it takes on the host, in bytes.
func (p *pool) size(ctx context.Context, name string) (length, takes int64, err error) {
	type sizes struct{ length, takes uint64 }
	is, err := answer(ctx, p.link, func(l *golibvirt.Libvirt) (s sizes, err error) {
		if _, _, s.takes, err = l.StorageVolGetInfoFlags(p.volume(name), 0); err == nil {
			_, _, s.length, err = l.StorageVolGetInfoFlags(p.volume(name), uint32(golibvirt.StorageVolGetPhysical))
		}
		return s, err
	})
	return int64(is.length), int64(is.takes), err
}
