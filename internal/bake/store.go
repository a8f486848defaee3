// SPDX-License-Identifier: Apache-2.0

package bake

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/labfile/lab/internal/fsutil"
	"github.com/labfile/lab/internal/lab"
)

// Store keeps layers, each in a folder that is named after its key. Several
// processes may use it at once.
type Store struct {
	dir string
}

// NewStore returns the store in dir, which is made when the first layer is put.
func NewStore(dir string) *Store { return &Store{dir} }

// Entry is a layer as it is stored: the content of layer.json.
type Entry struct {
	Key      string        `json:"key"`
	ID       string        `json:"id"`                 // of the disks: two bakes of one key differ
	Parent   string        `json:"parent"`             // key of the layer below, or the box's digest
	ParentID string        `json:"parentID,omitempty"` // ID of the layer below; empty above a box
	Text     string        `json:"text"`               // the step
	Size     lab.Bytes     `json:"size"`               // virtual size of the disk
	Disks    []Disk        `json:"disks"`              // lowest first
	Made     time.Time     `json:"made"`
	Took     time.Duration `json:"took"` // nanoseconds
}

// Disk is an overlay of a layer.
type Disk struct {
	File   string `json:"file"` // beside layer.json
	Bytes  int64  `json:"bytes"`
	SHA256 string `json:"sha256"` // hex
}

const entryFile = "layer.json"

// folder returns the layer's folder. A key is a digest, and nothing else is looked at.
func (s *Store) folder(key string) (string, error) {
	hex, ok := strings.CutPrefix(key, "sha256:")
	if !ok || len(hex) != 2*sha256.Size || strings.Trim(hex, "0123456789abcdef") != "" {
		return "", fmt.Errorf("%q is not the key of a layer", key)
	}
	return filepath.Join(s.dir, hex), nil
}

// get reads a layer. Its disks are there and have their size, or it is as if it did
// not exist: fs.ErrNotExist.
func (s *Store) get(key string) (Entry, []string, error) {
	dir, err := s.folder(key)
	if err != nil {
		return Entry{}, nil, err
	}
	b, err := os.ReadFile(filepath.Join(dir, entryFile))
	if err != nil {
		return Entry{}, nil, err
	}
	var e Entry
	if err := json.Unmarshal(b, &e); err != nil || e.Key != key || len(e.Disks) == 0 {
		return Entry{}, nil, fmt.Errorf("layer %s: its record is damaged: %w", key, fs.ErrNotExist)
	}
	var paths []string
	for _, d := range e.Disks {
		p := filepath.Join(dir, filepath.Base(d.File))
		fi, err := os.Lstat(p)
		if err != nil || !fi.Mode().IsRegular() || fi.Size() != d.Bytes {
			return Entry{}, nil, fmt.Errorf("layer %s: disk %s is damaged or gone: %w", key, d.File, fs.ErrNotExist)
		}
		paths = append(paths, p)
	}
	return e, paths, nil
}

// Chain is the lowest layers of an image as far as they are stored.
type Chain struct {
	Count int       // so many of the layers are there
	Disks []string  // absolute paths, lowest first
	Size  lab.Bytes // virtual size of the topmost; 0 if Count is 0
	top   Entry
}

// Chain finds how many of the layers, from the lowest, are stored and fit on each
// other. A layer that was baked on top of disks which are no longer the stored ones,
// one that is damaged, and one whose disk is larger than its limit count as missing.
// limits are in the order of the layers; nil is no limit.
func (s *Store) Chain(box string, layers []lab.Layer, limits []lab.Bytes) Chain {
	var c Chain
	parent := box
	for i, l := range layers {
		e, paths, err := s.get(l.Key)
		if err != nil || e.Parent != parent || e.ParentID != c.top.ID || limits != nil && e.Size > limits[i] {
			return c
		}
		c.Count++
		c.Disks = append(c.Disks, paths...)
		c.Size, c.top, parent = e.Size, e, l.Key
	}
	return c
}

// Put stores a layer on top of those in below, which must be all of its parents.
// The disks are linked, or copied where that cannot be, and become read-only. A
// layer of the same key that was stored before is no longer found; its disks stay
// for the machines that were born from them.
func (s *Store) Put(ctx context.Context, below Chain, parent string, l lab.Layer, disks []string, size lab.Bytes, took time.Duration) (Entry, error) {
	e, err := s.put(ctx, below, parent, l, disks, size, took)
	if err != nil {
		return e, fmt.Errorf("storing the layer of %q: %w", l.Text, err)
	}
	return e, nil
}

