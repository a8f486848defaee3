// SPDX-License-Identifier: Apache-2.0

package fsutil

import (
	"crypto/rand"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
)

// A Draft is the next content of a file. It is a file of its own until Commit puts it in the
// place of the old one: readers see the old content or the new, and so does the next start
// of a host that lost power. Drop must be called in the end, also after Commit.
type Draft struct {
	*os.File
	path string
}

// NewDraft begins a draft of path in a hidden file beside it. mode is that of the new file,
// less the umask. Errors here and of its methods: *fs.PathError with path.
func NewDraft(path string, mode fs.FileMode) (*Draft, error) {
	return NewDraftIn(filepath.Dir(path), "."+filepath.Base(path)+"-", path, mode)
}

// NewDraftIn is NewDraft with the draft in another folder of the same file system. Its name
// begins with prefix, by which the caller can find the drafts that a killed program left.
func NewDraftIn(dir, prefix, path string, mode fs.FileMode) (*Draft, error) {
	f, err := os.OpenFile(filepath.Join(dir, prefix+rand.Text()[:10]), os.O_RDWR|os.O_CREATE|os.O_EXCL, mode)
	if err != nil {
		return nil, of(path, err)
	}
	return &Draft{f, path}, nil
}

// of is err as that of the file itself: users know no drafts.
func of(path string, err error) error {
	var p *fs.PathError
	var l *os.LinkError
	switch {
	case errors.As(err, &p):
		err = p.Err
	case errors.As(err, &l):
		err = l.Err
	}
	return &fs.PathError{Op: "write", Path: path, Err: err}
}

// Write implements io.Writer.
func (d *Draft) Write(b []byte) (int, error) {
	n, err := d.File.Write(b)
	if err != nil {
		err = of(d.path, err)
	}
	return n, err
}

// Commit puts the draft in the place of the file. After it, the new content outlives a loss
// of power.
func (d *Draft) Commit() error { return d.commit(system.rename) }

// CommitNew is Commit for a file that must not be there yet. Error: fs.ErrExist.
func (d *Draft) CommitNew() error { return d.commit(system.link) }

// commit syncs the content before the name: a name that comes first can be that of an empty
// file after a loss of power.
func (d *Draft) commit(place func(from, to string) error) error {
	for _, err := range []error{system.sync(d.File), d.Close()} {
		if err != nil {
			return of(d.path, err)
		}
	}
	if err := place(d.Name(), d.path); err != nil {
		return of(d.path, err)
	}
	return SyncDir(filepath.Dir(d.path))
}

// Drop removes what is left of the draft.
func (d *Draft) Drop() {
	d.Close()
	os.Remove(d.Name())
}

// WriteFile replaces a file as a whole, or makes it, by way of a Draft. mode is that of the
// new file, less the umask. Error: *fs.PathError.
func WriteFile(path string, data []byte, mode fs.FileMode) error {
	d, err := NewDraft(path, mode)
	if err != nil {
		return err
	}
	defer d.Drop()
	if _, err := d.Write(data); err != nil {
		return err
	}
	return d.Commit()
}

// Rename moves a file, whose content is synced first, within a file system. Errors: those of
// os.Rename.
func Rename(from, to string) error {
	if err := SyncFile(from); err != nil {
		return err
	}
	if err := system.rename(from, to); err != nil {
		return err
	}
	return SyncDir(filepath.Dir(to))
}

// SyncFile makes the content of a file outlive a loss of power.
func SyncFile(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	return errors.Join(system.sync(f), f.Close())
}

// SyncDir makes the names in a directory outlive a loss of power, where the file system can.
func SyncDir(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	err = system.sync(f)
	if errors.Is(err, syscall.EINVAL) || errors.Is(err, errors.ErrUnsupported) {
		err = nil // some network file systems have no fsync for directories
	}
	return errors.Join(err, f.Close())
}

// system is the system calls whose order matters; tests record them.
var system = calls{(*os.File).Sync, os.Rename, os.Link}

type calls struct {
	sync         func(*os.File) error
	rename, link func(from, to string) error
}
