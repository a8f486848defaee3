// SPDX-License-Identifier: Apache-2.0

package filestream

import (
	"io/fs"
	"os"
	"path/filepath"
	"time"
)

// Tree is a folder that files are written to. An *os.Root is one that nothing leads
// out of.
type Tree interface {
	Name() string
	OpenFile(name string, flag int, perm fs.FileMode) (*os.File, error)
	Mkdir(name string, perm fs.FileMode) error
	Lstat(name string) (fs.FileInfo, error)
	Stat(name string) (fs.FileInfo, error)
	Remove(name string) error
	Rename(from, to string) error
	Symlink(to, name string) error
	Chmod(name string, mode fs.FileMode) error
	Chtimes(name string, atime, mtime time.Time) error
}

var (
	_ Tree = (*os.Root)(nil)
	_ Tree = Plain("")
)

// Plain is a folder with whatever its links lead to.
type Plain string

func (p Plain) in(name string) string { return filepath.Join(string(p), name) }

// Name is the path of the folder.
func (p Plain) Name() string { return string(p) }

// OpenFile is os.OpenFile in the folder.
func (p Plain) OpenFile(name string, flag int, perm fs.FileMode) (*os.File, error) {
	return os.OpenFile(p.in(name), flag, perm)
}

// Mkdir is os.Mkdir in the folder.
func (p Plain) Mkdir(name string, perm fs.FileMode) error { return os.Mkdir(p.in(name), perm) }

// Lstat is os.Lstat in the folder.
func (p Plain) Lstat(name string) (fs.FileInfo, error) { return os.Lstat(p.in(name)) }

// Stat is os.Stat in the folder.
func (p Plain) Stat(name string) (fs.FileInfo, error) { return os.Stat(p.in(name)) }

// Remove is os.Remove in the folder.
func (p Plain) Remove(name string) error { return os.Remove(p.in(name)) }

// Rename is os.Rename in the folder.
func (p Plain) Rename(from, to string) error { return os.Rename(p.in(from), p.in(to)) }

// Symlink is os.Symlink in the folder.
func (p Plain) Symlink(to, name string) error { return os.Symlink(to, p.in(name)) }

// Chmod is os.Chmod in the folder.
func (p Plain) Chmod(name string, mode fs.FileMode) error { return os.Chmod(p.in(name), mode) }

// Chtimes is os.Chtimes in the folder.
func (p Plain) Chtimes(name string, atime, mtime time.Time) error {
	return os.Chtimes(p.in(name), atime, mtime)
}