func (s *Store) put(ctx context.Context, below Chain, parent string, l lab.Layer, disks []string, size lab.Bytes, took time.Duration) (Entry, error) {
	dir, err := s.folder(l.Key)
	if err != nil {
		return Entry{}, err
	}
	if len(disks) == 0 {
		return Entry{}, errors.New("it has no disks")
	}
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		return Entry{}, err
	}
	tmp, err := os.MkdirTemp(s.dir, tmpPrefix)
	if err != nil {
		return Entry{}, err
	}
	defer os.RemoveAll(tmp)
	e := Entry{
		Key: l.Key, Parent: parent, ParentID: below.top.ID, Text: l.Text, Size: size,
		Made: time.Now().UTC().Round(0), Took: took,
	}
	id := sha256.New()
	fmt.Fprintf(id, "%s %s\n", e.ParentID, e.Made)
	for i, from := range disks {
		name := fmt.Sprintf("%d.qcow2", i)
		d, err := take(ctx, from, filepath.Join(tmp, name))
		if err != nil {
			return Entry{}, err
		}
		d.File = name
		fmt.Fprintln(id, d.SHA256)
		e.Disks = append(e.Disks, d)
	}
	e.ID = hex.EncodeToString(id.Sum(nil)[:8])
	for i := range e.Disks { // named after their content, so that no other bake can take their place
		old := e.Disks[i].File
		e.Disks[i].File = "disk-" + e.ID + "-" + old
		if len(e.Disks) == 1 {
			e.Disks[i].File = "disk-" + e.ID + ".qcow2"
		}
		if err := os.Rename(filepath.Join(tmp, old), filepath.Join(tmp, e.Disks[i].File)); err != nil {
			return Entry{}, err
		}
	}
	b, err := json.MarshalIndent(e, "", "  ")
	if err != nil {
		return Entry{}, err
	}
	if err := fsutil.WriteFile(filepath.Join(tmp, entryFile), append(b, '\n'), 0o600); err != nil {
		return Entry{}, err
	}
	if err := s.settle(tmp, dir, e); err != nil {
		return Entry{}, err
	}
	return e, fsutil.SyncDir(s.dir)
}

// settle moves what was prepared in tmp to dir.
func (s *Store) settle(tmp, dir string, e Entry) error {
	if err := fsutil.SyncDir(tmp); err != nil {
		return err
	}
	err := os.Rename(tmp, dir)
	if err == nil || !errors.Is(err, fs.ErrExist) && !errors.Is(err, unix.ENOTEMPTY) {
		return err
	}
	// There is one already: the disks go first, then the record that names them.
	for _, d := range e.Disks {
		if err := os.Rename(filepath.Join(tmp, d.File), filepath.Join(dir, d.File)); err != nil {
			return err
		}
	}
	if err := fsutil.SyncDir(dir); err != nil {
		return err
	}
	if err := os.Rename(filepath.Join(tmp, entryFile), filepath.Join(dir, entryFile)); err != nil {
		return err
	}
	return fsutil.SyncDir(dir)
}

// take links or copies a disk to path, makes it read-only, and returns its size and
// digest.
func take(ctx context.Context, from, path string) (Disk, error) {
	in, err := os.Open(from)
	if err != nil {
		return Disk{}, err
	}
	defer in.Close()
	h := sha256.New()
	var d Disk
	if err := os.Link(from, path); err == nil {
		if d.Bytes, err = io.Copy(h, &reader{ctx, in}); err != nil {
			return Disk{}, err
		}
		d.SHA256 = hex.EncodeToString(h.Sum(nil))
		return d, errors.Join(os.Chmod(path, 0o400), in.Sync())
	}
	out, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return Disk{}, err
	}
	d.Bytes, err = io.Copy(io.MultiWriter(out, h), &reader{ctx, in})
	d.SHA256 = hex.EncodeToString(h.Sum(nil))
	return d, errors.Join(err, out.Chmod(0o400), out.Sync(), out.Close())
}

// reader ends with ctx.
type reader struct {
	ctx context.Context
	r   io.Reader
}

func (r *reader) Read(b []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, err
	}
	return r.r.Read(b)
}

const (
	tmpPrefix = ".new-"
	lockFile  = ".locks"
)

// Lock is the right to bake one layer. The kernel ends it with the process.
type Lock struct{ file *os.File }

// Unlock gives the right back.
func (l *Lock) Unlock() {
	if l != nil && l.file != nil {
		l.file.Close()
	}
}

