// SPDX-License-Identifier: Apache-2.0

package drift

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/labfile/lab/internal/drift/ext4"
)

// Manifest is what a file system had at some moment, but for what is in its files:
// what is left to compare where a disk can't be read from outside.
type Manifest struct {
	entries []*listed // by path
	seconds bool      // the times are in whole seconds
}

// listed is a file of a manifest.
type listed struct {
	path              string
	meta              Meta
	device            uint64 // as in ext4.Inode
	modified, changed time.Time
	inode             uint64
	links             uint64
	mount             bool // another file system stands there
}

// Bounds of a manifest, which guests make.
const (
	maxListed      = 4 << 20 // entries
	maxManifest    = 1 << 30 // bytes
	manifestHead   = "lab-manifest 1"
	manifestEnd    = "end"
	manifestFields = 11
)

// Len is the number of files.
func (m *Manifest) Len() int { return len(m.entries) }

// ReadManifest reads a manifest. Its writer is a guest that may be hostile.
//
// It consists of texts, each with a NUL behind it: a head, three for each file, that of / first (its
// numbers, the target of a link, and the path), and "end". The numbers, with spaces
// between them, are the type as a letter as find(1) has it, or "x" and all bits of
// the mode in hex; the permissions in octal; owner, group, size, the times of
// modification and of change, inode, links, the device that has the file, and the device
// that it is, in hex as MAJOR:MINOR or 0.
func ReadManifest(r io.Reader) (*Manifest, error) {
	m, err := readManifest(r)
	if err != nil {
		return nil, fmt.Errorf("reading a list of files: %w", err)
	}
	return m, nil
}

func readManifest(r io.Reader) (*Manifest, error) {
	in := &texts{r: bufio.NewReaderSize(io.LimitReader(r, maxManifest), 1<<16)}
	m := &Manifest{}
	switch head := in.next(); head {
	case manifestHead:
	case manifestHead + " seconds":
		m.seconds = true
	default:
		return nil, cmp.Or(in.err, fmt.Errorf("it begins with %.40q", head))
	}
	root := ""
	for {
		numbers := strings.TrimPrefix(in.next(), "\n")
		if numbers == manifestEnd && in.err == nil {
			break
		}
		target, name := in.next(), in.next()
		if in.err != nil {
			return nil, in.err
		}
		e, device, err := parseListed(numbers, target, name)
		if err != nil {
			return nil, fmt.Errorf("%.200q: %w", name, err)
		}
		if len(m.entries) == 0 {
			if name != "/" {
				return nil, errors.New("it does not begin with the root folder")
			}
			root = device
		}
		// A file of another file system is there because something is mounted on it.
		e.mount = device != root
		if m.entries = append(m.entries, e); len(m.entries) > maxListed {
			return nil, fmt.Errorf("more than %d files", maxListed)
		}
	}
	if len(m.entries) == 0 {
		return nil, errors.New("it is empty")
	}
	slices.SortFunc(m.entries, func(a, b *listed) int { return strings.Compare(a.path, b.path) })
	for i, e := range m.entries[1:] {
		if e.path == m.entries[i].path {
			return nil, fmt.Errorf("%.200q is listed twice", e.path)
		}
	}
	return m, nil
}

// texts reads what ends in a NUL.
type texts struct {
	r   *bufio.Reader
	err error
}

func (t *texts) next() string {
	if t.err != nil {
		return ""
	}
	var text []byte
	for {
		part, err := t.r.ReadSlice(0)
		if text = append(text, part...); len(text) > 3*maxPath {
			t.err = fmt.Errorf("a text of more than %d bytes", 3*maxPath)
			return ""
		}
		switch {
		case err == nil:
			return string(text[:len(text)-1])
		case err == io.EOF:
			t.err = io.ErrUnexpectedEOF
			return ""
		case !errors.Is(err, bufio.ErrBufferFull):
			t.err = err
			return ""
		}
	}
}

var listedKinds = map[string]Kind{
	"f": KindFile, "d": KindDir, "l": KindSymlink, "c": KindChar, "b": KindBlock, "p": KindFIFO, "s": KindSocket,
}

func parseListed(numbers, target, name string) (*listed, string, error) {
	e := &listed{path: name}
	if !strings.HasPrefix(name, "/") || path.Clean(name) != name || len(name) > maxPath {
		return nil, "", errors.New("not the path of a file")
	}
	f := strings.Fields(numbers)
	if len(f) != manifestFields {
		return nil, "", fmt.Errorf("%d fields in %.200q", len(f), numbers)
	}
	var err error
	number := func(s string, base, bits int) uint64 {
		n, nerr := strconv.ParseUint(s, base, bits)
		err = cmp.Or(err, nerr)
		return n
	}
	mode, ok := uint64(0), false
	if raw, all := strings.CutPrefix(f[0], "x"); all {
		mode = number(raw, 16, 16)
		e.meta.Kind, ok = kind(uint16(mode)&ext4.TypeMask), true
		// busybox has links as people read them: 'NAME' -> 'TARGET'.
		if shown, ok := strings.CutPrefix(target, "'"+name+"' -> '"); ok {
			target = strings.TrimSuffix(shown, "'")
		}
	} else {
		mode = number(f[1], 8, 16)
		e.meta.Kind, ok = listedKinds[f[0]]
	}
	if !ok {
		e.meta.Kind = KindUnknown
	}
	e.meta.Mode = fmt.Sprintf("%04o", mode&0o7777)
	e.meta.UID, e.meta.GID = uint32(number(f[2], 10, 32)), uint32(number(f[3], 10, 32))
	e.meta.Size = int64(number(f[4], 10, 62))
	e.inode, e.links = number(f[7], 10, 64), number(f[8], 10, 64)
	if e.meta.Kind == KindSymlink {
		e.meta.Target = target
	}
	if e.meta.Kind == KindChar || e.meta.Kind == KindBlock {
		major, minor, ok := strings.Cut(f[10], ":")
		if !ok {
			return nil, "", fmt.Errorf("%.40q is no device", f[10])
		}
		e.device = number(major, 16, 32)<<32 | number(minor, 16, 32)
	}
	var terr error
	if e.modified, terr = parseMoment(f[5]); terr == nil {
		e.changed, terr = parseMoment(f[6])
	}
	return e, f[9], cmp.Or(err, terr)
}

// parseMoment reads seconds since 1970 with a fraction, of which nanoseconds count.
func parseMoment(s string) (time.Time, error) {
	whole, fraction, _ := strings.Cut(s, ".")
	seconds, err := strconv.ParseInt(whole, 10, 64)
	if err != nil {
		return time.Time{}, err
	}
	nanos, err := strconv.ParseInt((fraction + "000000000")[:9], 10, 64)
	if err != nil || nanos < 0 {
		return time.Time{}, fmt.Errorf("%.40q is no time", s)
	}
	return time.Unix(seconds, nanos), nil
}

// Manifest lists the files of a disk, as a guest lists them.
func (r *Root) Manifest(ctx context.Context) (*Manifest, error) {
	w := &walk{ctx: ctx, root: r, dirs: map[uint32]bool{}}
	top, err := r.meta(ext4.RootInode)
	if err != nil {
		return nil, err
	}
	if err := w.file("/", top, 0); err != nil {
		return nil, err
	}
	slices.SortFunc(w.m.entries, func(a, b *listed) int { return strings.Compare(a.path, b.path) })
	return &w.m, nil
}

type walk struct {
	ctx  context.Context
	root *Root
	m    Manifest
	dirs map[uint32]bool
}

func (w *walk) file(name string, m *Meta, depth int) error {
	if depth > maxDepth || len(name) > maxPath {
		return fmt.Errorf("%.64q...: folders lie too deep", name)
	}
	i := m.inode
	w.m.entries = append(w.m.entries, &listed{
		path: name, meta: *m, device: i.Device, modified: i.Modified, changed: i.Changed,
		inode: uint64(i.Number), links: uint64(i.Links),
	})
	if len(w.m.entries) > maxListed {
		return fmt.Errorf("more than %d files", maxListed)
	}
	if m.Kind != KindDir {
		return nil
	}
	if err := w.ctx.Err(); err != nil {
		return err
	}
	if w.dirs[i.Number] {
		return fmt.Errorf("%s: a folder that lies in two places", name)
	}
	w.dirs[i.Number] = true
	entries, err := w.root.fs.ReadDir(i)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	for _, e := range entries {
		child, err := w.root.meta(e.Inode)
		if err != nil {
			return err
		}
		if err := w.file(strings.TrimSuffix(name, "/")+"/"+e.Name, child, depth+1); err != nil {
			return err
		}
	}
	return nil
}