// lockPoll is how often a taken lock is tried again: nothing tells when a kernel
// lock becomes free to somebody who also listens to a context.
const lockPoll = 200 * time.Millisecond

// Lock waits until nobody else bakes the layer. waiting is called once if somebody
// does.
func (s *Store) Lock(ctx context.Context, key string, waiting func()) (*Lock, error) {
	for first := true; ; first = false {
		l, err := s.TryLock(key)
		if l != nil || err != nil {
			return l, err
		}
		if first {
			waiting()
		}
		select {
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-time.After(lockPoll):
		}
	}
}

// TryLock returns nil if somebody else has the lock. Its files are empty and are
// removed together with the layers: one that was removed under a waiter is noticed.
func (s *Store) TryLock(key string) (*Lock, error) {
	dir, err := s.folder(key)
	if err != nil {
		return nil, err
	}
	path := filepath.Join(s.dir, lockFile, filepath.Base(dir))
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, fmt.Errorf("locking a layer: %w", err)
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, fmt.Errorf("locking a layer: %w", err)
	}
	for {
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, nil
		}
		return nil, fmt.Errorf("locking a layer: %w", err)
	}
	a, err1 := f.Stat()
	b, err2 := os.Stat(path)
	if err1 != nil || err2 != nil || !os.SameFile(a, b) {
		f.Close() // a prune removed it in between
		return s.TryLock(key)
	}
	return &Lock{f}, nil
}

// List returns all layers, sorted by when they were made; damaged ones are left out.
func (s *Store) List() ([]Entry, error) {
	entries, err := os.ReadDir(s.dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("listing layers: %w", err)
	}
	var list []Entry
	for _, f := range entries {
		if e, _, err := s.get("sha256:" + f.Name()); err == nil {
			list = append(list, e)
		}
	}
	slices.SortFunc(list, func(a, b Entry) int { return a.Made.Compare(b.Made) })
	return list, nil
}

// Removed is a layer that Prune removed, or would remove.
type Removed struct {
	Key   string    `json:"key"`
	Text  string    `json:"text,omitempty"`
	Bytes lab.Bytes `json:"bytes"`
}

// Prune removes all layers but those whose keys keep holds and those below them,
// and what interrupted commands left. Layers that are being baked stay. With dryRun
// it only says what it would remove.
func (s *Store) Prune(keep func(key string) bool, dryRun bool) ([]Removed, error) {
	folders, err := os.ReadDir(s.dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("pruning layers: %w", err)
	}
	needed := map[string]bool{}
	for _, f := range folders {
		if !keep("sha256:" + f.Name()) {
			continue
		}
		for key := "sha256:" + f.Name(); !needed[key]; {
			needed[key] = true
			e, _, err := s.get(key)
			if err != nil {
				break // the box, or a layer that is damaged or gone
			}
			key = e.Parent
		}
	}
	var (
		removed []Removed
		errs    []error
	)
	for _, f := range folders {
		key, path := "sha256:"+f.Name(), filepath.Join(s.dir, f.Name())
		if f.Name() == lockFile || needed[key] {
			continue
		}
		r := Removed{Key: key, Bytes: usage(path)}
		if strings.HasPrefix(f.Name(), tmpPrefix) {
			if fi, err := f.Info(); err != nil || time.Since(fi.ModTime()) < time.Hour {
				continue // perhaps somebody is writing it
			}
			r.Key, r.Text = f.Name(), "left by an interrupted bake"
		} else if e, _, err := s.get(key); err == nil {
			r.Text = e.Text
		}
		if !dryRun {
			gone, err := s.drop(key, path)
			if err != nil {
				errs = append(errs, err)
			}
			if !gone {
				continue
			}
		}
		removed = append(removed, r)
	}
	return removed, errors.Join(errs...)
}

// drop removes one folder of the store, unless its layer is being baked.
func (s *Store) drop(key, path string) (bool, error) {
	if _, err := s.folder(key); err == nil {
		l, err := s.TryLock(key)
		if err != nil || l == nil {
			return false, err
		}
		defer l.Unlock()
		defer os.Remove(l.file.Name())
	}
	// The record goes first: what is half removed is not found.
	if err := os.Remove(filepath.Join(path, entryFile)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return false, err
	}
	return true, os.RemoveAll(path)
}

// usage is what a folder's files take on the disk.
func usage(dir string) lab.Bytes {
	var n lab.Bytes
	_ = filepath.WalkDir(dir, func(_ string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return nil
		}
		if fi, err := e.Info(); err == nil {
			n += lab.Bytes(fi.Size())
		}
		return nil
	})
	return n
}
